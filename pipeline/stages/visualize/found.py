"""What the stage `visualize` found, as pages read it: groups of pictures, with what each reached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kernels.visualization.filters import ALIKE
from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Experiment, file_names
from pipeline.stages.visualize.results import FILTERS, PROJECTIONS, Drawn, Visualized
from pipeline.stages.visualize.settings import UNSWITCHED
from pipeline.storage.manifest import Manifest, latest
from pipeline.storage.store import StoreRef

SHOWN = 64
"""Units of a layer, and classes, that a page shows."""
TITLES = {"pixels": "pixels", "maco": "MACO", "logit": "S_c", "log_probability": "log P_c"}


@dataclass(frozen=True)
class Pictured:
    """Units of a layer, or classes, by one way of making pictures.

    Attributes
    ----------
    store : the group, with the files that the manifest lists.
    numbers : (row,) units or classes. reached, started : (row, restart). best : (row,).
    data_maximum, threshold : (row,).
    """

    facts: Drawn
    store: StoreRef
    way: str
    numbers: np.ndarray
    reached: np.ndarray
    started: np.ndarray
    best: np.ndarray
    data_maximum: np.ndarray
    threshold: np.ndarray

    @property
    def of_units(self) -> bool:
        return not self.facts.store.startswith("class-models-")

    @property
    def value(self) -> np.ndarray:
        """(row,) the score of each picture."""
        return self.reached.max(1)

    @property
    def beats(self) -> np.ndarray:
        """(row,) bool: above the best image of the data."""
        return self.value > self.data_maximum

    @property
    def ratio(self) -> np.ndarray:
        """(row,) score over the highest of the data; NaN unless that is positive."""
        return np.where(
            self.data_maximum > 0, self.value / np.where(self.data_maximum > 0, self.data_maximum, 1), np.nan
        )


@dataclass(frozen=True)
class ProjectedLayer:
    """Projections of units of a layer: the group's store, and what was read of it besides the maps."""

    facts: Drawn
    store: StoreRef
    numbers: np.ndarray
    methods: list[str]
    reach: str


@dataclass(frozen=True)
class FirstLayer:
    """The filters of a convolution that reads the image itself."""

    facts: Drawn
    filters: np.ndarray
    dead: np.ndarray
    similarity: np.ndarray
    aliasing: np.ndarray
    stride: tuple[int, int]

    @property
    def kernel(self) -> tuple[int, int]:
        return self.filters.shape[2], self.filters.shape[3]

    @property
    def alike(self) -> float:
        """The share of near-duplicates."""
        return float(np.mean(np.nan_to_num(self.similarity) > ALIKE))

    @property
    def alias(self) -> float:
        """The mean share of a filter's energy above the Nyquist frequency of the stride; NaN without any energy."""
        known = self.aliasing[~np.isnan(self.aliasing)]
        return float(known.mean()) if known.size else float("nan")


