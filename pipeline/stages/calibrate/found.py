"""What the report reads of a calibration: errors of a network as it is, the table of methods, reliability diagrams."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.stages.calibrate.results import OF_BINS, Calibrated, NetworkFacts
from pipeline.stages.calibrate.scores import outside_of
from pipeline.stages.calibrate.settings import Fitting
from pipeline.storage.read_back import open_store, read_text

Row = Mapping[str, float]


@dataclass(frozen=True)
class Diagram:
    """A reliability diagram: images, and sums of right ones and of confidences, by bin."""

    count: NDArray[np.int64]
    correct: NDArray[np.int64]
    confidence: NDArray[np.float64]


@dataclass(frozen=True)
class Calibration:
    """The calibration of one network on one data set.

    Attributes
    ----------
    rows : the table of methods, means over the splits; NaN where a cell is blank.
    all : the diagram of the network as it is, over all images.
    test : the diagram of each method, on the images of the first split that judge.
    settings : how methods were fitted. facts : of the images and the network.
    """

    dataset: str
    network: str
    rows: Mapping[str, Row]
    all: Diagram
    test: Mapping[str, Diagram]
    settings: Fitting
    facts: Calibrated

    @property
    def whole(self) -> Mapping[str, float]:
        """Measures of the network as it is, over all images; with interval and null band."""
        return self.facts.all

    @property
    def converged(self) -> bool:
        """Whether every search of a scaling found its minimum, on all splits."""
        return all(np.isnan(row["converged"]) or row["converged"] == 1 for row in self.rows.values())

    @property
    def notes(self) -> list[str]:
        """How the scores were read, if they are no plain logits, and why an ECE is not within its interval."""
        shown = {"as it is": self.whole} | {f"{name}, mean": row for name, row in self.rows.items()}
        return [
            *self.facts.remarks,
            *outside_of([(name, row["ece"], row["ece_low"], row["ece_high"]) for name, row in shown.items()]),
        ]

    def point(self) -> Point:
        after = self.rows.get("temperature", self.rows["uncalibrated"])
        return Point(
            self.network, self.dataset, self.whole["ece"], self.whole["ece_low"], self.whole["ece_high"],
            self.whole["nll"], 1 - self.whole["accuracy"], after["ece"], after["nll"], self.facts.network,
        )  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One network, or one run of a training, in the figures over networks: what it is, and how it is calibrated.

    `ece_temperature`, `nll_temperature` : with a temperature, on images that it was not fitted on; the NLL above it is
    what overfitting to the NLL costs, since a temperature changes no prediction.
    Whatever trains networks in numbers can make points of its runs, and they are drawn beside the others.
    """

    name: str
    dataset: str
    ece: float
    ece_low: float
    ece_high: float
    nll: float
    error: float
    ece_temperature: float
    nll_temperature: float
    facts: NetworkFacts


FACTORS = {
    "depth": "layers with weights",
    "width": "median outputs of a layer",
    "parameters": "parameters",
    "weight_decay": "weight decay",
    "steps": "steps of training",
}
FACTS = (*FACTORS, "batch_norm")


def varying(points: list[Point]) -> list[str]:
    """Return the factors that have more than one value."""
    values = {name: {getattr(point.facts, name) for point in points} - {None} for name in FACTORS}
    return [name for name, different in values.items() if len(different) > 1]


def read_calibration(results: Path, dataset: str, network: str) -> Calibration:
    """Read calibration.csv and the store, verified."""
    folder = results / dataset / network
    store = open_store(folder / "calibration.zarr")
    with read_text(folder / "calibration.csv") as file:
        rows = {
            row.pop("method"): {name: float(cell) if cell else np.nan for name, cell in row.items()}
            for row in csv.DictReader(file)
        }
    names = np.asarray(store["calibration"][:]).tolist()
    first = [np.asarray(store[name][0]) for name in OF_BINS]
    return Calibration(
        dataset,
        network,
        rows,
        Diagram(*(np.asarray(store[f"all_{name}"][:]) for name in OF_BINS)),
        {name: Diagram(*(each[at] for each in first)) for at, name in enumerate(names)},
        Fitting.read(store.attrs),
        Calibrated.read(store.attrs),
    )
