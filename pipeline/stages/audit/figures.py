"""The figures of an audit: the laws as a matrix, and what comes out of each test."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.report.style import COLOURS, GRID, INK, MUTED, RUN_COLOURS, bare, shorten
from pipeline.stages.audit import curves, effects
from pipeline.stages.audit.axioms import AXIOMS
from pipeline.stages.audit.drawing import Drawing, Drawings, Told
from pipeline.stages.audit.options import TESTS

PANELS = 3  # measures of a test that its own figure shows, at most
LETTER = 0.068  # inches of a letter in a column of names, generously
STATE_COLOURS = {"holds": RUN_COLOURS["trained"], "fails": RUN_COLOURS["untrained"], "refused": GRID}


def laws(width: float, told: Told, titles: Mapping[str, str]) -> Figure:
    """Draw which method keeps which law: a square for each, with the worst residual where it fails."""
    names, columns = [name for name in told if name in titles], list(AXIOMS)
    shown = [shorten(titles[name], int(0.25 * width / LETTER)) for name in names]
    left = LETTER * max(map(len, shown), default=1) + 0.1
    side = (width - left) / len(columns)
    short = [axiom.title.removeprefix("Invariance: ") for axiom in AXIOMS.values()]
    top = 0.058 * max(map(len, short)) + 0.1
    height = 0.21 * len(names) + top + 0.1
    figure = Figure(figsize=(width, height))
    panel = figure.add_axes((left / width, 0.05 / height, (width - left) / width, 0.21 * len(names) / height))
    for row, name in enumerate(names):
        for column, axiom in enumerate(columns):
            found = told[name].get(axiom)
            if found is None or found.state not in STATE_COLOURS:
                continue
            place = (column + 0.04, row + 0.06)
            panel.add_patch(Rectangle(place, 0.92, 0.88, color=STATE_COLOURS[found.state], alpha=0.75, linewidth=0))
            if found.state == "fails" and side > 0.3:
                size = 5.0 if side < 0.4 else 6.0
                panel.text(column + 0.5, row + 0.5, _short(found.value), ha="center", va="center", fontsize=size)
    panel.set(xlim=(0, len(columns)), ylim=(len(names), 0))
    panel.set_yticks(np.arange(len(names)) + 0.5, shown, fontsize=7, color=INK)
    panel.set_xticks(np.arange(len(columns)) + 0.5, short, rotation=90, fontsize=6.5)
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelcolor=INK)
    bare(panel, "left", "top")
    return figure


def _short(value: float) -> str:
    return (
        f"{value:.2f}".replace("0.", ".")
        if 0.005 <= value < 10
        else f"{value:.0e}"
        if value < 0.005
        else f"{value:.0f}"
    )


def dots(width: float, told: Told, titles: Mapping[str, str], measures: Sequence[str], control: str) -> Figure:
    """Draw the value and interval of each method, a panel for each measure; controls below, the test's as a line."""
    names = [name for name in told if any(measure in told[name] for measure in measures)]
    methods = [name for name in names if name in titles]
    order = sorted(methods, key=lambda name: -_value(told, name, measures[0])) + [n for n in names if n not in titles]
    words = {**titles} | {name: name.removeprefix("control:") + " (control)" for name in names if name not in titles}
    columns = len(measures) if width > 5 else 1
    lines = -(-len(measures) // columns)
    high = 0.19 * len(order) + 0.7
    figure = Figure(figsize=(width, high * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True).ravel()
    for panel, measure in zip(panels, measures, strict=False):
        for at, name in enumerate(order):
            found = told[name].get(measure)
            if found is None or np.isnan(found.value):
                continue
            error = np.nan_to_num([[found.value - found.low], [found.high - found.value]]).clip(0)
            colour = COLOURS[0] if name in titles else MUTED
            panel.errorbar([found.value], [at], xerr=error, fmt="o", color=colour, ms=4, linewidth=1)
        if not np.isnan(line := _value(told, control, measure)):
            panel.axvline(line, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
        panel.set_title(shorten(measure, int(15 * width / columns)), fontsize=8)
        panel.grid(axis="x")
        panel.set_ylim(len(order) - 0.4, -0.6)
        panel.set_yticks(range(len(order)), [shorten(words[name], 26) for name in order], fontsize=7, color=INK)
        bare(panel, "left")
    for panel in panels[len(measures) :]:
        panel.set_axis_off()
    return figure


def _value(told: Told, name: str, measure: str) -> float:
    found = told.get(name, {}).get(measure)
    return np.nan if found is None else found.value


def plain(test: str, told: Told, titles: Mapping[str, str]) -> Iterator[Drawing]:
    """Yield the figure of a test that has none of its own: its first measures, method by method."""
    measures = [
        measure
        for measure in dict.fromkeys(measure for own in told.values() for measure in own if measure)
        if any(not np.isnan(_value(told, name, measure)) for name in told if name in titles)
    ]
    # Those of a label, such as a share, come where there are no others.
    measures = ([each for each in measures if "." not in each] or measures)[:PANELS]
    if measures:
        control = TESTS[test].control
        yield Drawing(
            "",
            f"Dot plot: {', '.join(measures)} of each method, with intervals",
            "Mean over images with its 95 % bootstrap interval; controls in grey, the test’s own as a line.",
            partial(dots, told=told, titles=titles, measures=measures, control=f"control:{control}"),
        )


FIGURES: Mapping[str, Drawings] = {**effects.FIGURES}
"""By test; the others have `plain`."""


def drawings(test: str, told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
    """Yield the figures of a test on one network."""
    if test in FIGURES:
        yield from FIGURES[test](told, titles, options)
    elif test != "axioms":
        yield from plain(test, told, titles)
    if test in curves.FIGURES:
        yield from curves.FIGURES[test](told, titles, options)
