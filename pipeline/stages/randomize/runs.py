"""Runs as the tasks of the stage `randomize` name them: their data, how each is trained, and its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.config.networks import NetworkSpec
from pipeline.stages.randomize.settings import How
from pipeline.storage.store import StoreRef

LABELS, PIXELS = 4, 5  # purposes of random numbers
SECONDS = "seconds.json"  # by the clock: in no digest
EXPRESSIVITY = "expressivity.json"


@dataclass(frozen=True)
class Data:
    """The images that count, as tasks name them; `id` is of all else, so that a worker reads them once.

    Attributes
    ----------
    rows, test_rows : slots in `images.zarr`.
    labels, test_labels : their classes.
    """

    id: str
    images: StoreRef = field(compare=False)
    classes: int
    rows: np.ndarray = field(compare=False)
    labels: np.ndarray = field(compare=False)
    test_rows: np.ndarray = field(compare=False)
    test_labels: np.ndarray = field(compare=False)


@dataclass(frozen=True)
class Run:
    """One run: its network, how it is trained, and the folder that it fills."""

    id: str
    name: str
    network: NetworkSpec
    how: How
    folder: Path
    checkpoint_seconds: float
