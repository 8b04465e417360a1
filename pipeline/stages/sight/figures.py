"""The figures of how a network looks at images: receptive fields, attention distances, skip connections, places."""

from __future__ import annotations

import math

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

from pipeline.report.style import GRID, INK, MUTED, RUN_COLOURS, bare, grid_of, shorten
from pipeline.stages.sight.found import Sight

MOST_FIELDS = 18  # panels of receptive fields: of more layers, evenly spaced ones
MOST_NAMES = 30  # that are written beside an axis
PALETTE = "viridis"
BAR = 0.62  # inches for a scale beside panels


def fields(width: float, found: Sight) -> Figure:
    """The receptive fields of layers, from the input on, each with its own largest value in the brightest colour."""
    layers = shown_layers(found)
    rows, columns = grid_of(len(layers), width, 6)
    image = found.settings.image_size
    figure, panels = _grid(rows, columns, width, width, image[0] / image[1], 0.32)
    side = width / columns
    for panel, layer in zip(panels, layers, strict=False):
        field = found.values["receptive_field"][layer]
        panel.imshow(field / field.max(), cmap="magma", vmin=0, vmax=1, interpolation="none")
        radius = found.values["receptive_radius"][layer]
        name = shorten(found.names("layer")[layer], int(11 * side))
        panel.set_title(f"{name}\nradius {radius:.1f} px", fontsize=6.5)
        _blank(panel)
    for panel in panels[len(layers) :]:
        panel.set_axis_off()
    return figure


def shown_layers(found: Sight) -> list[int]:
    """The first and the last layer with a receptive field, and evenly spaced ones between them."""
    reach = found.reach
    if len(reach) <= MOST_FIELDS:
        return reach
    return [reach[round(at)] for at in np.linspace(0, len(reach) - 1, MOST_FIELDS)]


def attention(width: float, found: Sight) -> Figure:
    """A line a layer: the mean distance of its heads, in the order of that distance."""
    distances = np.sort(found.values["attention_distance"], axis=1)
    figure = Figure(figsize=(width, min(3.2, 0.62 * width + 0.8)), layout="constrained")
    panel = figure.subplots()
    colours = matplotlib.colormaps[PALETTE](np.linspace(0.3, 0.85, len(distances)))
    names = found.names("attention")
    shown = range(len(names)) if len(names) <= 16 else np.linspace(0, len(names) - 1, 12).round().astype(int).tolist()
    for at, (row, colour) in enumerate(zip(distances, colours, strict=True)):
        heads = np.arange(1, np.count_nonzero(~np.isnan(row)) + 1)
        label = shorten(names[at], 34 if width > 5 else 22) if at in shown else "_"
        panel.plot(heads, row[: len(heads)], color=colour, marker="o", label=label)
    uniform = float(found.values["attention_uniform_distance"].max())
    panel.axhline(uniform, color=MUTED, linewidth=0.8, linestyle="--", label="all patches alike")
    panel.set_ylim(0, max(uniform, float(np.nanmax(distances))) * 1.12)
    panel.set_xlabel("heads of a layer, the most local first")
    panel.set_ylabel("mean distance (px)")
    panel.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    panel.grid(axis="y")
    figure.legend(loc="outside right upper" if width > 5 else "outside lower center", fontsize=7, labelcolor=INK)
    return figure


def ratios(width: float, found: Sight) -> Figure:
    """By token, where all additions are of one grid; else the means of each, with their standard errors."""
    values = found.values["skip_ratio"]
    positions = np.count_nonzero(~np.isnan(values), axis=1)
    names = found.names("skip")
    figure = Figure(figsize=(width, 0.155 * len(names) + 1.0), layout="constrained")
    panel = figure.subplots()
    if len(set(positions.tolist())) == 1 and positions[0] > 1:
        shown = np.ma.masked_invalid(values)
        norm = LogNorm(float(shown.min()), max(float(shown.max()), float(shown.min()) * 1.01))
        panel.set_facecolor(GRID)
        mesh = panel.imshow(shown, cmap=PALETTE, norm=norm, aspect="auto", interpolation="none")
        special = int(found.values["skip_special_tokens"][0])
        said = {0: "positions", 1: "tokens, the class token first"}
        panel.set_xlabel(said.get(special, f"tokens, {special} special ones first"))
        bar = figure.colorbar(mesh, ax=panel, pad=0.01, label="‖z‖ / ‖f(z)‖", shrink=0.8)
        _plain_numbers(bar.ax.yaxis)
        bar.outline.set_visible(False)  # type: ignore[operator]
        bare(panel, "left", "bottom")
    else:
        rows = np.arange(len(names))
        parts = (("spatial", RUN_COLOURS["trained"], "o"), ("special", RUN_COLOURS["untrained"], "s"))
        for part, colour, marker in parts:
            mean, error = (found.values[f"skip_ratio_{part}{end}"] for end in ("", "_standard_error"))
            if not np.isnan(mean).all():
                panel.errorbar(mean, rows, xerr=error, color=colour, marker=marker, linestyle="", linewidth=0.8)
        panel.set_xscale("log")
        _plain_numbers(panel.xaxis)
        panel.set_xlabel("‖z‖ / ‖f(z)‖")
        panel.grid(axis="x")
        panel.set_ylim(len(names) - 0.5, -0.5)
        bare(panel, "left")
    _names(panel, names, width)
    return figure


