"""What came out of runs: `runs.csv` and `curves.zarr`, made from the folder of each run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.stages.randomize.results import Outcomes, RunFile, Told
from pipeline.stages.randomize.runs import SECONDS, Data, Run
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, within, write_file
from pipeline.storage.store import verified_bytes, write_whole
from pipeline.storage.tables import csv_bytes, number

CURVES = {
    "train_loss": "loss", "train_accuracy": "accuracy",
    "test_accuracy": "test_accuracy", "test_loss": "test_loss", "test_ece": "test_ece",
}  # fmt: skip
COLUMNS = (
    "run", "id", "network", "parameters", "batch_norm", "corruption", "share", "labels_changed", "seed", "random_crop",
    "weight_decay", "dropout", "learning_rate", "decay", "momentum", "batch_size", "epochs", "epochs_run", "outcome",
    "epochs_to_90", "epochs_to_fit", "train_loss", "train_accuracy", "test_accuracy", "best_test_accuracy",
    "best_epoch", "test_loss", "lowest_test_loss", "lowest_test_loss_epoch", "test_ece",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """One run and what it came to."""

    run: Run
    found: RunFile
    seconds: list[float]

    @staticmethod
    def read(run: Run, files: Mapping[str, Any]) -> Outcome:
        """Read a finished run; a file that is not what was recorded is refused."""
        recorded = {name: (size, crc) for name, (size, crc) in files.items()}
        found = RunFile.read(json.loads(verified_bytes(run.folder.parent, f"{run.id}/run.json", recorded)))
        try:
            seconds = json.loads((run.folder / SECONDS).read_text())
        except (OSError, ValueError):
            seconds = []  # only a clock's: nothing else is made from it
        return Outcome(run, found, seconds)

    @property
    def epochs(self) -> int:
        return len(self.found.curve.loss)

    def curve(self, name: str) -> np.ndarray:
        """(epoch) float64; NaN where it diverged."""
        values = getattr(self.found.curve, name)
        return np.array([np.nan if value is None else value for value in values], np.float64)

    @property
    def best_epoch(self) -> int:
        """The epoch, from 1, with the highest test accuracy: what early stopping could have kept."""
        return int(np.argmax(self.curve("test_accuracy"))) + 1

    @property
    def lowest_test_loss_epoch(self) -> int:
        """The epoch, from 1, after which the NLL of the test images was lowest: later ones overfit it."""
        loss = self.curve("test_loss")
        return int(np.argmin(np.where(np.isnan(loss), np.inf, loss))) + 1

    def told(self) -> Told:
        """Return what the manifest says of the run."""
        found, curve, lowest = self.found.written(), self.found.curve, self.lowest_test_loss_epoch
        return Told(
            **{key: value for key, value in found.items() if key in Outcomes.model_fields},
            id=self.run.id,
            network=self.run.network.architecture,
            how=self.run.how,
            epochs_run=self.epochs,
            train_loss=curve.loss[-1],
            test_accuracy=curve.test_accuracy[-1],
            best_epoch=self.best_epoch,
            best_test_accuracy=curve.test_accuracy[self.best_epoch - 1],
            test_loss=curve.test_loss[-1],
            lowest_test_loss=curve.test_loss[lowest - 1],
            lowest_test_loss_epoch=lowest,
            test_ece=curve.test_ece[-1],
        )


def write(folder: Path, found: Mapping[str, Outcome], data: Data, attrs: Mapping[str, Any]) -> Files:
    """Write the table and the curves; return their files, relative to the experiment's folder."""
    files = write_file(folder, "runs.csv", csv_bytes(COLUMNS, (row(name, one) for name, one in found.items())))
    store = write_whole(folder / "curves.zarr", arrays(found, data), attributes(attrs), ("image",))
    return files | within("curves.zarr", store)


def output(files: Files) -> str:
    """Return the digest of all that was written, but for the times."""
    return digest({name: each for name, each in files.items() if not name.startswith("curves.zarr/seconds/c/")})


def row(name: str, one: Outcome) -> list[Any]:
    """Return a row of `runs.csv`."""
    known = {"run": name} | one.run.how.written() | one.told().written()
    return [_cell(known[column]) for column in COLUMNS]


def _cell(value: Any) -> Any:
    return "" if value is None else number(value) if isinstance(value, float) else value


def arrays(found: Mapping[str, Outcome], data: Data) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the arrays of `curves.zarr`; beyond the last epoch of a run they are NaN."""
    epochs = max(one.epochs for one in found.values())

    def padded(values: np.ndarray | list[float]) -> np.ndarray:
        own = np.asarray(values, np.float64)
        return np.concatenate([own, np.full(epochs - len(own), np.nan)])

    curves = {name: np.stack([padded(one.curve(key)) for one in found.values()]) for name, key in CURVES.items()} | {
        "seconds": np.stack([padded(one.seconds[:epochs]) for one in found.values()])
    }
    labels = np.array([one.found.labels for one in found.values()], np.int64)
    return {name: (("run", "epoch"), values) for name, values in curves.items()} | {
        "run": (("run",), np.array(list(found), object)),
        "epoch": (("epoch",), np.arange(1, epochs + 1)),
        "label": (("run", "image"), labels),
        "true_label": (("image",), data.labels),
        "image": (("image",), data.rows),
        "test_image": (("test_image",), data.test_rows),
    }


def attributes(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all runs share, and what each was, by name."""
    return {key: value for key, value in own.items() if key not in ("version", "parents")}
