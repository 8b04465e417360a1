"""What the report reads from a results folder: one network, its layers, its units and its controls."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

import zarr

from pipeline.errors import MicrotomeError
from pipeline.stages.dissect.stage import UNIT_COLUMNS as COLUMNS
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import recorded, recorded_files
from pipeline.storage.store import Located, Reader


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


class Store(Protocol):
    """A zarr store opened for reading."""

    @property
    def attrs(self) -> Mapping[str, Any]: ...

    def __getitem__(self, name: str) -> Any: ...


def open_store(path: Path) -> Store:
    """Open a zarr store for reading: the one place through which the report reaches stores.

    Its chunks are verified where a manifest says what was written.
    """
    recorded = recorded_files(path)
    if recorded:
        return Reader(path, recorded)
    try:
        return zarr.open_group(Located(path, read_only=True), mode="r", use_consolidated=False)
    except FileNotFoundError:
        raise MicrotomeError(f"the report needs the store {path}, which does not exist; dissect the network") from None


def _read_json(file: Path) -> dict[str, Any]:
    with read_text(file) as stream:
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            raise MicrotomeError(f"{file} is not JSON ({error}); make it again") from None
    if not isinstance(content, dict):
        raise MicrotomeError(f"{file} holds a {type(content).__name__}, a JSON object was expected; make it again")
    return content


def read_text(file: Path) -> IO[str]:
    """A table or a JSON file, as text, if it is what its manifest says was written."""
    written = recorded(file)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        todo = "run `make repair`" if written else "dissect the network first"
        raise MicrotomeError(f"the report needs {file}, which does not exist; {todo}") from None
    if written is not None and written != (len(data), crc32c(data)):
        raise MicrotomeError(
            f"{file} is not what was written; run `make verify` to find all damage and `make repair` to make only "
            f"these again"
        )
    try:
        return io.StringIO(data.decode(), newline="")
    except UnicodeDecodeError as error:
        raise MicrotomeError(f"{file} is not text in UTF-8 ({error}); make it again") from None
