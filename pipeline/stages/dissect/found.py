"""What the report reads from a results folder: one network, its layers, its units and its controls."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.stages.dissect.results import UNIT_COLUMNS as COLUMNS
from pipeline.storage.manifest import recorded
from pipeline.storage.read_back import _read_json, open_store, read_text


@dataclass(frozen=True)
class Unit:
    """One row of `units.csv`; numbers that the file leaves blank are NaN."""

    layer: str
    unit: int
    concept: str
    category: str
    iou: float
    iou_ceiling: float
    iou_held_out: float
    ci_low: float
    ci_high: float
    threshold: float
    activation_rate: float

    @property
    def detector(self) -> bool:
        """Whether the unit kept a label, which it does when its IoU exceeds `min_iou`."""
        return bool(self.concept)

    @property
    def share_of_ceiling(self) -> float:
        """IoU / ceiling: 1 means as good as a mask of this size can be. NaN without a ceiling."""
        return self.iou / self.iou_ceiling if self.iou_ceiling > 0 else math.nan


@dataclass(frozen=True)
class Layer:
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
    """Of a layer that is not stored: what was kept for pictures."""


@dataclass(frozen=True)
class Dissection:
    """One network dissected on one data set. `layers` are in execution order."""

    dataset: str
    network: str
    layers: list[Layer]
    units: list[Unit]
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def layer_names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    @property
    def min_iou(self) -> float:
        return float(self.layers[-1].settings["min_iou"])


def read_dissection(results: Path, dataset: str, network: str) -> Dissection:
    """Read `layers.json`, `units.csv` and `model.json` of one network; no array is read.

    Raises
    ------
    MicrotomeError
        When a file is missing or does not hold what the results contract says.
    """
    folder = results / dataset / network
    layers = read_layers(results / dataset, folder / "layers.json")
    units = read_units(folder / "units.csv", [layer.name for layer in layers])
    model_file = results / "networks" / network / "model.json"
    model = _read_json(model_file) if model_file.exists() or recorded(model_file) else {}
    return Dissection(dataset, network, layers, units, model)


def read_layer_names(file: Path) -> list[str]:
    """Names of the layers in a `layers.json`, in execution order; their stores need not be there any more."""
    return list(_read_json(file))


def read_layers(dataset_folder: Path, file: Path) -> list[Layer]:
    """The layers of one network, in execution order, with the settings that its IoU was counted under."""
    layers = []
    for name, paths in _read_json(file).items():
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
            Layer(
                name=name,
                id=paths["id"],
                activations=dataset_folder / paths["activations"],
                thresholds=dataset_folder / paths["thresholds"],
                iou=dataset_folder / paths["iou"],
                settings=dict(iou.attrs),
                concepts=iou["iou"].shape[1],
                shown=dataset_folder / paths["shown"] if "shown" in paths else None,
            )
        )
    if not layers:
        raise MicrotomeError(f"{file} names no layer; a report needs at least one: add `layers` to the network")
    return layers


def read_units(file: Path, layers: Sequence[str]) -> list[Unit]:
    """The rows of a `units.csv`. A layer that is not in `layers` is an error: the files belong to different runs."""
    with read_text(file) as stream:
        reader = csv.DictReader(stream)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise MicrotomeError(f"{file} lacks the columns {', '.join(sorted(missing))}; dissect the network again")
        rows = list(reader)
    units = []
    for number, row in enumerate(rows, start=1):
        if row["layer"] not in layers:
            raise MicrotomeError(
                f"{file}, row {number}: layer {row['layer']!r} is not in layers.json ({', '.join(layers)}); "
                "the two files come from different runs: dissect the network again"
            )
        try:
            numbers = {name: float(row[name]) if row[name] else math.nan for name in COLUMNS[4:]}
            units.append(Unit(row["layer"], int(row["unit"]), row["concept"], row["category"], **numbers))
        except (TypeError, ValueError) as error:
            raise MicrotomeError(f"{file}, row {number}: {error}; dissect the network again") from None
    return units