def removed(width: float, found: Sight) -> Figure:
    """What the network loses without each skip, and how its layers change."""
    names, layers = found.names("skip"), found.names("layer")
    loss, error = (found.values[f"accuracy_loss{end}"] for end in ("", "_standard_error"))
    known = not np.isnan(loss).all()
    height = 0.155 * len(names) + 1.5
    figure = Figure(figsize=(width, height), layout="constrained")
    shares = [1, 1.4] if known else [1]
    panels = figure.subplots(1, len(shares), sharey=True, squeeze=False, width_ratios=shares)[0]
    if known:
        rows = np.arange(len(names))
        panels[0].barh(rows, loss, xerr=error, height=0.7, color=RUN_COLOURS["trained"], error_kw={"linewidth": 0.7})
        panels[0].xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0].xaxis.set_major_locator(MaxNLocator(3))
        panels[0].set_title("accuracy lost")
        panels[0].grid(axis="x")
        bare(panels[0], "left")
    panel = panels[-1]
    cka = np.ma.masked_invalid(found.values["cka_without_skip"])
    panel.set_facecolor(GRID)
    mesh = panel.imshow(
        cka, cmap="magma", norm=Normalize(min(0.0, float(cka.min())), 1), aspect="auto", interpolation="none"
    )
    panel.set_title("CKA of each layer with itself")
    step = max(1, math.ceil(len(layers) / (16 if width > 5 else 8)))
    at = np.arange(0, len(layers), step)
    panel.set_xticks(at, [shorten(layers[each], 16) for each in at], rotation=90, fontsize=6)
    bar = figure.colorbar(mesh, ax=panel, pad=0.01, shrink=0.8)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bare(panel, "left", "bottom")
    _names(panels[0], names, width if width > 5 else 0.7 * width)
    return figure


def places(width: float, found: Sight) -> Figure:
    """Maps of CKA with every patch, a panel for each output shown; a ring where the output itself is."""
    outputs = shown_outputs(found)
    height, wide = found.grid
    cka = found.values["localisation"]
    rows, columns = grid_of(len(outputs), width, 5)
    figure, panels = _grid(rows, columns, width, width - BAR, height / wide, 0.2)
    norm = Normalize(min(0.0, float(np.nanmin(cka))), float(np.nanmax(cka)))
    mesh = None
    for panel, output in zip(panels, outputs, strict=False):
        panel.set_facecolor(GRID)
        shown = np.ma.masked_invalid(cka[output].reshape(height, wide))
        mesh = panel.imshow(shown, cmap="magma", norm=norm, interpolation="none")
        y, x = (int(found.values[f"output_{axis}"][output]) for axis in "yx")
        panel.set_title(f"row {y}, column {x}" if y >= 0 else "class token", fontsize=6.5)
        if y >= 0:
            panel.plot(x, y, marker="o", markersize=7, markerfacecolor="none", markeredgecolor="#56B4E9")
        _blank(panel)
    for panel in panels[len(outputs) :]:
        panel.set_axis_off()
    assert mesh is not None
    tall = figure.get_figheight()
    beside = figure.add_axes((1 - 0.92 * BAR / width, 0.1, 0.1 / width, 0.9 - 0.25 / tall))
    beside.set_title("CKA", fontsize=6.5)  # beside the numbers it would be cut off
    bar = figure.colorbar(mesh, cax=beside)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def shown_outputs(found: Sight) -> list[int]:
    """The first special token, and positions at the corners, on the edges and in the middle."""
    height, width = found.grid
    special = found.settings.localised_special_tokens or 0
    lines = [dict.fromkeys((0, side // 2, side - 1)) for side in (height, width)]
    return [*range(min(special, 1)), *(special + y * width + x for y in lines[0] for x in lines[1])]


def _grid(
    rows: int, columns: int, width: float, used: float, proportion: float, title: float
) -> tuple[Figure, np.ndarray]:
    """A figure of panels of one proportion (height to width) below titles, in inches; `used` of the width are theirs.

    By hand: matplotlib's own layout takes as long as all the drawing.
    """
    gap = 0.06
    side = (used - gap * (columns + 1)) / columns
    row = side * proportion + title + gap
    height = rows * row
    figure = Figure(figsize=(width, height))
    panels = [
        figure.add_axes(
            (
                (gap + (side + gap) * (at % columns)) / width,
                1 - ((at // columns + 1) * row - gap / 2) / height,
                side / width,
                side * proportion / height,
            )
        )
        for at in range(rows * columns)
    ]
    return figure, np.array(panels)


def _plain_numbers(axis: Axis) -> None:
    """0.5, 1, 2, 3 on a logarithmic axis, where matplotlib would write powers."""
    axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _names(panel: Axes, names: list[str], width: float) -> None:
    step = max(1, math.ceil(len(names) / MOST_NAMES))
    at = range(0, len(names), step)
    panel.set_yticks(at, [shorten(names[each], int(5.5 * width)) for each in at], fontsize=6.5)
    panel.tick_params(axis="y", labelcolor=INK)


def _blank(panel: Axes) -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_visible(False)
