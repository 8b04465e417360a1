"""The content of a dissection's id."""

from __future__ import annotations

from typing import Literal

from pipeline.config.datasets import Dissect
from pipeline.storage.record import Record


class Method(Record):
    """How units are compared with concepts: the key `dissect` of a data set, with its preset's values."""

    method: str
    quantile: float
    positions: Literal["upsampled", "native"]
    border: Literal["edge", "zeros"]
    union: Literal["all", "category"]
    min_iou: float
    split: str

    @classmethod
    def of(cls, dissect: Dissect) -> Method:
        return cls.read(dissect.resolved().model_dump())

    def counted_at(self, layer: tuple[int, int], label_maps: tuple[int, int]) -> tuple[int, int]:
        """Return the size at which positions are counted for thresholds."""
        return label_maps if self.positions == "upsampled" else layer


class Settings(Record):
    """The method, and the controls: whether label maps are also permuted, and over how many images."""

    dissect: Method
    permuted: bool
    control_images: int | None
