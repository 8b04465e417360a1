"""A results folder as xarray, for notebooks and further programs.

    results = pipeline.open_results("results")
    cnn = results["scenes"]["cnn"]
    cnn.units                                  # one row per unit, as in units.csv
    cnn["features.conv6"].iou["iou"]           # (unit, concept)

Stores are opened on access and read when they are computed (xarray over Dask), so opening a folder costs nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.errors import MicrotomeError, nearest
from pipeline.storage.tables import read_rows

if TYPE_CHECKING:
    import xarray as xr

Item = TypeVar("Item")


def open_results(path: str | Path) -> Results:
    """Open a results folder.

    Raises
    ------
    MicrotomeError
        If there is no such folder, or it holds no data set.
    """
    results = Results(Path(path))
    if not results.path.is_dir():
        raise MicrotomeError(f"{path}: no such folder; give the folder of `results:` in the configuration")
    if not len(results):
        raise MicrotomeError(f"{path}: no data set has been ingested here; run the workflow first")
    return results


class NotThereError(MicrotomeError, KeyError):
    """A results folder does not hold the requested item."""

    __str__ = Exception.__str__  # KeyError's own puts quotes around the message


class _Folder(Mapping[str, Item]):
    """A folder's contents, by name."""

    path: Path
    kind: str

    def names(self) -> list[str]:
        raise NotImplementedError

    def open(self, name: str) -> Item:
        raise NotImplementedError

    def __getitem__(self, name: str) -> Item:
        if name not in self.names():
            raise NotThereError(f"{self.path}: no {self.kind} {name!r}{nearest(name, self.names(), 5)}")
        return self.open(name)

    def __contains__(self, name: object) -> bool:
        return name in self.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path}: {', '.join(self.names())}>"


@dataclass(frozen=True, repr=False, eq=False)
class Results(_Folder["Dataset"]):
    """A results folder: data sets by name."""

    path: Path
    kind = "data set"

    def names(self) -> list[str]:
        return sorted(found.parent.name for found in self.path.glob("*/images.zarr"))

    def open(self, name: str) -> Dataset:
        return Dataset(self.path / name)

    @property
    def networks(self) -> dict[str, dict[str, Any]]:
        """`model.json` of every network: architecture, weights' sha256, preprocessing, accuracy, training curve."""
        return {
            file.parent.name: json.loads(file.read_text()) for file in sorted(self.path.glob("networks/*/model.json"))
        }

    @property
    def similarity(self) -> dict[str, xr.Dataset]:
        """cka, standard_error, neighbours and others (layer_a, layer_b) of every comparison, by its name."""
        return {file.parent.name: _open(file) for file in sorted(self.path.glob("similarity/*/cka.zarr"))}

    @property
    def randomization(self) -> dict[str, xr.Dataset]:
        """train_loss, test_accuracy, test_loss, test_ece and others (run, epoch) of every experiment, by its name."""
        return {file.parent.name: _open(file) for file in sorted(self.path.glob("randomization/*/curves.zarr"))}

    @property
    def audit(self) -> dict[str, dict[str, xr.Dataset]]:
        """value, low, high, control (network, method, measure) and others of every audit, by its name and data set."""
        found: dict[str, dict[str, xr.Dataset]] = {}
        for group in sorted(self.path.glob("audit/*/audit.zarr/*/zarr.json")):
            found.setdefault(group.parents[2].name, {})[group.parent.name] = _open(group.parent)
        return found

    @property
    def reports(self) -> dict[str, Path]:
        """The report page of every configuration, by its name."""
        return {file.parent.name: file for file in sorted(self.path.glob("report/*/index.html"))}


@dataclass(frozen=True, repr=False, eq=False)
class Dataset(_Folder["Network"]):
    """One data set: its images and label maps, and, by name, the networks that were dissected or explained on it."""

    path: Path
    kind = "dissected network"

    def names(self) -> list[str]:
        found = [*self.path.glob("*/layers.json"), *self.path.glob("*/attributions")]
        return sorted({each.parent.name for each in found})

    def open(self, name: str) -> Network:
        return Network(self.path / name)

    @cached_property
    def images(self) -> xr.Dataset:
        """image (image, channel, y, x) uint8, label, split, valid (image)."""
        return _open(self.path / "images.zarr")

    @cached_property
    def concepts(self) -> xr.Dataset:
        """label_map (image, category, y, x) uint16; attrs concepts {number: {name, category}}."""
        return _open(self.path / "concepts.zarr")

    @property
    def quarantine(self) -> list[dict[str, str]]:
        """image_id, path, reason of every refused image."""
        return _table(self.path / "quarantine.csv")


@dataclass(frozen=True, repr=False, eq=False)
class Network(_Folder["Layer"]):
    """One network on one data set: its logits and units, and its layers by name, in execution order."""

    path: Path
    kind = "layer"

    @cached_property
    def paths(self) -> dict[str, dict[str, str]]:
        """layers.json: the paths of each layer's stores."""
        from pipeline.stages.dissect.found import read_layer_paths

        return read_layer_paths(self.path / "layers.json")

    def names(self) -> list[str]:
        return list(self.paths)

    def open(self, name: str) -> Layer:
        return Layer(self.path.parent, name, self.paths[name])

    @cached_property
    def logits(self) -> xr.Dataset:
        """logits (image, class) float32; NaN where a shard was not extracted. A network without a head has none."""
        path = self.path / "logits.zarr"
        if not path.is_dir() and (self.path / "layers.json").is_file():
            raise MicrotomeError(f"{path} is not there: {self.path.name} has no head")
        return _open(path)

    @cached_property
    def ablation(self) -> dict[str, xr.Dataset]:
        """By layer: what each class loses without each unit, and without sets of units; empty without ablation."""
        store = self.path / "ablation.zarr"
        if not store.is_dir():
            return {}
        attrs = _open(store).attrs
        return {name: _open(store / attrs.get("groups", {}).get(name, name)) for name in attrs["layers"]}

    @cached_property
    def calibration(self) -> xr.Dataset:
        """score (split, calibration, measure); count, correct, confidence (split, calibration, bin).

        The uncalibrated network's own, over all images: all_count, all_correct, all_confidence (bin).
        """
        return _open(self.path / "calibration.zarr")

    @cached_property
    def sight(self) -> xr.Dataset:
        """How the network sees images, as far as it was measured and the network has it.

        Receptive fields (layer, y, x), attention_distance (attention, head), skip_ratio and accuracy_loss (skip),
        localisation (output, input). `attrs["absent"]` says why a measure is missing; `receptive_note`,
        `attrs["skips_not_read"]` and `attrs["attention_not_read"]` say what the others leave out.
        """
        return _open(self.path / "sight.zarr")

    @cached_property
    def probes(self) -> xr.Dataset:
        """accuracy, low, high (layer, features, shots) of linear probes; probe_accuracy, penalty of single probes."""
        return _open(self.path / "probes.zarr")

    @cached_property
    def attributions(self) -> dict[str, dict[str, xr.Dataset]]:
        """By experiment and method: attribution (image, y, x), target, score and residual (image)."""
        found: dict[str, dict[str, xr.Dataset]] = {}
        for store in self._maps("attributions/*/*.zarr", relevance=False):
            found.setdefault(store.parent.name, {})[store.stem] = _open(store)
        return found

    @cached_property
    def relevance(self) -> dict[str, dict[str, dict[str, xr.Dataset]]]:
        """By experiment, method and layer: relevance (image, unit) of the layers that LRP names."""
        found: dict[str, dict[str, dict[str, xr.Dataset]]] = {}
        for store in self._maps("attributions/*/*-relevance.zarr", relevance=True):
            groups = _open(store).attrs["groups"]
            of_layers = {layer: _open(store / group) for layer, group in groups.items()}
            found.setdefault(store.parent.name, {})[store.stem.removesuffix("-relevance")] = of_layers
        return found

    @cached_property
    def visualizations(self) -> dict[str, dict[str, dict[str, xr.Dataset]]]:
        """By experiment, store and layer (or score, or module): what units and classes want to see."""
        return self._grouped("visualizations/*/*.zarr")

    @cached_property
    def attacks(self) -> dict[str, dict[str, dict[str, xr.Dataset]]]:
        """By experiment, store and pair of classes: attacked images, and the units that they move."""
        return self._grouped("attacks/*/*.zarr")

    def _grouped(self, pattern: str) -> dict[str, dict[str, dict[str, xr.Dataset]]]:
        """Return stores with groups, by experiment and store, each group by name."""
        found: dict[str, dict[str, dict[str, xr.Dataset]]] = {}
        for store in sorted(self.path.glob(pattern)):
            groups = _open(store).attrs["groups"]
            found.setdefault(store.parent.name, {})[store.stem] = {
                layer: _open(store / group) for layer, group in groups.items()
            }
        return found

    @cached_property
    def interventions(self) -> dict[str, dict[str, xr.Dataset]]:
        """By experiment, of a generator: `trials`, what its images lose without some units, and `ranking` of units."""
        found: dict[str, dict[str, xr.Dataset]] = {}
        for store in sorted(self.path.glob("interventions/*/*.zarr")):
            found.setdefault(store.parent.name, {})[store.stem] = _open(store)
        return found

    def _maps(self, pattern: str, relevance: bool) -> list[Path]:
        """Return the stores of attributions, those of the maps of methods or those of the relevance of units."""
        return [each for each in sorted(self.path.glob(pattern)) if ("groups" in _open(each).attrs) == relevance]

    @property
    def units(self) -> list[dict[str, Any]]:
        """units.csv, one row per unit: numbers as numbers, blank cells as None."""
        from pipeline.stages.dissect.found import read_unit_rows

        return read_unit_rows(self.path / "units.csv")

    @property
    def units_permuted(self) -> list[dict[str, Any]]:
        """The same for the control with permuted label maps; empty if there is none."""
        from pipeline.stages.dissect.found import read_unit_rows

        file = self.path / "units-permuted.csv"
        return read_unit_rows(file) if file.exists() else []


@dataclass(frozen=True)
class Layer:
    """One layer of a network: its stores, shared by all networks with the same layer."""

    dataset: Path
    name: str
    paths: Mapping[str, str]

    @property
    def id(self) -> str:
        return self.paths["id"]

    @cached_property
    def activations(self) -> xr.Dataset:
        """activation (image, unit, y, x) float16, to be multiplied by attrs["scale"]; maximum, mean (image, unit)."""
        return _open(self.dataset / self.paths["activations"])

    @cached_property
    def thresholds(self) -> xr.Dataset:
        """threshold (unit) float32; active (unit) int64."""
        return _open(self.dataset / self.paths["thresholds"])

    @cached_property
    def iou(self) -> xr.Dataset:
        """intersection, iou (unit, concept); unit_area (unit); concept_area (concept)."""
        return _open(self.dataset / self.paths["iou"])

    @cached_property
    def counts(self) -> xr.Dataset:
        """The counts behind the IoU, by jackknife group and category."""
        return _open((self.dataset / self.paths["iou"]).with_name("counts.zarr"))


def _open(path: Path) -> xr.Dataset:
    import xarray as xr

    from pipeline.storage.engine import Located

    if not path.is_dir():
        raise MicrotomeError(f"{path} is not there; run the workflow first")
    return xr.open_zarr(Located(path, read_only=True))


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(read_rows(file))
