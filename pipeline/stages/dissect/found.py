"""Read a dissected network from a results folder: its layers, its units and its controls."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.report.experiment import DissectedPair, Experiment
from pipeline.report.words import plural
from pipeline.stages.dissect.counting import (
    ConceptCount,
    LayerCount,
    Unit,
    categories,
    count_concepts,
    count_detectors,
)
from pipeline.stages.dissect.results import UNIT_COLUMNS as COLUMNS
from pipeline.storage.manifest import recorded
from pipeline.storage.read_back import open_store, read_json, read_text
from pipeline.storage.tables import read_rows

NUMBERS = COLUMNS[4:]


@dataclass(frozen=True)
class DissectedLayer:
    """One layer of a network, with the stores that hold its numbers."""

    name: str
    id: str
    activations: Path
    thresholds: Path
    iou: Path
    settings: dict[str, Any]
    """Attributes of the IoU store: method, quantile, positions, border, min_iou, images, ..."""
    concepts: int
    shown: Path | None = None
    """For a streamed layer: what was kept for pictures."""
    coarse: frozenset[int] = frozenset()
    """Units of which fewer than 8 bits are stored."""


@dataclass(frozen=True)
class Dissection:
    """One network dissected on one data set. `layers` are in execution order."""

    dataset: str
    network: str
    layers: list[DissectedLayer]
    units: list[Unit]
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def min_iou(self) -> float:
        return float(self.layers[-1].settings["min_iou"])


def read_dissection(results: Path, dataset: str, network: str) -> Dissection:
    """Read `layers.json`, `units.csv` and `model.json` of one network, without reading an array.

    Raises
    ------
    MicrotomeError
        If a file is missing or violates the results contract.
    """
    folder = results / dataset / network
    layers = read_layers(results / dataset, folder / "layers.json")
    units = read_units(folder / "units.csv", [layer.name for layer in layers])
    model_file = results / "networks" / network / "model.json"
    model = read_json(model_file) if model_file.exists() or recorded(model_file) else {}
    return Dissection(dataset, network, layers, units, model)


def read_layer_paths(file: Path) -> dict[str, dict[str, Any]]:
    """Read a `layers.json`: the paths of each layer's stores, in execution order; the stores may be gone."""
    return read_json(file)


def read_layers(dataset_folder: Path, file: Path) -> list[DissectedLayer]:
    """Read the layers of one network, in execution order, with the settings of its IoU."""
    layers = []
    for name, paths in read_layer_paths(file).items():
        missing = {"id", "activations", "thresholds", "iou"} - set(paths)
        if missing:
            raise MicrotomeError(
                f"{file}: layer {name!r} lacks {', '.join(sorted(missing))}; dissect the network again"
            )
        iou = open_store(dataset_folder / paths["iou"])
        if "min_iou" not in iou.attrs:
            raise MicrotomeError(
                f"{dataset_folder / paths['iou']} does not say its `min_iou`; dissect the network again"
            )
        layers.append(
            DissectedLayer(
                name=name,
                id=paths["id"],
                activations=dataset_folder / paths["activations"],
                thresholds=dataset_folder / paths["thresholds"],
                iou=dataset_folder / paths["iou"],
                settings=dict(iou.attrs),
                concepts=iou["iou"].shape[1],
                shown=dataset_folder / paths["shown"] if "shown" in paths else None,
                coarse=frozenset(paths.get("coarse", ())),
            )
        )
    if not layers:
        raise MicrotomeError(f"{file} names no layer; a report needs at least one: add `layers` to the network")
    return layers


def read_units(file: Path, layers: Sequence[str]) -> list[Unit]:
    """Read the units of a `units.csv`. A layer outside `layers` is an error: the files belong to different runs."""
    units = []
    for number, row in enumerate(read_unit_rows(file), start=1):
        if row["layer"] not in layers:
            raise MicrotomeError(
                f"{file}, row {number}: layer {row['layer']!r} is not in layers.json ({', '.join(layers)}); "
                "the two files come from different runs: dissect the network again"
            )
        numbers = {name: math.nan if row[name] is None else row[name] for name in NUMBERS}
        units.append(Unit(row["layer"], row["unit"], row["concept"], row["category"], **numbers))
    return units


