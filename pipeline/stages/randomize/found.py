"""What the stage `randomize` found, as the report reads it, the figures of it, and the paper's table beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.errors import MicrotomeError
from pipeline.report import words
from pipeline.report.style import COLOURS, grid_of, shorten
from pipeline.storage.read_back import open_store

CORRUPTIONS = {
    "true_labels": "true labels",
    "corrupted_labels": "corrupted labels",
    "random_labels": "random labels",
    "shuffled_pixels": "shuffled pixels",
    "random_pixels": "random pixels",
    "gaussian": "gaussian",
}
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))
MARKERS = "osD^v*"
CIFAR10 = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"}
CURVES = ("train_loss", "train_accuracy", "test_accuracy", "test_loss", "test_ece")
CURVE_COLUMNS = ("run", "network", "corruption", "share", "epoch", *CURVES)
SHARE_COLUMNS = ("run", "network", "share", "epochs_to_90", "epochs_to_fit", "test_error", "best_test_error")

TABLE_1: dict[tuple[int, bool, bool, bool, bool], tuple[float, float]] = {
    (1_649_402, True, True, True, False): (1.0, 0.8905),
    (1_649_402, True, True, False, False): (1.0, 0.8931),
    (1_649_402, True, False, True, False): (1.0, 0.8603),
    (1_649_402, True, False, False, False): (1.0, 0.8575),
    (1_649_402, True, False, False, True): (1.0, 0.0978),
    (1_649_402, False, False, True, False): (1.0, 0.8300),
    (1_649_402, False, False, False, False): (1.0, 0.8200),
    (1_649_402, False, False, False, True): (1.0, 0.1012),
    (1_387_786, False, True, True, False): (0.9990, 0.8122),
    (1_387_786, False, True, False, False): (0.9982, 0.7966),
    (1_387_786, False, False, True, False): (1.0, 0.7736),
    (1_387_786, False, False, False, False): (1.0, 0.7607),
    (1_387_786, False, False, False, True): (0.9982, 0.0986),
    (1_735_178, False, False, True, False): (1.0, 0.5335),
    (1_735_178, False, False, False, False): (1.0, 0.5239),
    (1_735_178, False, False, False, True): (1.0, 0.1048),
    (1_209_866, False, False, True, False): (0.9980, 0.5039),
    (1_209_866, False, False, False, False): (1.0, 0.5051),
    (1_209_866, False, False, False, True): (0.9934, 0.1061),
}
"""Table 1 of Zhang et al. (2017), CIFAR-10: (parameters, BatchNorm, random crop, weight decay, random labels) to
accuracy on training and test images."""
PAPER_IMAGES = 50_000


@dataclass(frozen=True)
class Run:
    """One run: its facts, as the manifest tells them, and its curves (epoch)."""

    name: str
    facts: Mapping[str, Any]
    curves: Mapping[str, np.ndarray]

    @property
    def how(self) -> Mapping[str, Any]:
        return self.facts["how"]

    @property
    def network(self) -> str:
        return self.facts["network"]

    @property
    def architecture(self) -> tuple[str, int]:
        """What tells networks apart: one builder may make several."""
        return self.network, self.facts["parameters"]

    @property
    def corruption(self) -> str:
        """In words, with the share."""
        said = CORRUPTIONS[self.how["corruption"]]
        return said if self.how["share"] is None else f"{self.how['share']:.0%} {said}"

    @property
    def share(self) -> float | None:
        """Of corrupted labels; None where the images are corrupted."""
        return {"true_labels": 0.0, "random_labels": 1.0}.get(self.how["corruption"], self.how["share"])

    @property
    def diverged(self) -> bool:
        return self.facts["outcome"] == "diverged"

    @property
    def regularisers(self) -> tuple[Any, ...]:
        return tuple(self.how[key] for key in ("random_crop", "weight_decay", "dropout"))

    @property
    def paper(self) -> tuple[float, float] | None:
        """Training and test accuracy of the same run in the paper's table."""
        how = self.how
        if how["corruption"] not in ("true_labels", "random_labels") or how["dropout"]:
            return None
        key = (
            self.facts["parameters"],
            self.facts["batch_norm"],
            bool(how["random_crop"]),
            how["weight_decay"] > 0,
            how["corruption"] == "random_labels",
        )
        return TABLE_1.get(key)


