"""Figures of attributions: chosen images with all their maps, residuals of laws, and how alike maps are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from pipeline.report.style import GRID, INK, MUTED, RUN_COLOURS, bare, shorten
from pipeline.stages.attribute.pictures import AGAINST, FOR, MUCH

Shown = tuple[np.ndarray, np.ndarray]
"""A picture (y, x, colour) uint8, and its maps (method, y, x) from -1 to 1."""
LETTER = 0.075
"""Inches of a letter in a column of names, generously."""
GAP, FRAME = 4, (128, 128, 128, 110)
"""Pixels around a cell, and the colour of the line around it."""
ALIKE = LinearSegmentedColormap.from_list(
    "alike", [tuple(each / 255 for each in colour) for colour in (AGAINST, (255, 255, 255), FOR)]
)


def coloured(values: np.ndarray, signed: bool) -> np.ndarray:
    """Return a map (y, x) from -1 to 1 as RGBA uint8: no value is transparent, so it has the ground's colour."""
    strength = np.nan_to_num(np.abs(values))[..., None]
    full = np.where(values[..., None] < 0, AGAINST, FOR) if signed else np.broadcast_to(MUCH, (*values.shape, 3))
    return np.concatenate([full, np.rint(255 * strength)], -1).astype(np.uint8)


def grid(
    width: float, shown: Sequence[Shown], names: Sequence[str], titles: Sequence[str], signed: Sequence[bool]
) -> Figure:
    """Draw chosen images with all their maps: an image a line where that fits, else an image a column.

    `names` are those of the images, on two lines. In columns, there are as many images as the width takes.
    """
    lines = [[_opaque(picture), *map(coloured, maps, signed)] for picture, maps in shown]
    across = width - 0.9 >= 0.35 * (len(titles) + 1)
    if across:
        rows, columns, left = list(names), ["image", *(shorten(title, 34) for title in titles)], 0.9
        top = 0.057 * max(map(len, columns)) + 0.1
    else:
        left, top = min(LETTER * max(5, *map(len, titles)) + 0.1, 0.4 * width), 0.35
        lines = lines[: max(1, min(len(lines), int((width - left) / 0.6)))]
        rows, columns = ["image", *titles], list(names[: len(lines)])
        lines = [list(line) for line in zip(*lines, strict=True)]
    cells = _composed(lines)
    used = min(width - left, 1.1 * len(columns))
    tall = used * cells.shape[0] / cells.shape[1]
    figure = Figure(figsize=(width, tall + top))
    panel = figure.add_axes((left / width, 0, used / width, tall / (tall + top)))
    panel.imshow(cells, interpolation="none", aspect="auto")
    panel.set_axis_off()
    for at, name in enumerate(rows):
        place = (1 - (at + 0.5) / len(rows)) * tall / (tall + top)
        text = "\n".join(shorten(line, int(left / 0.062)) for line in name.split("\n"))
        figure.text((left - 0.06) / width, place, text, ha="right", va="center", fontsize=6.5)
    for at, name in enumerate(columns):
        place = (left + (at + (0.5 if across else 0.03)) / len(columns) * used) / width
        letters = 34 if across else int(used / len(columns) / 0.062)
        text = "\n".join(shorten(line, letters) for line in name.split("\n"))
        turned: dict[str, Any] = {"rotation": 90, "ha": "center"} if across else {"ha": "left"}
        figure.text(place, (tall + 0.05) / (tall + top), text, va="bottom", fontsize=6.5, **turned)
    return figure


def _opaque(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture, np.full((*picture.shape[:2], 1), 255, np.uint8)], -1)


