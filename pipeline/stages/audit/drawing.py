"""What a figure of a test is, before it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from pipeline.stages.audit.results import Outcome

Told = Mapping[str, Mapping[str, Outcome]]
"""Outcomes by the name of a method or control, as in the table, and by measure."""


@dataclass(frozen=True)
class Drawing:
    """A figure of a test: the end of its files' names, its words, and what draws it at a width in inches."""

    name: str
    alt: str
    caption: str
    draw: Callable[[float], Figure]


Drawings = Callable[[Told, Mapping[str, str], Any], Iterator[Drawing]]
"""Given outcomes, titles of the methods, and the options of the test."""
