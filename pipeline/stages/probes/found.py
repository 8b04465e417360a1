"""What the stage `probes` found, as the report reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.stages.probes.results import Probed
from pipeline.stages.probes.settings import Fitting
from pipeline.stages.probes.tasks import FULL
from pipeline.storage.read_back import open_store


@dataclass(frozen=True)
class Probes:
    """The probes of one network on one data set.

    Attributes
    ----------
    layers, features, shots : names of the axes of `accuracy`, `low` and `high`; features that no layer has are left
        out, and shots that were not fitted.
    fitting : on which images, and how. facts : of these images and the network.
    """

    dataset: str
    network: str
    layers: list[str]
    features: list[str]
    shots: list[str]
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    fitting: Fitting
    facts: Probed

    def at(self, layer: int, features: str, shots: str) -> tuple[float, float, float]:
        """Return an accuracy and the ends of its interval."""
        place = layer, self.features.index(features), self.shots.index(shots)
        return float(self.accuracy[place]), float(self.low[place]), float(self.high[place])

    def best_features(self, layer: int) -> str:
        """Return those of a layer that probes of all images read best."""
        return self.features[int(np.nanargmax(self.accuracy[layer, :, self.shots.index(FULL)]))]


def read_probes(results: Path, dataset: str, network: str) -> Probes:
    """Read probes.zarr, verified."""
    store = open_store(results / dataset / network / "probes.zarr")
    names = {name: [str(each) for each in np.asarray(store[name][:])] for name in ("layer", "features", "shots")}
    values = {name: np.asarray(store[name][:]) for name in ("accuracy", "low", "high")}
    known = np.isfinite(values["accuracy"])
    features = np.flatnonzero(known.any((0, 2)))
    shots = np.flatnonzero(known.any((0, 1)))
    kept = {name: value[:, features][:, :, shots] for name, value in values.items()}
    return Probes(
        dataset,
        network,
        names["layer"],
        [names["features"][at] for at in features],
        [names["shots"][at] for at in shots],
        kept["accuracy"],
        kept["low"],
        kept["high"],
        Fitting.read(store.attrs),
        Probed.read(store.attrs),
    )
