"""What the stage `attack` writes: stores with a group for each pair of classes, and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.storage.record import Record
from pipeline.storage.store import Array, StoreRef
from pipeline.storage.tables import csv_bytes

NOT_CHOSEN, WRONG, FAILED, SUCCEEDED = -1, 0, 1, 2
"""States of an image: it has no part in the attack, it was not recognised before, or it was attacked."""
IMPORTANT = 4
"""Units that count as important to a class: those that `ablate` ranks first."""
RANDOM = 4
UNITS = "-units"
"""What the names of stores of units end with."""

TABLE, UNITS_TABLE, MOVED_TABLE, CHECKS_TABLE, PREDICTED_TABLE = (
    *("attacks.csv", "attack-units.csv", "attack-moved.csv", "attack-checks.csv", "attack-predicted.csv"),
)
OF_UNITS = (UNITS_TABLE, MOVED_TABLE, PREDICTED_TABLE)
"""Tables that are there only where `ablate` ranks units."""
COLUMNS = (
    *("attack", "method", "norm", "epsilon", "source", "target", "images", "attacked", "succeeded", "success"),
    *("success_low", "success_high", "mean_linf", "mean_l2", "median_l2_of_successes", "largest_excess"),
    "changed_by_noise",
)
UNIT_COLUMNS = (
    *("attack", "shown", "important_to", "rank", "images", "absolute", "absolute_low", "absolute_high"),
    *("signed", "signed_low", "signed_high", "standardised", "standardised_low", "standardised_high"),
)
MOVED_COLUMNS = (
    *("attack", "source", "target", "place", "unit", "images", "absolute", "signed"),
    *("rank_for_source", "rank_for_target"),
)
CHECK_COLUMNS = ("check", "attack", "compared_with", "images", "value", "other", "holds")
PREDICTED_COLUMNS = ("attack", "easy", "by", "images", "easy_images", "auroc", "low", "high")


class Reached(Record):
    """What an attack reached on a pair of classes.

    Attributes
    ----------
    group : of the pair in the attack's store. images : chosen ones of the source. attacked : those that were right.
    """

    attack: str
    group: str
    source: int | None
    target: int | None
    images: int
    attacked: int
    succeeded: int


class Attacked(Record):
    """The result in the manifest of `attack`.

    Attributes
    ----------
    layer : the one whose units were looked at; None if `ablate` ranks none. twin : whether they were also looked at in
        the untrained network. notes : what a reader has to know.
    """

    reached: list[Reached]
    layer: str | None
    twin: bool
    notes: list[str]


@dataclass(frozen=True)
class Layout:
    """The shape of an attack's store, a group for each pair: one chunk a shard of images.

    Attributes
    ----------
    images : slots. size : (channel, y, x). restarts : starts of the attack.
    """

    images: int
    shard_images: int
    size: tuple[int, int, int]
    restarts: int

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that tasks write."""
        return {
            "image": self._array(np.uint8, 0, ("channel", "y", "x"), self.size),
            "state": self._array(np.int8, NOT_CHOSEN),
            "predicted_before": self._array(np.int64, -1),
            "predicted": self._array(np.int64, -1),
            "predicted_noise": self._array(np.int64, -1),
            "linf": self._array(np.float32, np.nan),
            "l2": self._array(np.float32, np.nan),
            "excess": self._array(np.float32, np.nan),
            "margin": self._array(np.float32, np.nan),
            "first_step": self._array(np.int64, -1),
            "start_succeeded": self._array(np.int8, NOT_CHOSEN, ("start",), (self.restarts,)),
        }

    def _array(self, dtype: Any, fill: Any, dims: tuple[str, ...] = (), shape: tuple[int, ...] = ()) -> Array:
        return Array(("image", *dims), (self.images, *shape), dtype, (self.shard_images, *shape), fill=fill)


@dataclass(frozen=True)
class UnitLayout:
    """The shape of a store of units, a group for each pair.

    Attributes
    ----------
    units : of the layer. size : (y, x) of its maps. ranked : units of whose maps the change is kept.
    twin : whether the untrained network is looked at too.
    """

    images: int
    shard_images: int
    units: int
    size: tuple[int, int]
    ranked: int
    twin: bool

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that tasks write."""
        peaks = ["peak", "peak_attacked", "peak_noise"]
        peaks += ["peak_untrained", "peak_attacked_untrained"] if self.twin else []
        found = {name: self._array(np.float32, np.nan, ("unit",), (self.units,)) for name in peaks}
        return found | {
            "change": self._array(np.float32, np.nan, ("ranked", "y", "x"), (self.ranked, *self.size)),
            "margin_before": self._array(np.float32, np.nan),
            "margin_without": self._array(np.float32, np.nan),
        }

    def _array(self, dtype: Any, fill: Any, dims: tuple[str, ...] = (), shape: tuple[int, ...] = ()) -> Array:
        return Array(("image", *dims), (self.images, *shape), dtype, (self.shard_images, *shape), fill=fill)


def whole(store: StoreRef, name: str) -> np.ndarray:
    """Return an array of all slots: shards without a chosen image were never written, and hold the fill value."""
    array = store.open()[name]
    found, step = np.full(array.shape, array.fill_value, array.dtype), array.chunks[0]
    for shard in store.shards(name):
        some = slice(shard * step, (shard + 1) * step)
        found[some] = array[some]
    return found


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    return csv_bytes(columns, rows)
