"""The cost of a step: the stores that it writes, images, tasks, seconds and memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Compression ratios, a little worse than measured: activations of the demo 0.48 to 0.67, of a random VGG-16 0.79;
# images of the demo 0.96; its label maps 0.04.
SHRINKS = {"maps": 0.8, "pixels": 1.0, "labels": 0.15}


@dataclass(frozen=True)
class Store:
    """A store, or a layer of one: its uncompressed bytes, the bytes expected on disk, and those already there."""

    name: str
    raw: float
    expected: float
    there: float
    kept: str = "full"
    unstored: float = 0.0  # uncompressed bytes that `store: none` saves

    @property
    def missing(self) -> float:
        return max(0.0, self.expected - self.there)


@dataclass(frozen=True)
class Cost:
    """The cost of one step. `seconds` are those of one worker; None if unknown."""

    stores: tuple[Store, ...] = ()
    images: int = 0
    tasks: int = 1
    seconds: float | None = None
    memory: int | None = None
    rate: str = ""


def duration(seconds: float) -> str:
    """Return a time as the plan shows it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def rate_of(speed: Mapping[str, Any]) -> str:
    """Return images per second as the table shows them, with `~` for estimates."""
    if "images_per_second" not in speed:
        return speed.get("skipped", "not measured")
    return f"{'' if speed['images'] else '~'}{speed['images_per_second']:.3g}"