@dataclass(frozen=True)
class Randomized:
    """One experiment. `cifar10`: whether its classes are those of the paper's data set."""

    name: str
    dataset: str
    runs: list[Run]
    images: int
    test_images: int
    seconds: float
    cifar10: bool

    @property
    def networks(self) -> list[tuple[str, int]]:
        return list(dict.fromkeys(run.architecture for run in self.runs))

    def title(self, architecture: tuple[str, int]) -> str:
        """A network's name, with its parameters where another one has the same name."""
        name, parameters = architecture
        alike = sum(other == name for other, _ in self.networks) > 1
        return f"{name}, {words.number(parameters)} parameters" if alike else name

    def of(self, architecture: tuple[str, int]) -> list[Run]:
        return [run for run in self.runs if run.architecture == architecture]

    @property
    def true(self) -> list[Run]:
        """Runs on true labels that did not diverge."""
        return [run for run in self.runs if run.how["corruption"] == "true_labels" and not run.diverged]

    def by_share(self) -> dict[str, list[Run]]:
        """Runs on corrupted labels by network and regularisers, at two shares or more, rising."""
        found: dict[tuple[Any, ...], list[Run]] = {}
        for run in self.runs:
            if run.share is not None and not run.diverged:
                found.setdefault((run.architecture, run.regularisers), []).append(run)
        several = {key: runs for key, runs in found.items() if len({run.share for run in runs}) > 1}
        names = [self.title(architecture) for architecture, _ in several]
        said = {}
        for (architecture, regularisers), runs in several.items():
            title = self.title(architecture)
            title += with_regularisers(regularisers) if names.count(title) > 1 else ""
            said[title] = sorted(runs, key=lambda run: run.share or 0.0)
        return said


def with_regularisers(values: Sequence[Any]) -> str:
    """Which explicit regularisers are on, to be put behind a name."""
    on = [name for name, value in zip(("crop", "decay", "dropout"), values, strict=True) if value]
    return f" ({', '.join(on) or 'no regulariser'})"


def read_randomization(results: Path, name: str, told: Mapping[str, Any]) -> Randomized:
    """Read the curves of an experiment, verified; `told` is what its manifest says."""
    path = results / "randomization" / name / "curves.zarr"
    try:
        store = open_store(path)
        names = [str(each) for each in np.asarray(store["run"])]
        curves = {key: np.asarray(store[key]) for key in (*CURVES, "seconds")}
        classes = open_store(results / told["dataset"] / "images.zarr").attrs["classes"]
        runs = [
            Run(each, told["runs"][each], {key: values[at] for key, values in curves.items()})
            for at, each in enumerate(names)
        ]
    except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
        raise MicrotomeError(f"{path} is not what the stage `randomize` writes ({error}): run `make verify`") from error
    seconds = float(np.nansum(curves["seconds"]))
    return Randomized(
        name, told["dataset"], runs, told["images"], told["test_images"], seconds, set(classes) == CIFAR10
    )


def curve_rows(runs: Sequence[Run]) -> Iterator[Sequence[object]]:
    for run in runs:
        for at in range(run.facts["epochs_run"]):
            values = (float(run.curves[key][at]) for key in CURVES)
            yield (run.name, run.network, run.how["corruption"], run.how["share"], at + 1, *values)


def share_rows(found: Randomized) -> Iterator[Sequence[object]]:
    for title, runs in found.by_share().items():
        for run in runs:
            facts = run.facts
            times = (facts["epochs_to_90"], facts["epochs_to_fit"])
            yield (run.name, title, run.share, *times, 1 - facts["test_accuracy"], 1 - facts["best_test_accuracy"])


def learning_curves(width: float, found: Randomized) -> Figure:
    """Training loss by epoch, a panel for each network."""
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
    """Test error, NLL and ECE by epoch, of the runs on true labels, as in Guo et al.'s figure of overfitting."""
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
    """Over the share of corrupted labels: `time` to fit, or test `error`."""
    figure = Figure(figsize=(width, 2.9 if width > 5 else 3.3), layout="constrained")
    panel = figure.subplots()
    for at, (title, runs) in enumerate(found.by_share().items()):
        shares = np.array([run.share for run in runs], float)
        style: dict[str, Any] = {"color": COLOURS[at % len(COLOURS)], "marker": MARKERS[at % len(MARKERS)]}
        if what == "time":
            for key, line in (("epochs_to_fit", "-"), ("epochs_to_90", ":")):
                values = [np.nan if run.facts[key] is None else run.facts[key] for run in runs]
                panel.plot(shares, values, linestyle=line, label=title if line == "-" else None, **style)
        else:
            panel.plot(shares, [1 - run.facts["test_accuracy"] for run in runs], linestyle="-", label=title, **style)
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
    """One for all panels, above them."""
    known: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            known.setdefault(shorten(label, 40), handle)
    columns = max(1, min(len(known), int(width / (1.7 if max(map(len, known), default=0) < 24 else 2.6))))
    figure.legend(list(known.values()), list(known), loc="outside upper left", ncols=columns)
