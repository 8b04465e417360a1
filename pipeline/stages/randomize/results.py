"""What `randomize` promises to the stages that read it: its runs, what came out of each, and its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import MicrotomeError
from pipeline.plan.job import Job
from pipeline.stages.randomize.settings import How
from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import verified_bytes


class Outcomes(Record):
    """What a training says of itself.

    Attributes
    ----------
    epochs_to_90, epochs_to_fit : the first epoch in which nine in ten training images, or all, were predicted right.
    train_accuracy : of the network at the end; None: it diverged.
    steps : of an epoch.
    """

    outcome: Literal["finished", "diverged"]
    epochs_to_90: int | None
    epochs_to_fit: int | None
    train_accuracy: float | None
    parameters: int
    batch_norm: bool
    labels_changed: int
    precision: str
    device: str
    steps: int
    weights_sha256: str | None = None


class Curve(Record):
    """By epoch; None where a number is not finite."""

    loss: list[float | None]
    accuracy: list[float | None]
    test_accuracy: list[float | None]
    test_loss: list[float | None]
    test_ece: list[float | None]


class RunFile(Outcomes):
    """What `run.json` says; `labels` are those that were trained on."""

    curve: Curve
    labels: list[int]


class Told(Outcomes):
    """What the manifest says of a run: losses, accuracies and ECE are those after the last epoch."""

    id: str
    network: str
    how: How
    epochs_run: int
    train_loss: float | None
    test_accuracy: float
    best_epoch: int
    best_test_accuracy: float
    test_loss: float | None
    lowest_test_loss: float | None
    lowest_test_loss_epoch: int
    test_ece: float | None


class Runs(Record):
    """What the manifest of `randomize` says: runs by name, and how many images they are trained and tested on."""

    dataset: str
    runs: dict[str, Told]
    images: int
    test_images: int

    @classmethod
    def of(cls, manifest: Manifest) -> Runs:
        return cls.read(manifest.result)


class Fit(Record):
    """How well the theorem's network gives some labels: the largest error of any."""

    labels: str
    largest_error: float


class Expressivity(Record):
    """What `expressivity.json` says of the theorem's network: it gives any labels to the training images.

    Attributes
    ----------
    images : n, that differ. values : d, of each. weights : 2n + d.
    smallest_eigenvalue : of the lemma's matrix, which above 0 has an inverse.
    refused : why no such network was written down; the rest is 0 then.
    """

    images: int = 0
    values: int = 0
    weights: int = 0
    smallest_eigenvalue: float = 0.0
    fits: tuple[Fit, ...] = ()
    refused: str | None = None


def run_settings(settings: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Return all that a run depends on, as far as a plan knows it: other runs are no part of it.

    `settings` are the experiment's, with `version` and `parents`.
    """
    shared = {key: value for key, value in settings.items() if key != "runs"}
    return shared | {"run": settings["runs"][run]}


def weights_of(job: Job, run: str) -> tuple[Path, Mapping[str, Any]]:
    """Return file and facts of the weights that a run of a finished experiment came to, as its manifest has them."""
    manifest = job.read()
    facts = manifest.result["runs"][run]
    name = f"runs/{facts['id']}/model.safetensors"
    if name not in manifest.files:
        raise MicrotomeError(
            f"run {run!r} of {job.experiment!r} diverged and has no weights: lower its `learning_rate`, or name "
            "another run"
        )
    verified_bytes(job.folder, name, manifest.files)
    return job.folder / name, facts
