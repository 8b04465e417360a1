"""What the stage `randomize` found, as the report reads it, the tables of its figures, and the paper's beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.report import words
from pipeline.stages.randomize.results import Expressivity, How, Runs, Told
from pipeline.stages.randomize.runs import EXPRESSIVITY, SECONDS
from pipeline.storage.manifest import recorded
from pipeline.storage.read_back import open_store, read_text

CORRUPTIONS = {
    "true_labels": "true labels",
    "corrupted_labels": "corrupted labels",
    "random_labels": "random labels",
    "shuffled_pixels": "shuffled pixels",
    "random_pixels": "random pixels",
    "gaussian": "gaussian",
}
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
    facts: Told
    curves: Mapping[str, np.ndarray]

    @property
    def how(self) -> How:
        return self.facts.how

    @property
    def network(self) -> str:
        return self.facts.network

    @property
    def architecture(self) -> tuple[str, int]:
        """What tells networks apart: one builder may make several."""
        return self.network, self.facts.parameters

    @property
    def corruption(self) -> str:
        """In words, with the share."""
        said = CORRUPTIONS[self.how.corruption]
        return said if self.how.share is None else f"{self.how.share:.0%} {said}"

    @property
    def share(self) -> float | None:
        """Of corrupted labels; None where the images are corrupted."""
        return {"true_labels": 0.0, "random_labels": 1.0}.get(self.how.corruption, self.how.share)

    @property
    def diverged(self) -> bool:
        return self.facts.outcome == "diverged"

    @property
    def regularisers(self) -> tuple[Any, ...]:
        return self.how.random_crop, self.how.weight_decay, self.how.dropout

    @property
    def paper(self) -> tuple[float, float] | None:
        """Training and test accuracy of the same run in the paper's table."""
        how = self.how
        if how.corruption not in ("true_labels", "random_labels") or how.dropout:
            return None
        key = (
            self.facts.parameters,
            self.facts.batch_norm,
            bool(how.random_crop),
            how.weight_decay > 0,
            how.corruption == "random_labels",
        )
        return TABLE_1.get(key)


@dataclass(frozen=True)
class Randomized:
    """One experiment.

    Attributes
    ----------
    cifar10 : whether its classes are those of the paper's data set.
    expressivity : what the theorem's network comes to; None: these results are older than it.
    fitting_seconds : what that takes, by labels.
    """

    name: str
    dataset: str
    runs: list[Run]
    images: int
    test_images: int
    seconds: float
    cifar10: bool
    expressivity: Expressivity | None = None
    fitting_seconds: Mapping[str, float] = field(default_factory=dict)

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
        return [run for run in self.runs if run.how.corruption == "true_labels" and not run.diverged]

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
    """Name the explicit regularisers that are on, to be put behind a name."""
    on = [name for name, value in zip(("crop", "decay", "dropout"), values, strict=True) if value]
    return f" ({', '.join(on) or 'no regulariser'})"


def read_randomization(results: Path, name: str, told: Mapping[str, Any]) -> Randomized:
    """Read the curves of an experiment, verified; `told` is what its manifest says."""
    path = results / "randomization" / name / "curves.zarr"
    try:
        known = Runs.read(told)
        store = open_store(path)
        names = [str(each) for each in np.asarray(store["run"])]
        curves = {key: np.asarray(store[key]) for key in (*CURVES, "seconds")}
        classes = open_store(results / known.dataset / "images.zarr").attrs["classes"]
        runs = [
            Run(each, known.runs[each], {key: values[at] for key, values in curves.items()})
            for at, each in enumerate(names)
        ]
    except (FileNotFoundError, KeyError, ValueError, TypeError) as error:
        raise MicrotomeError(f"{path} is not what the stage `randomize` writes ({error}): run `make verify`") from error
    seconds = float(np.nansum(curves["seconds"]))
    cifar10 = set(classes) == CIFAR10
    expressivity, took = read_expressivity(path.parent)
    return Randomized(name, known.dataset, runs, known.images, known.test_images, seconds, cifar10, expressivity, took)


def read_expressivity(folder: Path) -> tuple[Expressivity | None, dict[str, float]]:
    """Read what the theorem's network comes to, verified, and the seconds that it took, which only a clock told."""
    file = folder / EXPRESSIVITY
    if not file.exists() and recorded(file) is None:
        return None, {}
    with read_text(file) as stream:
        found = Expressivity.read(json.load(stream))
    try:
        return found, json.loads((folder / SECONDS).read_text())
    except (OSError, ValueError):
        return found, {}


def curve_rows(runs: Sequence[Run]) -> Iterator[Sequence[object]]:
    for run in runs:
        for at in range(run.facts.epochs_run):
            values = (float(run.curves[key][at]) for key in CURVES)
            yield (run.name, run.network, run.how.corruption, run.how.share, at + 1, *values)


def share_rows(found: Randomized) -> Iterator[Sequence[object]]:
    for title, runs in found.by_share().items():
        for run in runs:
            facts = run.facts
            times = (facts.epochs_to_90, facts.epochs_to_fit)
            yield (run.name, title, run.share, *times, 1 - facts.test_accuracy, 1 - facts.best_test_accuracy)
