"""The figures of randomization: learning curves, and time to fit and test error over the share of corrupted labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report.style import COLOURS, grid_of, shorten
from pipeline.stages.randomize.found import Randomized, Run

DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "osD^v*"


def learning_curves(width: float, found: Randomized) -> Figure:
    """Draw the training loss by epoch, a panel for each network."""
    networks = found.networks
    rows, columns = grid_of(len(networks), width, 3 if width > 5 else 1)
    figure = Figure(figsize=(width, 0.6 + 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    kinds = list(dict.fromkeys(run.corruption for run in found.runs))
    for panel, architecture in zip(axes, networks, strict=False):
        for run in found.of(architecture):
            at = kinds.index(run.corruption)
            loss = run.curves["train_loss"]
            style = {"color": COLOURS[at % len(COLOURS)], "linestyle": DASHES[at % len(DASHES)], "linewidth": 1.3}
            panel.plot(np.arange(1, len(loss) + 1), loss, label=run.corruption, **style)
        panel.set_title(shorten(found.title(architecture), int(15 * width / columns)))
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(axis="y")
    for panel in axes[len(networks) :]:
        panel.set_axis_off()
    axes[0].set_ylabel("training loss")
    _legend(figure, list(axes), width)
    return figure


def over_training(width: float, found: Randomized) -> Figure:
    """Draw test error, NLL and ECE by epoch, of the runs on true labels, as in Guo et al.'s figure of overfitting."""
    runs = found.true
    figure = Figure(figsize=(width, 2.9 if width > 5 else 6.4), layout="constrained")
    panels = figure.subplots(*((1, 3) if width > 5 else (3, 1)))
    for panel, (title, values) in zip(panels, _TESTED.items(), strict=True):
        for at, run in enumerate(runs):
            style: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "linestyle": DASHES[at % len(DASHES)]}
            shown = values(run)
            panel.plot(np.arange(1, len(shown) + 1), shown, linewidth=1.3, label=run.name, **style)
        panel.set_ylabel(title)
        panel.set_ylim(bottom=0)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(axis="y")
    _legend(figure, list(panels), width)
    return figure


_TESTED: Mapping[str, Callable[[Run], np.ndarray]] = {
    "test error": lambda run: 1 - run.curves["test_accuracy"],
    "test NLL": lambda run: run.curves["test_loss"],
    "test ECE": lambda run: run.curves["test_ece"],
}


def over_share(width: float, found: Randomized, what: str) -> Figure:
    """Draw, over the share of corrupted labels, the `time` to fit or the test `error`."""
    figure = Figure(figsize=(width, 2.9 if width > 5 else 3.3), layout="constrained")
    panel = figure.subplots()
    for at, (title, runs) in enumerate(found.by_share().items()):
        shares = np.array([run.share for run in runs], float)
        style: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}
        if what == "time":
            for key, line in (("epochs_to_fit", "-"), ("epochs_to_90", ":")):
                values = [np.nan if getattr(run.facts, key) is None else getattr(run.facts, key) for run in runs]
                panel.plot(shares, values, linestyle=line, label=title if line == "-" else None, **style)
        else:
            panel.plot(shares, [1 - run.facts.test_accuracy for run in runs], linestyle="-", label=title, **style)
    panel.set_xlabel("share of corrupted labels")
    panel.set_ylabel("epochs" if what == "time" else "test error")
    panel.set_ylim(bottom=0)
    if not np.isfinite(np.concatenate([line.get_ydata() for line in panel.lines]).astype(float)).any():
        panel.set(xlim=(-0.05, 1.05), yticks=[])
        panel.text(0.5, 0.5, "none in the epochs that runs had", ha="center", va="center", transform=panel.transAxes)
    if what == "error":
        panel.set_ylim(top=1)
    panel.grid(axis="y")
    _legend(figure, [panel], width)
    return figure


def _legend(figure: Figure, axes: Sequence[Axes], width: float) -> None:
    """Draw one legend for all panels, above them."""
    known: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(shorten(label, 40), handle)
    columns = max(1, min(len(known), int(width / (1.7 if max(map(len, known), default=0) < 24 else 2.6))))
    figure.legend(list(known.values()), list(known), loc="outside upper left", ncols=columns)
