"""Figures of an ablation: losses without sets of units, of single units by class, and IoU by classes served."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from kernels.ablation import RANDOM_KINDS
from pipeline.report.style import COLOURS, INK, MUTED, bare, grid_of, shorten
from pipeline.stages.ablate.found import Ablation

CLASSES = 24
"""Classes of a figure: those that depend most on single units. The tables hold all."""
LINES = {
    "remove_most": ("the most important removed", {"color": COLOURS[5], "linestyle": "-"}),
    "remove_least": ("the least important removed", {"color": COLOURS[2], "linestyle": "--"}),
    "keep_most": ("all but the most important removed", {"color": COLOURS[5], "linestyle": "-"}),
}
RANDOM = {
    "remove": "random ones removed: mean and range",
    "keep": "all but random ones removed: mean and range",
}


def curves(width: float, found: Ablation, kinds: Sequence[str]) -> Figure:
    """Loss of each class over the size of the set, a panel a class; sizes stand at equal distances."""
    shown = found.by_dependence[:CLASSES]
    control = "keep" if kinds[0].startswith("keep") else "remove"
    rows, columns = grid_of(max(len(shown), 1), width, 6)
    legend_columns = 3 if width > 5 else 1
    top = 0.35 + 0.15 * -(-(len(kinds) + bool(len(found.random_loss))) // legend_columns)  # the legend, and titles
    height = 1.05 * rows + top + 0.35
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    figure.subplots_adjust(
        left=0.55 / width, right=1 - 0.1 / width, bottom=0.44 / height, top=1 - top / height, wspace=0.12, hspace=0.42,
    )  # fmt: skip
    x = np.arange(len(found.sizes))
    for panel, c in zip(panels.flat[: len(shown)], shown, strict=True):
        if len(found.random_loss):
            drawn = found.random_loss[:, RANDOM_KINDS.index(control), :, c]
            panel.fill_between(x, drawn.min(0), drawn.max(0), color=COLOURS[7], alpha=0.3, linewidth=0)
            panel.plot(x, drawn.mean(0), color=COLOURS[7], linestyle=":", label=RANDOM[control])
        for kind in kinds:
            label, style = LINES[kind]
            panel.plot(x, found.set_loss[found.kinds.index(kind), :, c], label=label, **style)
        panel.set_title(shorten(found.classes[c], int(9.5 * width / columns)), fontsize=7.5)
        panel.grid()
    for panel in panels.flat[len(shown) :]:
        panel.set_axis_off()
    for panel in panels.flat[max(len(shown) - columns, 0) : len(shown)]:
        panel.tick_params(labelbottom=True)
    corner = panels[0, 0]
    step = max(1, round(len(x) / 5))
    corner.set_xticks(x[::step], [str(size) for size in found.sizes[::step]])
    corner.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.text(
        0.5, 0.04 / height, f"units {'kept' if control == 'keep' else 'removed'}", ha="center", va="bottom", color=MUTED
    )
    figure.text(0.04 / width, 0.5, "lost", ha="left", va="center", rotation="vertical", color=MUTED)
    handles = corner.get_lines()
    figure.legend(handles=handles, loc="upper left", ncols=legend_columns, handlelength=2.6, borderaxespad=0.2)
    return figure


def curve_rows(found: Ablation, kinds: Sequence[str]) -> Iterator[Sequence[object]]:
    """class, kind, size, loss, and random mean, low and high, of the classes of the figure."""
    control = RANDOM_KINDS.index("keep" if kinds[0].startswith("keep") else "remove")
    for c in found.by_dependence[:CLASSES]:
        for kind in kinds:
            for s, size in enumerate(found.sizes):
                drawn = found.random_loss[:, control, s, c] if len(found.random_loss) else None
                random = (drawn.mean(), drawn.min(), drawn.max()) if drawn is not None else (None,) * 3
                yield found.classes[c], kind, size, found.set_loss[found.kinds.index(kind), s, c], *random


def shown_units(found: Ablation) -> list[int]:
    """The units that any class of the figure depends on, in the order of the classes."""
    return list(dict.fromkeys(unit for c in found.by_dependence[:CLASSES] for unit in found.top(c)))


def heatmap(width: float, found: Ablation) -> Figure:
    """What each class loses by each single unit, on the split that judges: classes down, units across."""
    classes, units = found.by_dependence[:CLASSES], shown_units(found)
    loss = found.judge_loss[np.ix_(units, classes)].T
    most = max(float(np.nanmax(np.abs(loss), initial=0)), 1e-3)
    figure = Figure(figsize=(width, 0.17 * len(classes) + 0.95), layout="constrained")
    panel = figure.subplots()
    mesh = panel.pcolormesh(loss, cmap="PuOr_r", vmin=-most, vmax=most, edgecolors="face", linewidth=0.3)  # no seams
    panel.set_yticks(np.arange(len(classes)) + 0.5, [shorten(found.classes[c], 20) for c in classes])
    panel.set_ylim(len(classes), 0)
    step = max(1, -(-len(units) // max(1, int(width / 0.22))))
    panel.set_xticks(np.arange(len(units))[::step] + 0.5, [str(unit) for unit in units[::step]], rotation=90)
    panel.tick_params(axis="both", labelsize=6.5, labelcolor=INK)
    panel.set_xlabel("unit")
    bare(panel, "left")
    bar = figure.colorbar(
        mesh, ax=panel, shrink=0.8, aspect=18, pad=0.01, ticks=MaxNLocator(5), format=PercentFormatter(1.0, decimals=1)
    )
    bar.outline.set_visible(False)  # type: ignore[operator]
    return figure


def heatmap_rows(found: Ablation) -> Iterator[Sequence[object]]:
    """class, unit, and losses on both splits."""
    for c in found.by_dependence[:CLASSES]:
        for unit in shown_units(found):
            yield found.classes[c], unit, found.rank_loss[unit, c], found.judge_loss[unit, c]


def served(width: float, found: Ablation) -> Figure:
    """Mean IoU of the units that are important to a number of classes; how many these are stands above each bar."""
    groups = found.served_groups()
    figure = Figure(figsize=(width, 1.7), layout="constrained")
    panel = figure.subplots()
    for place, (_, units, iou) in enumerate(groups):
        panel.bar(place, iou, width=0.7, color=COLOURS[0], linewidth=0)
        panel.annotate(
            str(units), (place, iou), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7, color=MUTED
        )
    panel.set_xticks(range(len(groups)), [str(n) for n, _, _ in groups])
    panel.set_xlabel("classes a unit is important to")
    panel.set_ylabel("mean IoU")
    panel.margins(y=0.15)
    panel.grid(axis="y")
    return figure
