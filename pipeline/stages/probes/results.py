"""What the stage `probes` writes: probes.zarr, the table made from it, and facts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.stages.probes.tasks import ProbedLayer
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import Array, Reader
from pipeline.storage.tables import csv_bytes, number

COLUMNS = ("layer", "features", "shots", "positions", "draws", "units", "accuracy", "low", "high", "penalty")


class Probed(Record):
    """What the manifest of `probes` says.

    Attributes
    ----------
    counted : images that are fitted on, choose and judge.
    network_accuracy : of the network itself, on the images that judge; None where its logits of them are not stored, or
        are not of their classes.
    notes : what a reader has to know.
    """

    counted: dict[str, int]
    network_accuracy: float | None
    notes: list[str]

    @classmethod
    def of(cls, manifest: Manifest) -> Probed:
        return cls.read(manifest.result)


def layout(layers: int, features: int, shots: Sequence[str], draws: int, grid: int) -> dict[str, Array]:
    """Lay out one file for each layer, features and array, so that a task writes whole files."""
    by_shots, single = ("layer", "features", "shots"), ("layer", "features", "shots", "draw", "position")
    whole = layers, features, len(shots)
    every = (*whole, draws, grid**2)
    found = {
        name: Array(by_shots, whole, np.float64, (1, 1, len(shots)), fill=np.nan)
        for name in ("accuracy", "low", "high")
    }
    for name in ("probe_accuracy", "penalty"):
        found[name] = Array(single, every, np.float64, (1, 1, *every[2:]), fill=np.nan)
    for name, length in (("layer", layers), ("features", features), ("shots", len(shots))):
        found[name] = Array((name,), (length,), str, (length,), fill=None)
    for name in ("position_y", "position_x"):
        found[name] = Array(("layer", "position"), (layers, grid**2), np.int64, (layers, grid**2), fill=-1)
    found["units"] = Array(("layer",), (layers,), np.int64, (layers,))
    return found


def names(
    layers: Sequence[ProbedLayer], features: Sequence[str], shots: Sequence[str], grid: int
) -> dict[str, tuple[tuple[int, ...], np.ndarray]]:
    """Return the blocks that are of no single probe: names, where single positions are, units of each layer."""
    positions = np.full((2, len(layers), grid**2), -1)
    for row, layer in enumerate(layers):
        for at, vector in enumerate(each for each in layer.vectors if each.features == "spatial"):
            positions[:, row, at] = vector.y, vector.x
    return {
        "layer": ((0,), np.array([layer.name for layer in layers], object)),
        "features": ((0,), np.array(features, object)),
        "shots": ((0,), np.array(shots, object)),
        "position_y": ((0, 0), positions[0]),
        "position_x": ((0, 0), positions[1]),
        "units": ((0,), np.array([layer.info.shape[0] for layer in layers])),
    }


def table(store: Path, files: Files) -> bytes:
    """Make probes.csv from what is stored: the penalty is the middle one of the row's probes."""
    reader = Reader(store, files)
    found = {name: np.asarray(reader[name][:]) for name in reader.group.array_keys()}
    rows = []
    for row, layer in enumerate(found["layer"]):
        for column, features in enumerate(found["features"]):
            for at, shots in enumerate(found["shots"]):
                single, penalty = (found[name][row, column, at] for name in ("probe_accuracy", "penalty"))
                known = np.isfinite(single)
                if known.any():
                    counts = int(known.any(0).sum()), int(known.any(1).sum()), int(found["units"][row])
                    numbers = [number(float(found[name][row, column, at])) for name in ("accuracy", "low", "high")]
                    middle = np.sort(penalty[known])[(known.sum() - 1) // 2]
                    rows.append([layer, features, shots, *counts, *numbers, number(float(middle))])
    return csv_bytes(COLUMNS, rows)
