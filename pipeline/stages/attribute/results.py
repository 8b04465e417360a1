"""What the stage `attribute` writes: a store per method, and a table of how well methods keep their laws."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from pipeline.config.networks import Network
from pipeline.stages.attribute.options import Options
from pipeline.storage.record import Record
from pipeline.storage.store import Array
from pipeline.storage.tables import csv_bytes, number

LIKELY = 0.05
"""Mean probability of the target for the baseline beyond which the baseline is no image without information.

At least twice that of chance."""
ROUNDING = 1e-3
"""Tolerance of laws that hold but for the rounding of float32."""
CANCELS = 10
"""Sum of magnitudes, in scores, beyond which most of the relevance cancels."""
BY_NODE = ("node_segment", "node_mean")
"""Numbers of each node of a tree."""
COLUMNS = (
    "name",
    "method",
    "law",
    "images",
    "residual_median",
    "residual_95",
    "residual_worst",
    "tolerance",
    "beyond_tolerance",
    "intercept_median",
    "steps_mean",
    "samples_mean",
    "r2_median",
    "stability_median",
    "standard_error_mean",
    "baseline_probability_mean",
    "forwards",
)


class Explained(Record):
    """One method in a manifest.

    Attributes
    ----------
    name : of its store, without `.zarr`. method : which method it is.
    law : what its numbers promise; empty: nothing.
    images : explained. beyond : of these, beyond the tolerance.
    layer : whose positions the map lies on. note : what a reader has to know of it.
    size : (y, x) of the map. units : layers whose units' relevance is stored.
    """

    name: str
    method: str
    law: str
    images: int
    beyond: int
    size: tuple[int, int]
    layer: str | None = None
    note: str = ""
    units: tuple[str, ...] = ()


class Attributed(Record):
    """The result in the manifest of `attribute`.

    Attributes
    ----------
    methods : in the order of the configuration.
    images : explained. ranks : classes explained of each image.
    """

    methods: list[Explained]
    images: int
    ranks: int


@dataclass(frozen=True)
class Layout:
    """The shape of a method's store.

    Attributes
    ----------
    images : slots. shard : images of a shard. ranks : classes of an image; None: there is no such dimension.
    size : (y, x) of the map. channels : (channel, y, x) of channel maps; None: not kept.
    facts : names of further numbers of each image. by_segment : names of numbers of each segment.
    segments : how many an image has at most. maps : names of further maps.
    nodes : how many a tree has at most; 0: there is no tree.
    """

    images: int
    shard: int
    ranks: int | None
    size: tuple[int, int]
    channels: tuple[int, int, int] | None
    facts: Sequence[str]
    by_segment: Sequence[str] = ()
    segments: int = 0
    maps: Sequence[str] = ()
    nodes: int = 0

    def arrays(self) -> dict[str, Array]:
        """Return the arrays of the store; an image that is not explained has NaN, and the target -1."""
        found = {
            name: self._array(np.float32, np.nan, ("y", "x"), self.size) for name in ("attribution", *self.maps)
        } | {"target": self._array(np.int64, -1)}
        if self.channels is not None:
            found["channel_attribution"] = self._array(np.float32, np.nan, ("channel", "y", "x"), self.channels)
        for name in ("score", "residual", *self.facts):
            found[name] = self._array(np.float32, np.nan)
        for name in self.by_segment:
            found[name] = self._array(np.float32, np.nan, ("segment",), (self.segments,))
        for name in BY_NODE if self.nodes else ():
            found[name] = self._array(np.float32, np.nan, ("node",), (self.nodes,))
        found["image_id"] = self.image_id
        return found

    @property
    def image_id(self) -> Array:
        return Array(("image",), (self.images,), str, (self.images,), fill=None)

    def relevance(self, units: int) -> Array:
        """Return the array of the relevance of so many units, (image[, rank], unit)."""
        return self._array(np.float32, np.nan, ("unit",), (units,))

    def _array(self, dtype: Any, fill: Any, names: tuple[str, ...] = (), shape: tuple[int, ...] = ()) -> Array:
        ranks, dims = ((), ()) if self.ranks is None else ((self.ranks,), ("rank",))
        own = (*ranks, *shape)
        return Array(("image", *dims, *names), (self.images, *own), dtype, (self.shard, *own), fill=fill)


@dataclass(frozen=True)
class SegmentLayout:
    """The shape of a store of segments.

    Attributes
    ----------
    images : slots. shard : images of a shard. size : (y, x). segments : how many an image has at most.
    """

    images: int
    shard: int
    size: tuple[int, int]
    segments: int

    def arrays(self) -> dict[str, Array]:
        """Return the arrays of the store; an image that is not explained, or lacks a segment, has -1."""

        def array(dtype: Any, names: tuple[str, ...], shape: tuple[int, ...]) -> Array:
            return Array(("image", *names), (self.images, *shape), dtype, (self.shard, *shape), fill=-1)

        return {
            "segments": array(np.int16, ("y", "x"), self.size),
            "feature": array(np.int32, ("segment",), (self.segments,)),
            "image_id": Array(("image",), (self.images,), str, (self.images,), fill=None),
        }


def row(name: str, method: str, law: str, tolerance: float, forwards: float, found: Mapping[str, np.ndarray]) -> list:
    """Return a method's row of the table, from the arrays of its store."""
    explained = found["target"] >= 0
    residual = found["residual"][explained]
    known = residual[~np.isnan(residual)]
    numbers = [np.nan] * 3 if not known.size else [np.median(known), np.quantile(known, 0.95), known.max()]
    beyond = np.mean(known > tolerance) if known.size else np.nan
    facts = [
        _reduced(reduce, found[fact][explained]) if fact in found else np.nan
        for fact, reduce in (
            ("intercept", np.median),
            ("steps", np.mean),
            ("samples", np.mean),
            ("r2", np.median),
            ("stability", np.median),
            ("standard_error", np.mean),
            ("baseline_probability", np.mean),
        )
    ]
    cells = [number(float(each)) for each in (*numbers, tolerance if law else np.nan, beyond, *facts, forwards)]
    images = int(explained.reshape(len(explained), -1).any(1).sum())
    return [name, method, law, images, *cells]


