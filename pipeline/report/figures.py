"""The report's figures. The same numbers give the same bytes: no dates, fixed ids, text as outlines of a bundled font.

Every figure is written three times: `<name>.svg` and `<name>-dark.svg` with transparent ground for the page,
`<name>.pdf` for a paper. Colours are those of Okabe and Ito, told apart with every common colour blindness.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.counts import LayerCount, categories

CATEGORY_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A800", "#8A8F98")
HATCHES = ("", "////", "....", "xxxx")
RUN_STYLES: dict[str, dict[str, Any]] = {
    "trained": {"linestyle": "-", "linewidth": 1.8},
    "untrained": {"linestyle": "--", "linewidth": 1.3},
    "permuted": {"linestyle": ":", "linewidth": 1.5},
}
RUN_TITLES = {"trained": "trained", "untrained": "untrained", "permuted": "labels permuted"}


INK, MUTED, GRID = "#1c2024", "#5b6470", "#d9dde2"
RUN_COLOURS = {"trained": "#0a6fb0", "untrained": "#c25400", "permuted": "#6b7280"}
ON_DARK = {
    INK: "#e8eaed",
    MUTED: "#a3abb5",
    GRID: "#3a4048",
    RUN_COLOURS["trained"]: "#56b4e9",
    RUN_COLOURS["untrained"]: "#f0a04b",
    RUN_COLOURS["permuted"]: "#a3abb6",
}
"""What replaces the colours of text and lines on a dark ground; as matplotlib writes them, in lower case. The colours
of categories stay."""
SETTINGS: Any = {
    "svg.hashsalt": "microtome",
    "svg.fonttype": "path",
    "pdf.fonttype": 42,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,
    "hatch.linewidth": 0.6,
}


def draw_detectors(
    folder: Path, name: str, runs: Mapping[str, Sequence[LayerCount]], short: Mapping[str, str]
) -> list[str]:
    """Detectors per layer, stacked by category; one panel a run, the first layer on top. `short`: category -> label."""
    names = categories(count for counts in runs.values() for count in counts)
    layers = [count.layer for count in next(iter(runs.values()))]

    def draw() -> Figure:
        height = 0.26 * len(layers) + 1.15
        figure = Figure(figsize=(1.9 + 1.8 * len(runs), height), layout="constrained")
        panels = figure.subplots(1, len(runs), sharex=True, sharey=True, squeeze=False)[0]
        most = max((count.detectors for counts in runs.values() for count in counts), default=0)
        for panel, (run, counts) in zip(panels, runs.items(), strict=True):
            _stack(panel, counts, names)
            panel.set_title(RUN_TITLES[run], fontsize=9, color=INK, loc="left")
            panel.set_xlim(0, max(most, 1) * 1.45)  # room for the "12/64" at the longest bar's end
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            panel.grid(axis="x", color=GRID, linewidth=0.6)
        panels[0].set_yticks(range(len(layers)), [shorten(layer, 30) for layer in layers])
        panels[0].set_ylim(len(layers) - 0.4, -0.6)
        figure.supxlabel("detectors (units)", fontsize=8, color=MUTED)
        _legend(figure, [short[name] for name in names])
        return figure

    return _save(folder, name, draw)


def draw_iou(folder: Path, name: str, iou: Mapping[str, Mapping[str, Sequence[float]]], min_iou: float) -> list[str]:
    """Share of a layer's units with an IoU above x, a panel a layer, a line a run. `iou`: run -> layer -> values."""
    layers = list(next(iter(iou.values())))
    finite = [value for of_layer in iou.values() for values in of_layer.values() for value in values if value == value]
    right = max([*finite, min_iou, 0.01]) * 1.05
    grid = np.linspace(0, right, 201)
    columns = min(len(layers), 3 if len(layers) <= 9 else 5)
    rows = math.ceil(len(layers) / columns)

    def draw() -> Figure:
        # Laid out in inches by hand: matplotlib's own layout takes seconds with forty panels.
        width, height = max(7.4, 1.5 * columns) if columns > 2 else 0.8 + 2.2 * columns, 1.35 * rows + 0.95
        figure = Figure(figsize=(width, height))
        panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        figure.subplots_adjust(
            left=0.68 / width, right=1 - 0.12 / width, bottom=0.5 / height, top=1 - 0.55 / height,
            wspace=0.12, hspace=0.38,
        )  # fmt: skip
        x_ticks = np.asarray(MaxNLocator(3).tick_values(0, right))
        for panel, layer in zip(panels.flat, layers, strict=False):
            for run, of_layer in iou.items():
                share = share_above(of_layer[layer], grid)
                end = np.count_nonzero(share) + 1  # a line ends where it reaches zero
                panel.plot(grid[:end], share[:end], color=RUN_COLOURS[run], **RUN_STYLES[run])
            panel.axvline(min_iou, color=MUTED, linewidth=0.8)
            panel.set_title(shorten(layer, 24 if columns < 4 else 18), fontsize=8, color=INK, loc="left")
            panel.grid(color=GRID, linewidth=0.6)
            _plain(panel)
        for panel in panels.flat[len(layers) :]:
            panel.set_axis_off()
        for panel in panels.flat[max(len(layers) - columns, 0) : len(layers)]:
            panel.tick_params(labelbottom=True)  # the lowest of its column, also above an empty place
        corner = panels[0, 0]
        corner.set_xticks(x_ticks, [f"{tick:g}" for tick in x_ticks.round(6)])
        corner.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        corner.set_xlim(0, right)
        corner.set_ylim(0, 1.03)
        style: dict[str, Any] = {"fontsize": 8, "color": MUTED}
        figure.text(0.5, 0.08 / height, "IoU with the best concept", ha="center", va="bottom", **style)
        figure.text(0.06 / width, 0.5, "units above", ha="left", va="center", rotation="vertical", **style)
        figure.legend(
            corner.get_lines()[: len(iou)], [RUN_TITLES[run] for run in iou], loc="upper left", ncols=3, frameon=False,
            fontsize=8, labelcolor=INK, handlelength=2.8, borderaxespad=0.2,
        )  # fmt: skip
        return figure

    return _save(folder, name, draw)


