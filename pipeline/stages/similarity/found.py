"""What the stage `similarity` found, as the report reads it, and the tables of its figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.stages.similarity.results import Compared
from pipeline.storage.read_back import open_store

MEASURES = (
    "cka", "standard_error", "influence", "cka_biased", "neighbours", "neighbours_standard_error", "procrustes",
    "procrustes_shuffled",
)  # fmt: skip
COLUMNS = ("network_a", "layer_a", "network_b", "layer_b", *MEASURES)
FRACTION_COLUMNS = ("fraction", "layer", "cka", "standard_error")


@dataclass(frozen=True)
class Similarity:
    """One comparison.

    Attributes
    ----------
    layers, networks : names of the rows of each measure (layer, layer), of all networks one after the other, and the
        network of each.
    settings : the attributes of the store.
    compared : what the manifest says.
    """

    name: str
    layers: list[str]
    networks: list[str]
    values: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    compared: Compared

    @property
    def distinct(self) -> list[str]:
        return list(dict.fromkeys(self.networks))

    @property
    def fractions(self) -> dict[str, float]:
        """The part of the images that each network was trained on, the smallest first; the last has all of them.

        Empty where they are no copies of one network.
        """
        copies = self.settings.get("fractions", {})
        return {name: copies.get(name, 1.0) for name in self.distinct} if copies else {}

    @property
    def panels(self) -> list[tuple[str, str]]:
        """Within each network, then between each two; of copies of a network, each with that."""
        names = self.distinct
        if self.fractions:
            return [(names[-1], names[-1])] + [(name, names[-1]) for name in names[:-1]]
        return [(name, name) for name in names] + [(a, b) for at, a in enumerate(names) for b in names[at + 1 :]]

    def rows_of(self, network: str) -> list[int]:
        return [at for at, name in enumerate(self.networks) if name == network]

    def block(self, measure: str, a: str, b: str) -> np.ndarray:
        """A measure of the layers of one network against those of another."""
        return self.values[measure][np.ix_(self.rows_of(a), self.rows_of(b))]


def read_similarity(results: Path, name: str, told: Mapping[str, Any]) -> Similarity:
    """Read a comparison; `told` is what its manifest says."""
    path = results / "similarity" / name / "cka.zarr"
    try:
        store = open_store(path)
        networks = [str(each) for each in np.asarray(store["network_a"])]
        titles = [str(each) for each in np.asarray(store["layer_a"])]
        values = {measure: np.asarray(store[measure]) for measure in MEASURES}
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise MicrotomeError(
            f"{path} is not what the stage `similarity` writes ({error}): run `make verify`"
        ) from error
    layers = [title.removeprefix(f"{network}/") for title, network in zip(titles, networks, strict=True)]
    return Similarity(name, layers, networks, values, dict(store.attrs), Compared.read(told))


def rows(found: Similarity) -> Iterator[Sequence[object]]:
    """Every pair of layers once, with all measures."""
    for a in range(len(found.layers)):
        for b in range(a, len(found.layers)):
            named = (found.networks[a], found.layers[a], found.networks[b], found.layers[b])
            yield (*named, *(float(found.values[measure][a, b]) for measure in MEASURES))


def same_layers(found: Similarity, copy: str) -> tuple[np.ndarray, np.ndarray]:
    """CKA of each layer of a copy with the same layer of the network itself, and its standard error."""
    whole = found.distinct[-1]
    return found.block("cka", copy, whole).diagonal(), found.block("standard_error", copy, whole).diagonal()


def fraction_rows(found: Similarity) -> Iterator[Sequence[object]]:
    """Each layer of each copy, with the same layer of the network itself."""
    for copy in found.distinct[:-1]:
        names = [found.layers[at] for at in found.rows_of(copy)]
        for name, value, error in zip(names, *same_layers(found, copy), strict=True):
            yield found.fractions[copy], name, float(value), float(error)