@dataclass(frozen=True)
class Visualizations:
    """One experiment on a network and a data set.

    Attributes
    ----------
    pictured, projected, first : the groups of pictures, in the order of the configuration.
    notes : what was left out, and why.
    """

    dataset: str
    network: str
    experiment: str
    pictured: list[Pictured]
    projected: list[ProjectedLayer]
    first: list[FirstLayer]
    notes: list[str]

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose units are shown."""
        units = [one.facts.subject for one in self.pictured if one.of_units]
        return list(dict.fromkeys([*units, *(one.facts.subject for one in self.projected)]))

    def of_layer(self, layer: str) -> list[Pictured]:
        return [one for one in self.pictured if one.of_units and one.facts.subject == layer]

    def projections(self, layer: str) -> ProjectedLayer | None:
        return next((one for one in self.projected if one.facts.subject == layer), None)

    @property
    def of_classes(self) -> list[Pictured]:
        return [one for one in self.pictured if not one.of_units]

    def units(self, layer: str) -> list[int]:
        """Return the units of a layer that a page shows, in the order of the configuration."""
        of_layer, projected = self.of_layer(layer), self.projections(layer)
        groups = [one.numbers for one in of_layer] + ([projected.numbers] if projected is not None else [])
        return list(dict.fromkeys(int(each) for group in groups for each in group))[:SHOWN]


def read_visualizations(results: Path, dataset: str, network: str, experiment: str, id: str = "") -> Visualizations:
    """Read an experiment without its pictures, verified.

    Raises
    ------
    MicrotomeError
        If there is none that finished, or a store is not what the stage writes.
    """
    folder = results / dataset / network / "visualizations" / experiment
    try:
        done = folder / "done"
        manifest = Manifest.read(done / f"visualize.{id}.json") if id else latest(done, "visualize")
        if manifest is None:
            raise FileNotFoundError(f"no manifest in {done}")
        made = Visualized.read(manifest.result)
        pictured, projected, first = [], [], []
        for facts in made.drawn:
            store = StoreRef.of_manifest(folder, f"{facts.store}.zarr/{facts.group}", manifest.files)
            reader = store.open()
            if facts.store == FILTERS:
                weights, dead, alike, share = (
                    np.asarray(reader[name][:]) for name in ("filter", "dead", "similarity", "aliasing")
                )
                down, right = reader.attrs["stride"]
                first.append(FirstLayer(facts, weights, dead, alike, share, (down, right)))
            elif facts.store == PROJECTIONS:
                methods = [str(each) for each in reader["method"][:]]
                numbers = np.asarray(reader["unit"][:])
                projected.append(ProjectedLayer(facts, store, numbers, methods, str(reader.attrs["reach"])))
            else:
                numbers = np.asarray(reader["class" if facts.store.startswith("class-models-") else "unit"][:])
                columns = ("reached", "started", "best", "data_maximum", "threshold")
                values = [np.asarray(reader[name][:]) for name in columns]
                pictured.append(Pictured(facts, store, str(reader.attrs["way"]), numbers, *values))
        return Visualizations(dataset, network, experiment, pictured, projected, first, made.notes)
    except (FileNotFoundError, KeyError, IndexError, ValueError) as error:
        raise MicrotomeError(
            f"{folder} is not what the stage `visualize` writes ({error}): run `make verify`"
        ) from error


def read_rows(store: StoreRef, name: str, rows: Sequence[int]) -> np.ndarray:
    """Return some rows of an array of a group."""
    array = store.open()[name]
    return np.asarray(array[min(rows) : max(rows) + 1])[np.asarray(rows) - min(rows)]


def switches_cosine(projected: ProjectedLayer, rule: str) -> np.ndarray | None:
    """Return the cosine of each projection by a rule with that without switches, (projection,); None without both."""
    if not {rule, rule + UNSWITCHED} <= set(projected.methods):
        return None
    places = [projected.methods.index(each) for each in (rule, rule + UNSWITCHED)]
    found = []
    for row in range(len(projected.numbers)):
        maps = read_rows(projected.store, "projection", [row])[0][:, places].astype(np.float64) - 128
        one, other = maps.reshape(*maps.shape[:2], -1).transpose(1, 0, 2)
        length = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        found.append(((one * other).sum(1) / np.where(length > 0, length, 1))[length > 0])
    return np.concatenate([*found, np.zeros(0)])


# In a report ----------------------------------------------------------------------------------------------------------


def visualizations(experiment: Experiment) -> dict[tuple[str, str], list[Visualizations]]:
    """Return the experiments of each data set and network, in configuration order."""
    return experiment.once(_visualizations)


def _visualizations(experiment: Experiment) -> dict[tuple[str, str], list[Visualizations]]:
    found: dict[tuple[str, str], list[Visualizations]] = {}
    for one in experiment.of_stage("visualize"):
        key = str(one.dataset), str(one.network)
        found.setdefault(key, []).append(read_visualizations(experiment.results, *key, str(one.experiment), one.id))
    return found


def control_of(experiment: Experiment, one: Visualizations) -> Visualizations | None:
    """Return the same experiment on the untrained network, if there is one."""
    others = visualizations(experiment).get((one.dataset, one.network + UNTRAINED), [])
    return next((each for each in others if each.experiment == one.experiment), None)


def page_of(experiment: Experiment, dataset: str, network: str) -> str:
    """Return the file of the page with a network's pictures; empty if there is none."""
    names = file_names(visualizations(experiment))
    return f"visualization-{names[dataset, network]}.html" if (dataset, network) in names else ""


def folder_of(experiment: Experiment, dataset: str, network: str, number: int) -> str:
    """Return the folder of the pictures of a network's experiment, with the beginning of their names."""
    page = page_of(experiment, dataset, network)
    return f"visualizations/{page.removeprefix('visualization-').removesuffix('.html')}/{number}-"


def wanted_by(experiment: Experiment, dataset: str, network: str) -> Mapping[str, dict[int, list[Any]]]:
    """Return by layer and unit: the file of its pictures, how many they are, and what they reach, for readers.

    Of several experiments, the first that has a unit counts.
    """
    found: dict[str, dict[int, list[Any]]] = {}
    for number, one in enumerate(visualizations(experiment).get((dataset, network), [])):
        folder = folder_of(experiment, dataset, network, number)
        for at, layer in enumerate(one.layers):
            pictured = one.of_layer(layer)
            for unit in one.units(layer) if pictured else ():
                told = [said for each in pictured if (said := reached_by(each, unit))]
                found.setdefault(layer, {}).setdefault(unit, [f"{folder}{at}-{unit:04d}.jpg", len(pictured), told])
    return found


def reached_by(pictured: Pictured, unit: int) -> str:
    """Say what a unit's picture reaches, beside the data and the threshold; empty if the unit has none."""
    rows = np.flatnonzero(pictured.numbers == unit)
    if not len(rows):
        return ""
    row = int(rows[0])
    threshold = float(pictured.threshold[row])
    about = f", threshold {threshold:.3g}" if threshold == threshold else ""
    beside = "" if pictured.beats[row] else ": no better than the best image"
    return (
        f"{TITLES.get(pictured.way, pictured.way)} {pictured.value[row]:.3g} (best image of the data "
        f"{pictured.data_maximum[row]:.3g}{about}){beside}"
    )
