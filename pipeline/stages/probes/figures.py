"""Curves of the probes over the layers: of all images by features, and of few images of each class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pipeline.report.style import COLOURS, INK, MUTED, shorten
from pipeline.stages.probes.found import FULL, Probes

TITLES = {"class_token": "class token", "pooled": "mean over positions", "spatial": "single positions"}
STYLES: dict[str, dict[str, Any]] = {
    "class_token": {"color": COLOURS[5], "linestyle": "-", "marker": "o"},
    "pooled": {"color": COLOURS[0], "linestyle": "--", "marker": "s"},
    "spatial": {"color": COLOURS[2], "linestyle": ":", "marker": "^"},
}
SHOT_STYLES = tuple(
    {"color": colour, "linestyle": line, "marker": marker}
    for colour, line, marker in zip(
        (COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[3], COLOURS[4], COLOURS[5]), ("-", "--", ":", "-.", "-", "--"),
        "osD^vP", strict=True,
    )
)  # fmt: skip
LABELS = 14  # layers that are named below a panel; of more, every second or third is
COLUMNS = ("network", "layer", "features", "shots", "accuracy", "low", "high")


def rows(found: Sequence[Probes]) -> Iterator[Sequence[object]]:
    """Yield every accuracy with its interval, and the network's own."""
    for one in found:
        for row, layer in enumerate(one.layers):
            for features in one.features:
                for shots in one.shots:
                    values = one.at(row, features, shots)
                    if np.isfinite(values[0]):
                        yield (one.network, layer, features, shots, *values)
        if one.facts.network_accuracy is not None:
            yield one.network, "", "network itself", "", one.facts.network_accuracy, None, None


def by_features(width: float, found: Sequence[Probes]) -> Figure:
    """Draw the accuracy of probes of all images over the layers: a panel for each network, a line for each features."""
    figure, panels = _grid(width, len(found), 1)
    for panel, one in zip(panels[0], found, strict=False):
        for features in one.features:
            _line(panel, one, features, FULL, TITLES[features], STYLES[features])
        own = one.facts.network_accuracy
        if own is not None:
            panel.axhline(own, color=MUTED, linewidth=0.8, linestyle=(0, (1, 1.5)), label="the network itself")
        panel.set_title(shorten(one.network, int(11 * width / panels.shape[1])))
    panels[0, 0].set_ylabel("accuracy")
    _finish(figure, panels, found, width)
    return figure


def by_shots(width: float, found: Sequence[Probes]) -> Figure:
    """Draw the accuracy of probes of few images of each class: a row for each features, a column for each network."""
    kinds = [features for features in TITLES if any(features in one.features for one in found)]
    figure, panels = _grid(width, len(found), len(kinds))
    for at, features in enumerate(kinds):
        row = panels[at]
        for panel, one in zip(row, found, strict=True):
            for number, shots in enumerate(one.shots if features in one.features else ()):
                style = SHOT_STYLES[number % len(SHOT_STYLES)]
                label = "all images" if shots == FULL else f"{shots} of each class"
                _line(panel, one, features, shots, label, style)
            if features not in one.features:
                panel.text(0.5, 0.5, "it has none", ha="center", va="center", color=MUTED, transform=panel.transAxes)
            if at == 0:
                panel.set_title(shorten(one.network, int(11 * width / panels.shape[1])))
        row[0].set_ylabel(TITLES[features])
    _finish(figure, panels, found, width)
    return figure


def _grid(width: float, networks: int, kinds: int) -> tuple[Figure, np.ndarray]:
    height = 1.45 * kinds + 1.35 if kinds > 1 else 2.9
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(kinds, networks, squeeze=False, sharex="col", sharey=True)


def _line(panel: Axes, one: Probes, features: str, shots: str, label: str, style: Mapping[str, Any]) -> None:
    place = one.features.index(features), one.shots.index(shots)
    accuracy, low, high = (values[:, *place] for values in (one.accuracy, one.low, one.high))
    at = np.flatnonzero(np.isfinite(accuracy))
    panel.fill_between(at, low[at], high[at], color=style["color"], alpha=0.2, linewidth=0)
    panel.plot(at, accuracy[at], label=label, **style)


def _finish(figure: Figure, panels: np.ndarray, found: Sequence[Probes], width: float) -> None:
    for one, column in zip(found, panels.T, strict=False):
        step = max(1, -(-len(one.layers) // max(2, int(LABELS * width / (3.5 * panels.shape[1])))))
        at = np.arange(0, len(one.layers), step)
        column[-1].set_xticks(at, [shorten(one.layers[each], 16) for each in at], rotation=90)
        column[-1].set_xlim(-0.4, len(one.layers) - 0.6)
    for panel in panels.flat:
        panel.grid(axis="y")
        panel.tick_params(axis="x", labelsize=6.5, labelcolor=INK)
    corner = panels[0, 0]
    corner.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    corner.set_ylim(bottom=0)
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(
        handles=list(lines.values()), loc="outside upper left", ncols=max(1, int(width / 1.6)), handlelength=2.6
    )
