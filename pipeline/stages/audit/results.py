"""What the stage `audit` writes: numbers of each image, `audit.zarr` and `audit.csv`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.stages.audit.declared import Measure
from pipeline.storage.record import Record
from pipeline.storage.store import Array
from pipeline.storage.tables import csv_bytes, number

COLUMNS = (
    "dataset",
    "network",
    "method",
    "kind",
    "test",
    "measure",
    "value",
    "low",
    "high",
    "control",
    "images",
    "forwards",
    "state",
    "note",
)
CONCEPT_COLUMNS = ("dataset", "network", "method", "layer", "class", "concept", "relevance", "loss")
CONCEPTS = "audit-concepts.csv"
CELLS = "cells"
State = Literal["", "holds", "fails", "not defined", "refused"]


@dataclass(frozen=True)
class Name:
    """A cell's row: a method of the experiment, or a control, which is none."""

    name: str
    control: bool = False

    @property
    def told(self) -> str:
        """Its name in tables."""
        return f"control:{self.name}" if self.control else self.name

    def store(self, folder: Path, dataset: str, network: str, test: str) -> Path:
        """Return the store of its cell of a test; the results of no control and no method share a name."""
        inside = folder / CELLS / dataset / network / test
        return (inside / "controls" if self.control else inside) / f"{self.name}.zarr"


@dataclass(frozen=True)
class Cell:
    """The numbers of one method or control in one test. `name` is of the row, `store` where they are written."""

    test: str
    name: Name
    store: Path


@dataclass(frozen=True)
class Outcome:
    """One number of a cell.

    Attributes
    ----------
    measure : its name. value, low, high : with its 95 % interval, NaN where unknown.
    images : how many count. state : of a law. note : what a reader has to know of it.
    """

    measure: str
    value: float
    low: float = math.nan
    high: float = math.nan
    images: int = 0
    state: State = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """An outcome with what it is of. `kind` is the method of attribution, `control` the value of the test's control."""

    dataset: str
    network: str
    method: str
    kind: str
    test: str
    outcome: Outcome
    control: float
    forwards: float

    @property
    def cells(self) -> list[Any]:
        """The cells of `COLUMNS`."""
        found = self.outcome
        numbers = [number(each) for each in (found.value, found.low, found.high, self.control)]
        named = [self.dataset, self.network, self.method, self.kind, self.test, found.measure]
        return [*named, *numbers, found.images, number(self.forwards), found.state, found.note]


@dataclass(frozen=True)
class Shares:
    """What of the relevance of a layer's units for a class, and of its losses, is of units of each concept."""

    dataset: str
    network: str
    method: str
    layer: str
    of_class: str
    relevance: Mapping[str, float]
    loss: Mapping[str, float]


class Audited(Record):
    """The result in the manifest of `audit`.

    Attributes
    ----------
    attributions : the experiment. pairs : (data set, network). images : audited, by data set.
    tests : in their order. methods : of attribution by name, in their order. controls : their names.
    """

    attributions: str
    pairs: list[tuple[str, str]]
    images: dict[str, int]
    tests: list[str]
    methods: dict[str, str]
    controls: list[str]


def together(measures: Mapping[str, Measure]) -> dict[str, list[str]]:
    """Return the measures that each array of a cell's store holds.

    Those of equal dimensions share one, since every array of every shard is a file: `by_image` where an image has one
    number of each, else `by_<dimensions>`. A measure that shares its dimensions with no other is an array itself.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for name, measure in measures.items():
        found.setdefault(measure.dims, []).append(name)
    return {
        names[0] if len(names) == 1 else "_".join(("by", *(dims or ("image",)))): names for dims, names in found.items()
    }


def arrays(measures: Mapping[str, Measure], images: int, shard: int) -> dict[str, Array]:
    """Return the arrays of a cell's store, (image, ...) float64; an image that is not audited has NaN.

    The second dimension of an array of several measures is `<array>_measure`.
    """
    found = {}
    for array, names in together(measures).items():
        own = measures[names[0]]
        dims, shape = own.dims, own.shape
        if len(names) > 1:
            dims, shape = (f"{array}_measure", *dims), (len(names), *shape)
        found[array] = Array(("image", *dims), (images, *shape), np.float64, (shard, *shape), fill=np.nan)
    return found


def joined(measures: Mapping[str, Measure], numbers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a cell's store from the numbers of each measure, (image, ...)."""
    return {
        array: numbers[names[0]] if len(names) == 1 else np.stack([numbers[name] for name in names], 1)
        for array, names in together(measures).items()
    }


