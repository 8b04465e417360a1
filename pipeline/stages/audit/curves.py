"""Figures of tests whose numbers form a curve: a panel for each method, with the control in grey."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, GRID, MUTED, grid_of, shorten
from pipeline.stages.audit.drawing import Drawing, Drawings, Told
from pipeline.stages.audit.faithful import ORDERS
from pipeline.stages.audit.results import Outcome

Lines = Mapping[str, np.ndarray]
"""By series, the mean over images at each point, NaN where there is none."""
TALL = 1.15
"""Inches of a panel."""


def curves(
    width: float,
    points: Sequence[str],
    methods: Mapping[str, Lines],
    control: Lines,
    words: tuple[str, str],
    control_name: str = "",
) -> Figure:
    """Draw one panel for each method, with its series as lines over common axes, and the control's in grey.

    Parameters
    ----------
    points : labels of the points; where all are numbers, they are where the points lie.
    methods : lines by title. control : lines of the control by the same series; empty: there is none.
    words : what the axes show, (across, up).
    """
    where, ticks = places(points)
    rows, columns = grid_of(len(methods), width, 4)
    figure = Figure(figsize=(width, TALL * rows + 0.75), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    names = list(dict.fromkeys(name for lines in methods.values() for name in lines))
    colours = dict(zip(names, (COLOURS[at % len(COLOURS)] for at in range(len(names))), strict=True))
    drawn = {}
    for at, (panel, (title, lines)) in enumerate(zip(panels, methods.items(), strict=False)):
        for values in control.values():
            (line,) = panel.plot(where, values, color=MUTED, linewidth=0.9, linestyle=(0, (3, 2)))
            drawn[control_name or "control"] = line
        for name, values in lines.items():
            marker = "o" if len(where) <= 12 else ""
            (drawn[name],) = panel.plot(where, values, color=colours[name], marker=marker, markersize=2.5)
        panel.set_title(shorten(title, int(width / columns / 0.075)), fontsize=7)
        panel.grid(color=GRID)
        if at % columns == 0:
            panel.set_ylabel(words[1], fontsize=7)
        if at >= len(methods) - columns:
            panel.set_xlabel(words[0], fontsize=7)
            panel.tick_params(labelbottom=True)
        if ticks is not None:
            panel.set_xticks(where, ticks, fontsize=6, rotation=90 if max(map(len, ticks)) > 3 else 0)
    for panel in panels[len(methods) :]:
        panel.set_axis_off()
    if len(drawn) > 1:
        figure.legend(
            drawn.values(), drawn.keys(), loc="outside upper left", ncols=min(len(drawn), int(width / 1.2)), fontsize=7
        )
    return figure


def places(points: Sequence[str]) -> tuple[np.ndarray, list[str] | None]:
    """Return where points lie, and their labels; None for numbers, which an axis labels itself."""
    try:
        where = np.array([float(each) for each in points])
    except ValueError:
        return np.arange(len(points), dtype=np.float64), list(points)
    if len(where) > 1 and where[0] > 0 and where[-1] / where[0] > 20:  # spread over orders of magnitude
        return np.arange(len(points), dtype=np.float64), list(points)
    return where, None


@dataclass(frozen=True)
class Said:
    """The words of a figure: of its axes, and what they show."""

    across: str
    up: str
    caption: str


def line(told: Mapping[str, Outcome], prefix: str) -> dict[str, float]:
    """Return the values of outcomes `prefix.label` by label."""
    start = f"{prefix}."
    return {name.removeprefix(start): one.value for name, one in told.items() if name.startswith(start)}


def drawing(
    told: Told, titles: Mapping[str, str], series: Mapping[str, str], control: str, said: Said
) -> Iterator[Drawing]:
    """Yield the curves of a test, from outcomes `prefix.label`.

    Parameters
    ----------
    series : the prefix of each series, by its name. control : the control that is drawn beside each method.
    """
    methods = {titles[name]: own for name, own in told.items() if name in titles}
    points = list(
        dict.fromkeys(label for own in methods.values() for each in series.values() for label in line(own, each))
    )

    def lines(own: Mapping[str, Outcome]) -> Lines:
        found = {name: line(own, prefix) for name, prefix in series.items()}
        return {name: np.array([each.get(p, np.nan) for p in points]) for name, each in found.items() if each}

    shown = {title: found for title, own in methods.items() if (found := lines(own))}
    beside = lines(told.get(f"control:{control}", {}))
    if shown and points:
        caption = said.caption + (f" Grey: the control, {CONTROLS.get(control, control)}." if beside else "")
        yield Drawing(
            "curves",
            f"Small multiples: {said.up} by {said.across}, a panel for each method",
            caption,
            lambda width: curves(width, points, shown, beside, (said.across, said.up), control if beside else ""),
        )


CONTROLS = {"random": "random maps"}


def removal(caption: str) -> Drawings:
    def made(told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
        series = {kind: f"probability_{kind}" for kind in options.fillers}
        yield from drawing(told, titles, series, "random", Said("share of pixels", "probability", caption))

    return made


def _road(told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
    series = {order.replace("_", " relevant "): f"accuracy_{order}" for order in ORDERS}
    words = Said(
        "share of pixels removed",
        "same prediction",
        "Share of images whose prediction stays the explained class when pixels are filled from their neighbours.",
    )
    yield from drawing(told, titles, series, "random", words)


def _sensitivity(told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
    caption = "Mean correlation, over random sets of n pixels, of the map’s sum with what removing them does."
    yield from drawing(
        told, titles, {"correlation": "correlation"}, "random", Said("n, as a share of pixels", "correlation", caption)
    )


def _layers(told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
    series = {
        f"{words}, {order}": f"{order}_{way}"
        for order in options.orders
        for way, words in (("rank", "rank correlation"), ("ssim", "SSIM"))
    }
    caption = "How alike the maps are when layers forget what they learnt, from the output (left) to the input."
    yield from drawing(told, titles, series, "", Said("layers that forget", "alike", caption))


def _linear(told: Told, titles: Mapping[str, str], options: Any) -> Iterator[Drawing]:
    caption = (
        "Share of the variance of scores around an image that its gradient explains; below 0, their mean is better."
    )
    yield from drawing(told, titles, {"R²": "r2"}, "", Said("noise, in levels of 255", "R²", caption))


FIGURES: Mapping[str, Drawings] = {
    "deletion": removal("Mean probability of the explained class while the largest values are removed first."),
    "insertion": removal("Mean probability of the explained class while the largest values are shown first."),
    "road": _road,
    "sensitivity_n": _sensitivity,
    "layer_randomisation": _layers,
    "linear_view": _linear,
}
"""Drawn beside the dots of the first measures."""