def _reduced(reduce: Callable[[np.ndarray], Any], values: np.ndarray) -> float:
    """Return the mean or median of the numbers that are known, NaN if none is."""
    known = values[~np.isnan(values)]
    return float(reduce(known)) if known.size else math.nan


def table(rows: Sequence[Sequence[Any]]) -> bytes:
    return csv_bytes(COLUMNS, rows)


def store_of(folder: Path, name: str) -> Path:
    """Return the store of a method, by its name in the configuration."""
    return folder / f"{name}.zarr"


RELEVANCE = "-relevance"


def unit_relevance(name: str) -> str:
    """Return the name of the store with the relevance of units, of a method by its name."""
    return f"{name}{RELEVANCE}"


def method_of(store: str) -> str:
    """Return the name of the method that a store is of."""
    return store.removesuffix(RELEVANCE)


def group_of(layer: str) -> str:
    """Return the group of a layer in a store of the relevance of units: its name, quoted where no folder has it."""
    return quote(layer, safe=" ") if layer.startswith("__") or "/" in layer else layer


def memory_need(
    parameters: int,
    values: int,
    model: Network,
    images: int,
    size: tuple[int, int],
    layouts: Sequence[Layout],
    methods: Collection[Options],
) -> int:
    """Estimate the bytes of a task.

    Weights, a forward with all it keeps for its backward, points on a line in float64, references, and the maps of a
    shard.
    """
    pixels = 3 * size[0] * size[1]
    kept = max((each.kept for each in methods), default=0.0)
    references = sum(getattr(each, "references", 1) for each in methods)
    graph = int(4 * model.numerics.micro_batch * (16 * pixels + kept * values)) + 5 * references * pixels
    maps = sum(
        4 * math.prod(each.size) * (1 + len(each.maps) + (each.channels or (0,))[0]) * (each.ranks or 1)
        for each in layouts
    )
    return 3 * 4 * parameters + graph + images * (pixels + maps)
