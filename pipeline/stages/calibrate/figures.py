"""Figures of a calibration: reliability diagrams, the methods over the splits, and errors over networks."""

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from pipeline.report.style import COLOURS, INK, MUTED, shorten
from pipeline.stages.calibrate.found import FACTORS, FACTS, Calibration, Diagram, Point, varying

TITLES = {
    "uncalibrated": "as it is",
    "histogram": "histogram binning",
    "isotonic": "isotonic",
    "bbq": "BBQ",
    "temperature": "temperature",
    "vector": "vector",
    "matrix": "matrix",
    "histogram_mass": "histogram, equal mass",
    "histogram_top": "histogram, top label",
    "histogram_mass_top": "histogram, equal mass, top label",
    "isotonic_top": "isotonic, top label",
    "bbq_top": "BBQ, top label",
    "matrix_odir": "matrix, regularised",
}
"""The methods, in the order of Guo et al.'s table, then the others."""


def shown(found: Calibration) -> list[str]:
    return [name for name in TITLES if name in found.rows]


def panels(found: Calibration) -> list[tuple[str, Diagram]]:
    """The reliability diagrams that are drawn."""
    drawn = [("as it is, all images", found.all), ("as it is, test images", found.test["uncalibrated"])]
    return [*drawn, *((TITLES[name], found.test[name]) for name in ("temperature",) if name in found.test)]