def draw_training(folder: Path, name: str, curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """Loss and accuracy over the training steps; entries without one of the two are left out of its line."""

    def draw() -> Figure:
        figure = Figure(figsize=(6.2, 1.9), layout="constrained")
        for panel, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
            points = [(entry["step"], entry[key]) for entry in curve if entry.get(key) is not None]
            panel.plot(
                [step for step, _ in points], [value for _, value in points], color=RUN_COLOURS["trained"],
                linewidth=1.5, marker="o" if len(points) < 3 else "", markersize=3,
            )  # fmt: skip
            panel.set_title(key, fontsize=9, color=INK, loc="left")
            panel.set_xlabel("step", fontsize=8, color=MUTED)
            panel.grid(color=GRID, linewidth=0.6)
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            panel.yaxis.set_major_locator(MaxNLocator(4))
            if key == "accuracy":
                panel.set_ylim(0, 1)
                panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            else:
                panel.set_ylim(bottom=0)
            _plain(panel)
        return figure

    return _save(folder, name, draw)


def share_above(values: Sequence[float], grid: np.ndarray) -> np.ndarray:
    """Share of `values` that exceed each point of `grid`; NaN (no IoU) exceeds nothing. Zeros for no values."""
    ordered = np.sort(np.asarray([value for value in values if value == value], dtype=np.float64))
    above = len(ordered) - np.searchsorted(ordered, grid, side="right")
    return above / max(len(values), 1)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, cut in the middle: the ends tell layers apart."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"


def category_style(position: int) -> dict[str, Any]:
    """Colour of the category at this position, with a hatch once the eight colours are used up."""
    turn, colour = divmod(position, len(CATEGORY_COLOURS))
    return {"facecolor": CATEGORY_COLOURS[colour], "hatch": HATCHES[turn % len(HATCHES)]}


def _stack(panel: Axes, counts: Sequence[LayerCount], names: Sequence[str]) -> None:
    rows = np.arange(len(counts))
    left = np.zeros(len(counts))
    for position, name in enumerate(names):
        width = np.array([count.by_category.get(name, (0, 0))[0] for count in counts], dtype=float)
        some = width > 0
        style = category_style(position)
        panel.barh(
            rows[some], width[some], left=left[some], height=0.72, edgecolor=GRID if style["hatch"] else "none", **style
        )
        left += width
    for row, count in enumerate(counts):
        panel.annotate(
            f"{count.detectors}/{count.units}", (count.detectors, row), xytext=(3, 0), textcoords="offset points",
            va="center", fontsize=7, color=MUTED,
        )  # fmt: skip
    _plain(panel)
    panel.tick_params(axis="y", length=0, labelcolor=INK)


def _plain(panel: Axes) -> None:
    panel.set_facecolor("none")
    panel.set_axisbelow(True)
    panel.tick_params(colors=MUTED, labelsize=7.5)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)


def _legend(figure: Figure, labels: Sequence[str]) -> None:
    if not labels:
        return
    handles = [Patch(**category_style(position)) for position in range(len(labels))]
    # Labels are set afterwards: matplotlib drops those that start with an underscore, and these come from data.
    legend = figure.legend(
        handles, [str(position) for position in range(len(labels))], loc="outside upper left",
        ncols=min(len(labels), 4), frameon=False, fontsize=8, labelcolor=INK, handlelength=1.1, handleheight=1.1,
    )  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(shorten(label, 28))


def _save(folder: Path, name: str, figure: Callable[[], Figure]) -> list[str]:
    files = [f"{name}.svg", f"{name}-dark.svg", f"{name}.pdf"]
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # A category in a script that the bundled font lacks shows as boxes in figures; the page itself spells it out.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        drawn = figure()
        drawn.savefig(folder / files[0], metadata={"Date": None}, transparent=True)
        drawn.set_layout_engine("none")  # where matplotlib made a layout, once is enough
        drawn.savefig(folder / files[2], metadata={"CreationDate": None})
    svg = (folder / files[0]).read_text(encoding="utf-8")
    for light, dark in ON_DARK.items():
        svg = svg.replace(light, dark)
    (folder / files[1]).write_text(svg, encoding="utf-8")
    return files