def _composed(lines: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Put cells (y, x, RGBA) of one size into one picture, each in a thin frame with a gap around it."""
    height, width = lines[0][0].shape[:2]
    whole = np.zeros((len(lines), height + 2 * GAP, len(lines[0]), width + 2 * GAP, 4), np.uint8)
    frame = slice(GAP - 1, height + GAP + 1), slice(GAP - 1, width + GAP + 1)
    for row, line in enumerate(lines):
        for column, cell in enumerate(line):
            own = whole[row, :, column]
            own[frame] = FRAME
            own[GAP:-GAP, GAP:-GAP] = cell
    return whole.reshape(len(lines) * (height + 2 * GAP), len(lines[0]) * (width + 2 * GAP), 4)


def residuals(width: float, found: Mapping[str, tuple[np.ndarray, float]]) -> Figure:
    """Draw each explanation's residual, by method, with the tolerance as a line; `found` is (residuals, tolerance)."""
    figure = Figure(figsize=(width, 0.42 * len(found) + 0.6), layout="constrained")
    panel = figure.subplots()
    least = min((float(values[values > 0].min()) for values, _ in found.values() if (values > 0).any()), default=1e-8)
    for at, (values, tolerance) in enumerate(found.values()):
        # Points of one method lie on a ramp of fixed heights, so that equal residuals can be counted.
        height = at + 0.3 * (np.modf(np.arange(len(values)) * 0.6180339887)[0] * 2 - 1)
        for part, colour, marker in (
            (values <= tolerance, RUN_COLOURS["trained"], "o"),
            (values > tolerance, RUN_COLOURS["untrained"], "X"),
        ):
            panel.plot(np.maximum(values[part], least / 2), height[part], marker, color=colour, ms=3, mew=0, alpha=0.7)
        panel.plot([tolerance] * 2, [at - 0.42, at + 0.42], color=INK, linewidth=1.2)
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(numticks=9 if width > 5 else 5))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("residual of the law")
    panel.set_ylim(len(found) - 0.5, -0.5)
    panel.grid(axis="x")
    _names(panel.set_yticks, list(found), width)
    bare(panel, "left")
    return figure


def alike(width: float, mean: np.ndarray, titles: Sequence[str]) -> Figure:
    """Draw the mean rank correlation of the maps of each two methods."""
    count, names = len(titles), [shorten(title, int(0.34 * width / 0.057)) for title in titles]
    left = 0.057 * max(map(len, names)) + 0.15
    side = min((width - left - 0.8) / count, 0.42)
    square, height = side * count, side * count + left + 0.15
    figure = Figure(figsize=(width, height))
    panel = figure.add_axes((left / width, (left + 0.1) / height, square / width, square / height))
    panel.set_facecolor(GRID)
    mesh = panel.imshow(np.ma.masked_invalid(mean), cmap=ALIKE, norm=Normalize(-1, 1), interpolation="none")
    if side > 0.3:
        for row, column in np.ndindex(mean.shape):
            if row != column and not np.isnan(mean[row, column]):
                ink = "#ffffff" if abs(mean[row, column]) > 0.6 else "#1b1f23"
                text = f"{mean[row, column]:.2f}".replace("0.", ".")
                panel.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    beside = figure.add_axes(
        ((left + square + 0.1) / width, (left + 0.2 * square) / height, 0.1 / width, 0.6 * square / height)
    )
    bar = figure.colorbar(mesh, cax=beside, label="rank correlation")
    bar.outline.set_visible(False)  # type: ignore[operator]
    panel.set_yticks(range(count), names, fontsize=7, color=INK)
    panel.set_xticks(range(count), names, fontsize=7, color=INK, rotation=90)
    bare(panel, "left", "bottom")
    return figure


def untrained(width: float, mean: np.ndarray, error: np.ndarray, titles: Sequence[str]) -> Figure:
    """Draw how alike each method's maps of the trained and of the untrained network are, with 95 % intervals."""
    rows = np.arange(len(titles))
    figure = Figure(figsize=(width, 0.19 * len(titles) + 0.6), layout="constrained")
    panel = figure.subplots()
    bars = np.nan_to_num(error)
    panel.errorbar(mean, rows, xerr=bars, color=RUN_COLOURS["trained"], marker="o", linestyle="", linewidth=1)
    panel.axvline(0, color=MUTED, linewidth=0.8)
    low, high = np.nanmin(mean - bars, initial=0.0), np.nanmax(mean + bars, initial=0.0)
    panel.set_xlim(min(-0.05, low - 0.05), max(high + 0.05, 0.5))
    panel.set_xlabel("rank correlation, trained with untrained")
    panel.set_ylim(len(titles) - 0.5, -0.5)
    panel.grid(axis="x")
    _names(panel.set_yticks, list(titles), width)
    bare(panel, "left")
    return figure


def _names(place: Any, names: Sequence[str], width: float, **text: Any) -> None:
    letters = int(0.35 * width / LETTER) if width > 5 else int(0.4 * width / LETTER)
    place(range(len(names)), [shorten(name, letters) for name in names], fontsize=7, color=INK, **text)