def parted(measures: Mapping[str, Measure], stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the numbers of each measure, (image, ...), from the arrays of a cell's store."""
    found = {}
    for array, names in together(measures).items():
        for at, name in enumerate(names):
            found[name] = stored[array] if len(names) == 1 else stored[array][:, at]
    return {name: found[name] for name in measures}


def concept_table(every: Iterable[Shares]) -> bytes:
    """Return audit-concepts.csv: a row for each concept."""
    return csv_bytes(CONCEPT_COLUMNS, concept_rows(every))


def concept_rows(every: Iterable[Shares]) -> Iterator[list[str]]:
    """Yield the cells of `CONCEPT_COLUMNS`."""
    for own in every:
        named = [own.dataset, own.network, own.method, own.layer, own.of_class]
        for concept in dict.fromkeys([*own.relevance, *own.loss]):
            yield [*named, concept, number(own.relevance.get(concept, 0.0)), number(own.loss.get(concept, 0.0))]


def table(rows: Sequence[Row]) -> bytes:
    return csv_bytes(COLUMNS, [row.cells for row in rows])


def cube(rows: Sequence[Row]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the arrays of one data set's group of audit.zarr, over (network, method, measure).

    `measure` is `<test>.<measure>`.
    """
    axes = ("network", "method", "measure")

    def place(row: Row) -> tuple[str, str, str]:
        return row.network, row.method, f"{row.test}.{row.outcome.measure}"

    labels = [list(dict.fromkeys(place(row)[at] for row in rows)) for at in range(3)]
    index = [{name: at for at, name in enumerate(each)} for each in labels]
    shape = tuple(map(len, labels))
    numbers = {name: np.full(shape, np.nan) for name in ("value", "low", "high", "control", "forwards")}
    images, state = np.zeros(shape, np.int64), np.full(shape, "", object)
    for row in rows:
        at = tuple(own[name] for own, name in zip(index, place(row), strict=True))
        for name in ("value", "low", "high"):
            numbers[name][at] = getattr(row.outcome, name)
        numbers["control"][at], numbers["forwards"][at] = row.control, row.forwards
        images[at], state[at] = row.outcome.images, row.outcome.state
    tests = np.array([name.partition(".")[0] for name in labels[2]], object)
    return {
        **{axis: ((axis,), np.array(own, object)) for axis, own in zip(axes, labels, strict=True)},
        "test": (("measure",), tests),
        **{name: (axes, values) for name, values in numbers.items()},
        "images": (axes, images),
        "state": (axes, state),
    }


def by_image(
    cells: Mapping[tuple[str, str, str], tuple[np.ndarray, np.ndarray]], ids: np.ndarray
) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Return the numbers of each image, from (slots, numbers), (image,) each, by (network, method, `<test>.<measure>`).

    The images are all that some cell has, by slot: networks and tests may have different ones. `ids` are of all slots.
    """
    labels = [list(dict.fromkeys(key[at] for key in cells)) for at in range(3)]
    every = np.unique(np.concatenate([slots for slots, _ in cells.values()]))
    values = np.full((*map(len, labels), len(every)), np.nan)
    for key, (slots, numbers) in cells.items():
        at = tuple(each.index(name) for each, name in zip(labels, key, strict=True))
        values[at][np.searchsorted(every, slots)] = numbers
    axes = ("image_network", "image_method", "image_measure")
    return {
        **{axis: ((axis,), np.array(own, object)) for axis, own in zip(axes, labels, strict=True)},
        "by_image": ((*axes, "image"), values),
        "slot": (("image",), np.asarray(every, np.int64)),
        "image_id": (("image",), np.asarray(ids[every], object)),
    }
