"""What the stage `calibrate` writes: calibration.zarr, two tables made from it, and facts of the network."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.calibration.reliability import Reliability
from pipeline.stages.calibrate.settings import Fitting
from pipeline.stages.calibrate.tasks import DRAWS, MEASURES, Judged
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import Array, Reader, create, verified_bytes, write
from pipeline.storage.tables import csv_bytes, number

RANGED = ("ece", "nll")
"""Measures of which the table has the range of 95 % of the splits."""
ENDINGS = dict.fromkeys(RANGED, ("", "_2.5", "_97.5"))
COLUMNS = (
    "method",
    "splits",
    *(f"{name}{ending}" for name in MEASURES for ending in ENDINGS.get(name, ("",))),
    "accuracy_change",
    "ece_below_temperature",
)
OF_BINS = ("count", "correct", "confidence")
BIN_COLUMNS = ("images_of", "method", "low", "high", "images", "accuracy", "confidence")


class NetworkFacts(Record):
    """What calibration may depend on.

    Attributes
    ----------
    depth : layers with weights. width : the median number of their outputs, the last layer aside.
    batch_norm : whether any running variance is kept.
    weight_decay, steps : of a network that was trained here, else None.
    """

    depth: int
    width: float | None
    parameters: int
    batch_norm: bool
    weight_decay: float | None
    steps: int | None


class Calibrated(Record):
    """What the manifest of `calibrate` says.

    Attributes
    ----------
    images : that count, of which methods are fitted on `fit` and judged on `test`.
    all : measures of the network as it is, over all images.
    remarks : on how its scores were read, where they are no plain logits.
    """

    images: int
    fit: int
    test: int
    all: dict[str, float]
    network: NetworkFacts
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, manifest: Manifest) -> Calibrated:
        return cls.read(manifest.result)


@dataclass(frozen=True)
class Whole:
    """The network as it is, over all images."""

    sums: Reliability
    measures: dict[str, float]

    @staticmethod
    def of(parts: Sequence[Judged]) -> Whole:
        """Merge the parts, in the order of the images."""
        judged = Judged.merged(parts)
        return Whole(judged.sums, judged.measures(DRAWS, seed=0))


def layout(methods: int, splits: int, bins: int) -> dict[str, Array]:
    """Lay out one file a split and array, so that a task writes whole files."""
    of_bins = ("split", "calibration", "bin"), (splits, methods, bins), (1, methods, bins)
    of_scores = ("split", "calibration", "measure"), (splits, methods, len(MEASURES)), (1, methods, len(MEASURES))
    found = {"score": Array(*of_scores[:2], np.float64, of_scores[2], fill=np.nan)}
    for name, dtype in (("count", np.int64), ("correct", np.int64), ("confidence", np.float64)):
        found[name] = Array(*of_bins[:2], dtype, of_bins[2])
    for name, dtype in (("all_count", np.int64), ("all_correct", np.int64), ("all_confidence", np.float64)):
        found[name] = Array(("bin",), (bins,), dtype, (bins,))
    found["calibration"] = Array(("calibration",), (methods,), str, (methods,), fill=None)
    found["measure"] = Array(("measure",), (len(MEASURES),), str, (len(MEASURES),), fill=None)
    return found


def open_store(store: Path, methods: Sequence[str], splits: int, bins: int) -> None:
    create(store, layout(len(methods), splits, bins), {})


def write_whole_network(
    store: Path, methods: Sequence[str], whole: Whole, settings: Fitting, facts: Calibrated
) -> Files:
    """Write all that is not of a split; return the files."""
    create(store, layout(len(methods), settings.splits, settings.bins), settings.written() | facts.written())
    return write(
        store,
        {
            "calibration": ((0,), np.array(methods, object)),
            "measure": ((0,), np.array(MEASURES, object)),
            "all_count": ((0,), whole.sums.count),
            "all_correct": ((0,), whole.sums.correct),
            "all_confidence": ((0,), whole.sums.confidence),
        },
    )


def write_tables(store: Path, files: Files, methods: Sequence[str], whole: Whole) -> dict[str, bytes]:
    """Make the two tables from what is stored."""
    reader = Reader(store, files)
    return tables({name: np.asarray(reader[name][:]) for name in ("score", *OF_BINS)}, methods, whole)


def tables(found: Mapping[str, np.ndarray], methods: Sequence[str], whole: Whole) -> dict[str, bytes]:
    """Make calibration.csv and calibration-bins.csv, by name, of `score` (split, method, measure) and sums of bins."""
    rows = ([_cell(row[name]) for name in COLUMNS] for row in summary(found["score"], methods))
    sums = [("all", "uncalibrated", *(getattr(whole.sums, name) for name in OF_BINS))]
    sums += [("test", method, *(found[name][0, at] for name in OF_BINS)) for at, method in enumerate(methods)]
    bins = len(whole.sums.count)
    bin_rows = (
        [part, method, number(m / bins), number((m + 1) / bins), int(count[m]),
         *(number(each[m] / count[m]) if count[m] else "" for each in (correct, confidence))]
        for part, method, count, correct, confidence in sums
        for m in range(bins)
    )  # fmt: skip
    return {"calibration.csv": csv_bytes(COLUMNS, rows), "calibration-bins.csv": csv_bytes(BIN_COLUMNS, bin_rows)}


def _cell(value: Any) -> Any:
    return number(value) if isinstance(value, float) else value


def summary(score: np.ndarray, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of `COLUMNS` for each method, from the scores (split, method, measure)."""
    by_name = {name: score[..., at] for at, name in enumerate(MEASURES)}
    as_it_is = by_name["accuracy"][:, methods.index("uncalibrated")]
    rows = []
    for m, method in enumerate(methods):
        own = {name: values[:, m] for name, values in by_name.items()}
        row: dict[str, Any] = {"method": method, "splits": len(score)}
        row |= {name: float(own[name].mean()) for name in MEASURES}
        for name in RANGED:
            row |= zip((f"{name}_2.5", f"{name}_97.5"), map(float, np.quantile(own[name], [0.025, 0.975])), strict=True)
        row["accuracy_change"] = float((own["accuracy"] - as_it_is).mean())
        row["ece_below_temperature"] = np.nan
        if "temperature" in methods and method != "temperature":
            other = by_name["ece"][:, methods.index("temperature")]
            row["ece_below_temperature"] = float((own["ece"] < other).mean())
        rows.append(row)
    return rows


def network_facts(folder: Path, network: Manifest) -> NetworkFacts:
    """Read from a network's folder what calibration may depend on.

    That is the weights' names and shapes, and how the network was trained.
    """
    from safetensors import safe_open

    described = json.loads(verified_bytes(folder, "model.json", network.files))
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    outputs = [shape[0] for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1]
    recipe = described.get("recipe") or {}
    return NetworkFacts(
        depth=len(outputs),
        width=float(np.median(outputs[:-1])) if len(outputs) > 1 else None,
        parameters=described["parameters"],
        batch_norm=any(name.endswith("running_var") for name in shapes),
        weight_decay=recipe.get("weight_decay"),
        steps=recipe.get("steps"),
    )
