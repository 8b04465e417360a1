"""The figures of similarity: heat maps of every two layers, and copies of a network against it."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, GRID, INK, bare, shorten
from pipeline.stages.similarity.found import Similarity, same_layers

LINES = ("-", "--", ":", "-.")
LABELS = 24  # layers that are named beside a panel; of more, every second or third is


def over_fractions(width: float, found: Similarity) -> Figure:
    """Draw CKA of each layer with the same layer of the network that saw all images, a line for each part of them."""
    figure = Figure(figsize=(width, 2.9), layout="constrained")
    panel = figure.subplots()
    copies = found.distinct[:-1]
    for number, copy in enumerate(copies):
        value, error = same_layers(found, copy)
        x, colour = np.arange(len(value)), COLOURS[number % len(COLOURS)]
        panel.fill_between(x, value - error, value + error, color=colour, alpha=0.2, linewidth=0)
        label = f"{100 * found.fractions[copy]:.3g} % of the images"
        panel.plot(x, value, color=colour, linestyle=LINES[number % len(LINES)], marker="o", label=label)
    names = [found.layers[at] for at in found.rows_of(copies[0])]
    step = max(1, math.ceil(len(names) / (LABELS if width > 5 else LABELS // 2)))
    at = np.arange(0, len(names), step)
    panel.set_xticks(at, [shorten(names[each], 16) for each in at], rotation=90)
    panel.tick_params(axis="x", labelsize=6.5, labelcolor=INK)
    panel.set_ylim(top=1.02)
    panel.set_ylabel("CKA with all images")
    panel.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=max(1, int(width / 1.7)), handlelength=2.6)
    return figure


def heatmaps(width: float, found: Similarity, measure: str, label: str) -> Figure:
    """Draw a panel for each network with itself and for each two, layers from the input (top left) on."""
    panels = found.panels
    columns = min(len(panels), 3) if width > 5 else 1
    lines = math.ceil(len(panels) / columns)
    side = min(width / columns, 3.4)
    figure = Figure(figsize=(width, lines * side + 0.3), layout="constrained")
    lowest = min(0.0, float(np.nanmin(found.values[measure], initial=0)))
    mesh = None
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for panel, (a, b) in zip(axes, panels, strict=False):
        block = found.block(measure, a, b)
        # A cell that is not defined shows the ground.
        panel.set_facecolor(GRID)
        mesh = panel.pcolormesh(np.ma.masked_invalid(block), cmap="magma", vmin=lowest, vmax=1, linewidth=0)
        panel.set_title(shorten(a if a == b else f"{a} (down) and {b}", int(15 * width / columns)))
        panel.set_ylim(len(block), 0)
        short = int(5.5 * width / columns)
        for axis, of in ((panel.yaxis, a), (panel.xaxis, b)):
            names = [found.layers[at] for at in found.rows_of(of)]
            step = max(1, math.ceil(len(names) / LABELS))
            at = np.arange(0, len(names), step)
            axis.set_ticks(at + 0.5, [shorten(names[each], short) for each in at])
        panel.tick_params(axis="x", labelrotation=90)
        panel.tick_params(axis="both", labelsize=5.5 if max(block.shape) > 12 else 6.5, labelcolor=INK)
        bare(panel, "left", "bottom")
    for panel in axes[len(panels) :]:
        panel.set_axis_off()
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=list(axes), shrink=0.6, aspect=24, pad=0.01, label=label)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure
