"""What the stage `sight` found of a network, as the report reads it, and the tables of its figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.stages.sight.results import Attributes
from pipeline.storage.manifest import recorded_files
from pipeline.storage.store import Reader

REACH_COLUMNS = ("layer", "area", "radius", "radius_standard_error", "deviation_y", "deviation_x")
ATTENTION_COLUMNS = (
    "attention", "head", "distance", "distance_standard_error", "distance_renormalised",
    "distance_renormalised_standard_error",
)  # fmt: skip
RATIO_COLUMNS = (
    "skip", "branch", "shortcut", "ratio_special", "ratio_special_standard_error", "ratio_spatial",
    "ratio_spatial_standard_error",
)  # fmt: skip
REMOVED_COLUMNS = ("skip", "accuracy_loss", "accuracy_loss_standard_error", "layer", "cka", "cka_standard_error")
PLACE_COLUMNS = ("output", "output_y", "output_x", "input_y", "input_x", "cka", "standard_error")


@dataclass(frozen=True)
class Sight:
    """One network: its arrays by name, and the attributes of the store."""

    dataset: str
    network: str
    values: Mapping[str, np.ndarray]
    settings: Attributes

    def has(self, measure: str) -> bool:
        """Whether a measure was asked for, and the network has what it measures."""
        return measure in self.settings.measures and measure not in self.settings.absent

    def names(self, of: str) -> list[str]:
        return [str(each) for each in self.values[of]]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the layer whose positions are compared with patches."""
        assert self.settings.localised_grid is not None
        return self.settings.localised_grid

    @cached_property
    def reach(self) -> list[int]:
        """The layers with a receptive field."""
        return np.flatnonzero(~np.isnan(self.values["receptive_radius"])).tolist()


def read_sight(results: Path, dataset: str, network: str) -> Sight:
    """Read what was measured of a network, verified."""
    path = results / dataset / network / "sight.zarr"
    try:
        files = recorded_files(path)
        store = Reader(path, files)
        names = [name.removesuffix("/zarr.json") for name in files if name.endswith("/zarr.json")]
        found = Sight(
            dataset, network, {name: np.asarray(store[name][:]) for name in names}, Attributes.read(store.attrs)
        )
        for measure, array in (
            ("receptive_field", "receptive_field"),
            ("attention", "attention_distance"),
            ("skips", "skip_ratio"),
            ("localisation", "localisation"),
        ):
            if found.has(measure) and array not in found.values:
                raise KeyError(array)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise MicrotomeError(f"{path} is not what the stage `sight` writes ({error}): run `make verify`") from error
    return found


def reach_rows(found: Sight) -> Iterator[Sequence[object]]:
    names = ("area", "radius", "radius_standard_error", "deviation_y", "deviation_x")
    for at, layer in enumerate(found.names("layer")):
        yield (layer, *(float(found.values[f"receptive_{name}"][at]) for name in names))


def attention_rows(found: Sight) -> Iterator[Sequence[object]]:
    kinds = ("", "_standard_error", "_renormalised", "_renormalised_standard_error")
    values = [found.values[f"attention_distance{kind}"] for kind in kinds]
    for at, name in enumerate(found.names("attention")):
        for head in range(values[0].shape[1]):
            if not math.isnan(values[0][at, head]):
                yield (name, head, *(float(each[at, head]) for each in values))


def ratio_rows(found: Sight) -> Iterator[Sequence[object]]:
    numbers = ("special", "special_standard_error", "spatial", "spatial_standard_error")
    for at, name in enumerate(found.names("skip")):
        said = (str(found.values["skip_branch"][at]), str(found.values["skip_shortcut"][at]))
        yield (name, *said, *(float(found.values[f"skip_ratio_{each}"][at]) for each in numbers))


def removed_rows(found: Sight) -> Iterator[Sequence[object]]:
    loss = [found.values[name] for name in ("accuracy_loss", "accuracy_loss_standard_error")]
    cka = [found.values[f"cka_without_skip{ending}"] for ending in ("", "_standard_error")]
    for at, name in enumerate(found.names("skip")):
        for layer, title in enumerate(found.names("layer")):
            yield (name, *(float(each[at]) for each in loss), title, *(float(each[at, layer]) for each in cka))


def place_rows(found: Sight, outputs: Sequence[int]) -> Iterator[Sequence[object]]:
    """Every patch, for the outputs that a figure shows."""
    values = found.values
    for output in outputs:
        where = [int(values[f"output_{axis}"][output]) for axis in "yx"]
        for patch in range(values["localisation"].shape[1]):
            yield (
                output, *(each if each >= 0 else "" for each in where),
                int(values["input_y"][patch]), int(values["input_x"][patch]),
                float(values["localisation"][output, patch]),
                float(values["localisation_standard_error"][output, patch]),
            )  # fmt: skip
