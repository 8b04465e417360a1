"""What the stage `visualize` writes: stores with a group per layer, and two tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.storage.record import Record
from pipeline.storage.store import Array
from pipeline.storage.tables import csv_bytes

SCORES = ("logit", "log_probability")
"""What of a class is maximised."""
COLUMNS = (
    *("subject", "number", "name", "way", "reached", "lowest", "highest", "started", "data_maximum", "threshold"),
    *("above_threshold", "beats_data"),
)
FILTER_COLUMNS = (
    *("module", "filters", "kernel_y", "kernel_x", "stride_y", "stride_x", "dead", "near_duplicates"),
    *("aliasing_mean", "aliasing_95"),
)
PROJECTIONS, FILTERS = "projections", "filters"


class Drawn(Record):
    """One group of pictures in a manifest.

    Attributes
    ----------
    store : name of the store. subject : the layer, or what of the classes; the module of filters.
    group : in the store. rows : how many units, classes or filters. note : what a reader has to know.
    """

    store: str
    subject: str
    group: str
    rows: int
    note: str = ""


class Visualized(Record):
    """The result in the manifest of `visualize`.

    Attributes
    ----------
    drawn : every group of pictures. notes : what was left out, and why.
    """

    drawn: list[Drawn]
    notes: list[str]


def maximised(way: str) -> str:
    """Return the name of the store of units' pictures."""
    return f"maximised-{way}"


def class_models(way: str) -> str:
    """Return the name of the store of classes' pictures."""
    return f"class-models-{way}"


@dataclass(frozen=True)
class PictureLayout:
    """The shape of a group of pictures.

    Attributes
    ----------
    rows : units or classes. each : of one part. size : (channel, y, x). dimension : `unit` or `class`.
    terms : their number. keeps : whether floating-point pictures are stored. latent : values of one; 0: there is none.
    """

    rows: int
    each: int
    size: tuple[int, int, int]
    restarts: int
    steps: int
    terms: int
    keeps: bool
    dimension: str
    latent: int = 0

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that tasks write, a part for each chunk."""

        def array(dtype: Any, dims: tuple[str, ...] = (), shape: tuple[int, ...] = (), fill: Any = np.nan) -> Array:
            return Array((self.dimension, *dims), (self.rows, *shape), dtype, (self.each, *shape), fill=fill)

        restart = ("restart",), (self.restarts,)
        found = {
            "picture": array(np.uint8, ("channel", "y", "x"), self.size, 0),
            "reached": array(np.float32, *restart),
            "started": array(np.float32, *restart),
            "best": array(np.int64, fill=-1),
            "found": array(np.int64, *restart, fill=-1),
            "trajectory": array(np.float32, ("restart", "term", "step"), (self.restarts, self.terms, self.steps)),
        }
        if self.latent:
            found["latent"] = array(np.float32, ("value",), (self.latent,))
        if self.keeps:
            found["input"] = array(np.float32, ("channel", "y", "x"), self.size)
        return found


@dataclass(frozen=True)
class ProjectionLayout:
    """The shape of a group of projections.

    Attributes
    ----------
    rows : units. each : of one part. images : of a unit. methods : their number. size : (channel, y, x) of the crop.
    """

    rows: int
    each: int
    images: int
    methods: int
    size: tuple[int, int, int]

    def arrays(self) -> dict[str, Array]:
        """Return the arrays that tasks write, a part for each chunk."""

        def array(dtype: Any, fill: Any, dims: tuple[str, ...] = (), shape: tuple[int, ...] = ()) -> Array:
            own = self.images, *shape
            return Array(("unit", "place", *dims), (self.rows, *own), dtype, (self.each, *own), fill=fill)

        maps = ("method", "channel", "y", "x"), (self.methods, *self.size)
        return {
            "projection": array(np.uint8, 128, *maps),
            "scale": array(np.float32, 0, ("method",), (self.methods,)),
            "image": array(np.int64, -1),
            "value": array(np.float32, np.nan),
            "position": array(np.int64, -1, ("axis",), (2,)),
            "field": array(np.int64, 0, ("edge",), (4,)),
        }


def column(dimension: str, values: np.ndarray) -> Array:
    """Return the layout of an array that is written whole."""
    return Array((dimension,), values.shape, str if values.dtype == object else values.dtype, values.shape, fill=None)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    return csv_bytes(columns, rows)
