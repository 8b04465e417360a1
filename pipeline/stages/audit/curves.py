"""Figures of tests whose numbers form a curve: a panel for each method, with the control in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, GRID, MUTED, grid_of, shorten

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
    rows, columns = grid_of(len(methods), width, 6)
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


def means(values: np.ndarray) -> np.ndarray:
    """Return the mean over images of (image, ...), NaN where no image has a number."""
    known = ~np.isnan(values)
    count = known.sum(0)
    return np.where(count > 0, np.where(known, values, 0).sum(0) / np.maximum(count, 1), np.nan)