def reliability(width: float, found: Calibration) -> Figure:
    """Accuracy over confidence, by bin; the share of images below."""
    diagrams = panels(found)
    columns = max(1, min(len(diagrams), int(width / 1.7)))
    rows = -(-len(diagrams) // columns)
    figure = Figure(figsize=(width, 2.6 * rows), layout="constrained")
    grid = figure.subplots(
        2 * rows, columns, squeeze=False, sharex=True, gridspec_kw={"height_ratios": [3.2, 1] * rows}
    )
    for at in range(rows * columns):
        row, column = divmod(at, columns)
        upper, lower = grid[2 * row, column], grid[2 * row + 1, column]
        if at >= len(diagrams):
            upper.set_axis_off()
            lower.set_axis_off()
            continue
        title, diagram = diagrams[at]
        _bars(upper, lower, diagram)
        upper.set_title(title)
        if column == 0:
            upper.set_ylabel("accuracy")
            lower.set_ylabel("images")
        if at + columns >= len(diagrams):
            lower.set_xlabel("confidence")
            lower.tick_params(labelbottom=True)
    return figure


def _bars(upper: Axes, lower: Axes, diagram: Diagram) -> None:
    bins = len(diagram.count)
    held = np.flatnonzero(diagram.count)
    middle, wide = (held + 0.5) / bins, 0.92 / bins
    accuracy = diagram.correct[held] / diagram.count[held]
    confidence = diagram.confidence[held] / diagram.count[held]
    below = np.minimum(accuracy, confidence)
    upper.bar(middle, below, wide, color=COLOURS[0], linewidth=0)
    gap = [COLOURS[4] if above else COLOURS[1] for above in accuracy > confidence]
    upper.bar(middle, np.abs(accuracy - confidence), wide, bottom=below, color=gap, linewidth=0)
    upper.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle="--")
    upper.set(xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    for axis in (upper.yaxis, upper.xaxis, lower.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.bar(middle, diagram.count[held] / diagram.count.sum(), wide, color=COLOURS[7], linewidth=0)
    lower.yaxis.set_major_locator(MaxNLocator(2))


def reliability_rows(found: Calibration) -> Iterator[Sequence[object]]:
    for title, diagram in panels(found):
        bins = len(diagram.count)
        for m, (count, correct, confidence) in enumerate(
            zip(diagram.count, diagram.correct, diagram.confidence, strict=True)
        ):
            shares = (correct / count, confidence / count) if count else (None, None)
            yield title, m / bins, (m + 1) / bins, int(count), *shares


def methods(width: float, found: Calibration) -> Figure:
    """ECE and NLL of every method: mean over the splits, and the range of 95 % of them."""
    names = shown(found)
    side_by_side = width > 5
    figure = Figure(figsize=(width, (0.19 * len(names) + 0.6) * (1 if side_by_side else 2)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True) if side_by_side else figure.subplots(2, 1)
    y = np.arange(len(names))
    for panel, measure in zip(axes, ("ece", "nll"), strict=True):
        mean = np.array([found.rows[name][measure] for name in names])
        low = np.array([found.rows[name][f"{measure}_2.5"] for name in names])
        high = np.array([found.rows[name][f"{measure}_97.5"] for name in names])
        panel.hlines(y, low, high, color=COLOURS[0], linewidth=1.6)
        panel.plot(mean, y, linestyle="none", marker="o", markersize=4, color=COLOURS[0])
        panel.set_yticks(y, [shorten(TITLES[name], 30) for name in names])
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(left=0)
        panel.tick_params(axis="y", labelcolor=INK)
        panel.grid(axis="x")
        if measure == "ece":
            band = [found.rows[name]["ece_null_high"] for name in names]
            panel.barh(y, band, height=1.0, color=COLOURS[7], alpha=0.2, linewidth=0)
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
            panel.xaxis.set_major_locator(MaxNLocator(5))
            panel.set_xlabel("ECE; grey: " + ("what a calibrated network shows" if side_by_side else "if calibrated"))
        else:
            panel.set_xlabel("NLL")
    return figure


def method_rows(found: Calibration) -> Iterator[Sequence[object]]:
    for name in shown(found):
        row = found.rows[name]
        ranges = (row[f"{measure}{end}"] for measure in ("ece", "nll") for end in ("", "_2.5", "_97.5"))
        yield name, *ranges, *(row[f"ece_{end}"] for end in ("low", "high", "null", "null_high"))


def factors(width: float, points: list[Point]) -> Figure:
    """ECE of networks over what they are made of, and NLL over error; crosses: networks with BatchNorm.

    A line leads from each NLL to that with a temperature.
    """
    names = [*varying(points), "error"]
    columns = max(1, min(len(names), int(width / 2.2)))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(width, 2.0 * rows + 0.35), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    datasets = list(dict.fromkeys(point.dataset for point in points))
    for panel, name in zip(grid.flat, names, strict=False):
        for d, dataset in enumerate(datasets):
            for norm, marker in ((True, "X"), (False, "o")):
                own = [p for p in points if p.dataset == dataset and p.facts.batch_norm == norm]
                own = [p for p in own if name == "error" or getattr(p.facts, name) is not None]
                if not own:
                    continue
                x = np.array([p.error if name == "error" else getattr(p.facts, name) for p in own], float)
                style = {"color": COLOURS[d % len(COLOURS)], "marker": marker, "linestyle": "none", "markersize": 5}
                label = f"{shorten(dataset, 20)}, {'with' if norm else 'no'} BatchNorm"
                if name == "error":
                    panel.plot(x, [p.nll for p in own], label=label, **style)
                    panel.vlines(
                        x, [p.nll_temperature for p in own], [p.nll for p in own], style["color"], linewidth=0.8
                    )
                else:
                    ece = np.array([p.ece for p in own])
                    ends = np.array([[p.ece - min(p.ece_low, p.ece) for p in own],
                                     [max(p.ece_high, p.ece) - p.ece for p in own]])  # fmt: skip
                    panel.errorbar(x, ece, ends, label=label, elinewidth=0.8, **style)
        if name == "error":
            panel.set(xlabel="error", ylabel="NLL")
            panel.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        else:
            panel.set(xlabel=FACTORS[name], ylabel="ECE")
            panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        highest = max(max(p.nll, p.nll_temperature) if name == "error" else max(p.ece, p.ece_high) for p in points)
        panel.set_ylim(0, 1.1 * highest or 1)
        panel.margins(x=0.12)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=name in ("depth", "width", "steps")))
        panel.grid()
    for panel in grid.flat[len(names) :]:
        panel.set_axis_off()
    handles, labels = grid[-1, (len(names) - 1) % columns].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=max(1, int(width / 2.3)))
    return figure


def factor_rows(points: list[Point]) -> Iterator[Sequence[object]]:
    for point in points:
        yield (
            point.dataset, point.name, *(getattr(point.facts, name) for name in FACTS), point.error, point.nll,
            point.nll_temperature, point.ece, point.ece_low, point.ece_high, point.ece_temperature,
        )  # fmt: skip
