"""Figures of a dissected network: detectors by layer, concepts, IoU, training. Each is drawn at a given width."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.style import (
    GRID,
    INK,
    MUTED,
    RUN_COLOURS,
    RUN_STYLES,
    RUN_TITLES,
    bare,
    colour_style,
    grid_of,
    shorten,
)
from pipeline.stages.dissect.counting import ConceptCount, LayerCount, categories


def detectors(width: float, runs: Mapping[str, Sequence[LayerCount]], short: Mapping[str, str]) -> Figure:
    """Draw detectors per layer, stacked by category: one panel per run, first layer on top.

    `short`: category -> label.
    """
    names = categories(count for counts in runs.values() for count in counts)
    layers = [count.layer for count in next(iter(runs.values()))]
    rows, columns = (1, len(runs)) if width > 5 else (len(runs), 1)
    legend_rows = math.ceil(len(names) / _legend_columns(width)) if names else 0
    height = rows * (0.2 * len(layers) + 0.36) + 0.3 + 0.2 * legend_rows
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    most = max((count.detectors for counts in runs.values() for count in counts), default=0)
    for panel, (run, counts) in zip(panels, runs.items(), strict=True):
        _stack(panel, counts, names)
        panel.set_title(RUN_TITLES[run])
        panel.set_xlim(0, max(most, 1) * (1.4 if columns > 1 else 1.2))  # room for "12/64" beside the longest bar
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(layers)), [shorten(layer, 24) for layer in layers])
    panels[0].set_ylim(len(layers) - 0.4, -0.6)
    figure.supxlabel("detectors (units)", fontsize=8, color=MUTED)
    _legend(figure, [short[name] for name in names], width)
    return figure


def concepts(width: float, counts: Sequence[ConceptCount], short: Mapping[str, str], most: int = 36) -> Figure:
    """Draw units per concept, at most `most` concepts: full colour for the last layer, pale for earlier ones."""
    shown = list(counts[:most])
    names = sorted({count.category for count in counts})
    columns = 1 if width <= 5 or len(shown) <= 8 else 2
    rows = max(math.ceil(len(shown) / columns), 1)
    legend_rows = math.ceil(len(names) / _legend_columns(width)) if names else 0
    figure = Figure(figsize=(width, 0.165 * rows + 0.5 + 0.2 * legend_rows), layout="constrained")
    panels = figure.subplots(1, columns, sharex=True, squeeze=False)[0]
    for number, panel in enumerate(panels):
        part = shown[number * rows : (number + 1) * rows]
        for row, count in enumerate(part):
            style = colour_style(names.index(count.category))
            panel.barh(row, count.last, height=0.72, linewidth=0, **style)
            panel.barh(row, count.units - count.last, left=count.last, height=0.72, linewidth=0, alpha=0.35, **style)
        panel.set_yticks(range(len(part)), [shorten(count.concept, 28) for count in part])
        panel.set_ylim(rows - 0.4, -0.6)
        panel.tick_params(axis="y", labelcolor=INK)
        panel.grid(axis="x")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        bare(panel, "left")
    figure.supxlabel("units", fontsize=8, color=MUTED)
    _legend(figure, [short[name] for name in names], width)
    return figure


def iou(width: float, values: Mapping[str, Mapping[str, Sequence[float]]], min_iou: float) -> Figure:
    """Draw the share of a layer's units with an IoU above x: one panel per layer, one line per run.

    `values`: run -> layer -> IoU.
    """
    layers = list(next(iter(values.values())))
    right = upper_end(values, min_iou)
    grid = np.linspace(0, right, 201)
    rows, columns = grid_of(len(layers), width, 6 if len(layers) > 8 else 4)
    # Laid out by hand, in inches: matplotlib's own layout takes seconds with forty panels.
    height = 1.05 * rows + 0.66
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.62 / width, right=1 - 0.1 / width, bottom=0.44 / height, top=1 - 0.45 / height, wspace=0.12, hspace=0.42,
    )  # fmt: skip
    x_ticks = np.asarray(MaxNLocator(3).tick_values(0, right))
    for panel, layer in zip(panels.flat, layers, strict=False):
        for run, of_layer in values.items():
            share = share_above(of_layer[layer], grid)
            end = np.count_nonzero(share) + 1  # a line ends where it reaches zero
            panel.plot(grid[:end], share[:end], color=RUN_COLOURS[run], **RUN_STYLES[run])
        panel.axvline(min_iou, color=MUTED, linewidth=0.7)
        panel.set_title(shorten(layer, int(9.5 * width / columns)), fontsize=7.5)
        panel.grid()
    for panel in panels.flat[len(layers) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(len(layers) - columns, 0) : len(layers)]:
        panel.tick_params(labelbottom=True)  # the lowest of its column, also above an empty cell
    corner = panels[0, 0]
    corner.set_xticks(x_ticks, [f"{tick:g}" for tick in x_ticks.round(6)])
    corner.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
    corner.set_xlim(0, right)
    corner.set_ylim(0, 1.03)
    figure.text(0.5, 0.04 / height, "IoU with the best concept", ha="center", va="bottom", color=MUTED)
    figure.text(0.04 / width, 0.5, "units above", ha="left", va="center", rotation="vertical", color=MUTED)
    figure.legend(
        corner.get_lines()[: len(values)], [RUN_TITLES[run] for run in values], loc="upper left", ncols=3,
        handlelength=2.6, borderaxespad=0.2,
    )  # fmt: skip
    return figure


def training(width: float, curve: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw loss and accuracy over the training steps; a line skips entries without its value."""
    rows, columns = (1, 2) if width > 5 else (2, 1)
    figure = Figure(figsize=(width, 1.5 * rows), layout="constrained")
    for panel, key in zip(figure.subplots(rows, columns).ravel(), ("loss", "accuracy"), strict=True):
        points = [(entry["step"], entry[key]) for entry in curve if entry.get(key) is not None]
        panel.plot(
            [step for step, _ in points], [value for _, value in points], color=RUN_COLOURS["trained"],
            marker="o" if len(points) < 3 else "",
        )  # fmt: skip
        panel.set_title(key)
        panel.set_xlabel("step")
        panel.grid()
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        if key == "accuracy":
            panel.set_ylim(0, 1)
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        else:
            panel.set_ylim(bottom=0)
    return figure