def read_unit_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of a `units.csv`: numbers as numbers, blank cells as None.

    Raises
    ------
    MicrotomeError
        A column is missing, or a cell is no number.
    """
    with read_text(file) as stream:
        missing = set(COLUMNS) - set(next(csv.reader(stream), ()))
        if missing:
            raise MicrotomeError(f"{file} lacks the columns {', '.join(sorted(missing))}; dissect the network again")
        stream.seek(0)
        rows: list[dict[str, Any]] = list(read_rows(stream))
    for number, row in enumerate(rows, start=1):
        try:
            row["unit"] = int(row["unit"])
            row |= {name: float(row[name]) if row[name] else None for name in NUMBERS}
        except (TypeError, ValueError) as error:
            raise MicrotomeError(f"{file}, row {number}: {error}; dissect the network again") from None
    return rows


@dataclass(frozen=True)
class Network:
    """A network and its controls. `runs` holds the units of each run: `trained`, `untrained`, `permuted`."""

    trained: Dissection
    untrained: Dissection | None
    runs: dict[str, list[Unit]]
    permuted_images: int | None

    @cached_property
    def counts(self) -> dict[str, list[LayerCount]]:
        """Detectors of every layer, by run."""
        return {run: count_detectors(units, self.trained.layer_names) for run, units in self.runs.items()}

    @cached_property
    def category_names(self) -> dict[str, str]:
        """Short names of the categories with a detector in any run, in the order of their colours."""
        return short_names(categories(count for run in self.counts.values() for count in run))

    @cached_property
    def concepts(self) -> list[ConceptCount]:
        """Detectors per concept."""
        return count_concepts(self.trained.units, self.trained.layers[-1].name)

    @property
    def last(self) -> dict[str, LayerCount]:
        """The counts of the last layer, by run."""
        return {run: counts[-1] for run, counts in self.counts.items()}

    @property
    def detectors(self) -> int:
        """Detectors of the trained network in all layers."""
        return sum(count.detectors for count in self.counts["trained"])

    @property
    def settings(self) -> dict[str, Any]:
        """Attributes that all layers' IoU stores share."""
        first, *others = [layer.settings for layer in self.trained.layers]
        return {
            key: first[key]
            for key in sorted(first)
            if all(other.get(key) == first[key] for other in others) and key != "coordinates"
        }

    def iou(self) -> dict[str, dict[str, list[float]]]:
        """IoU of every unit, by run and layer."""
        found: dict[str, dict[str, list[float]]] = {}
        for run, units in self.runs.items():
            found[run] = {layer: [] for layer in self.trained.layer_names}
            for unit in units:
                found[run][unit.layer].append(unit.iou)
        return found


def networks(experiment: Experiment) -> list[Network]:
    """Return the dissected networks of an experiment, in the order of the configuration."""
    return experiment.once(_networks)


def _networks(experiment: Experiment) -> list[Network]:
    return [read_network(experiment.results, one) for one in experiment.dissected]


def read_network(results: Path, one: DissectedPair) -> Network:
    """Read one network and its controls."""
    trained = read_dissection(results, one.dataset, one.network)
    runs = {"trained": trained.units}
    untrained = None
    if one.control is not None:
        untrained = read_dissection(results, one.dataset, one.control)
        _same_layers(trained, untrained)
        runs["untrained"] = untrained.units
    permuted = results / one.dataset / one.network / "units-permuted.csv"
    if permuted.exists() or recorded(permuted):
        runs["permuted"] = read_units(permuted, trained.layer_names)
    return Network(trained, untrained, runs, one.permuted_images)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Return categories without their source (`truth/object` -> `object`), unless two would coincide."""
    tails = [name.partition("/")[2] or name for name in names]
    return dict(zip(names, tails if len(set(tails)) == len(tails) else names, strict=True))


def _same_layers(trained: Dissection, untrained: Dissection) -> None:
    if trained.layer_names != untrained.layer_names:
        raise MicrotomeError(
            f"{untrained.network} was cut at {', '.join(untrained.layer_names)}, but {trained.network} at "
            f"{', '.join(trained.layer_names)}; a control needs the same layers: dissect both with one configuration"
        )


def lead(experiment: Experiment) -> str:
    """Return one sentence for a newcomer: what was dissected in all."""
    found = networks(experiment)
    if not found:
        run = {network for _, network in experiment.pairs}
        return f"{plural(len(run), 'network')}, none of them dissected." if run else "This report shows no network."
    layers = sum(len(network.trained.layers) for network in found)
    units = sum(len(network.trained.units) for network in found)
    were, their = ("was", "its") if len(found) == 1 else ("were", "their")
    return (
        f"{plural(len(found), 'network')} {were} cut into {plural(layers, 'layer')}, and each of {their} "
        f"{plural(units, 'unit')} compared with concepts whose place in the images is known."
    )