def upper_end(values: Mapping[str, Mapping[str, Sequence[float]]], min_iou: float) -> float:
    """Return the upper end of the IoU axis: a little above the highest value."""
    every = (value for layers in values.values() for of_layer in layers.values() for value in of_layer)
    return max([*(value for value in every if value == value), min_iou, 0.01]) * 1.05


def share_above(values: Sequence[float], grid: np.ndarray) -> np.ndarray:
    """Return the share of `values` above each point of `grid`; NaN (no IoU) exceeds nothing. No values: zeros."""
    ordered = np.sort(np.asarray([value for value in values if value == value], dtype=np.float64))
    above = len(ordered) - np.searchsorted(ordered, grid, side="right")
    return above / max(len(values), 1)


def _stack(panel: Axes, counts: Sequence[LayerCount], names: Sequence[str]) -> None:
    rows = np.arange(len(counts))
    left = np.zeros(len(counts))
    for position, name in enumerate(names):
        width = np.array([count.by_category.get(name, (0, 0))[0] for count in counts], dtype=float)
        some = width > 0
        style = colour_style(position)
        panel.barh(
            rows[some], width[some], left=left[some], height=0.72, edgecolor=GRID if style["hatch"] else "none", **style
        )
        left += width
    for row, count in enumerate(counts):
        panel.annotate(
            f"{count.detectors}/{count.units}", (count.detectors, row), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=7, color=MUTED,
        )  # fmt: skip
    panel.tick_params(axis="y", labelcolor=INK)
    bare(panel, "left")


def _legend_columns(width: float) -> int:
    return 6 if width > 5 else 3


def _legend(figure: Figure, labels: Sequence[str], width: float) -> None:
    if not labels:
        return
    handles = [Patch(**colour_style(position)) for position in range(len(labels))]
    # Labels are set afterwards: matplotlib drops those that start with an underscore, and these come from data.
    legend = figure.legend(
        handles, [str(position) for position in range(len(labels))], loc="outside upper left",
        ncols=min(len(labels), _legend_columns(width)), labelcolor=INK,
    )  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(shorten(label, 28 if width > 5 else 16))
