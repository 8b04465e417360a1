"""The content of an extraction's id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pipeline.config.base import Kept
from pipeline.config.datasets import Dissect
from pipeline.config.networks import Numerics, Preprocessing, SpecialTokens
from pipeline.storage.record import Record

THRESHOLDS = 2
"""The version of thresholds of layers that are not stored. It rises with that of the stage `dissect`."""


class Tails(Record):
    """What the tails of a streamed layer depend on besides the layer.

    Attributes
    ----------
    size : (height, width) of the label maps, the size at which positions are counted; None: that of the images.
    version : of the thresholds.
    """

    quantile: float
    border: Literal["edge", "zeros"]
    positions: Literal["upsampled", "native"]
    size: tuple[int, int] | None
    version: int

    @classmethod
    def of(cls, dissect: Dissect, label_map_size: Sequence[int] | None) -> Tails:
        """Return the settings of the tails for a dissection."""
        return cls.read(
            {key: getattr(dissect, key) for key in ("quantile", "border", "positions")}
            | {"size": label_map_size, "version": THRESHOLDS}
        )

    def counted_at(self, layer: tuple[int, int]) -> tuple[int, int]:
        """Return the size at which positions are counted: that of the label maps, or the layer's own."""
        assert self.size is not None
        return self.size if self.positions == "upsampled" else layer


class Settings(Record):
    """Which layers of a network are extracted, how, and over which images.

    Attributes
    ----------
    images : bound on their number.
    store : what is kept of each layer, unless all are `full`. tails : of streamed layers.
    """

    layers: str | list[str]
    special_tokens: int | SpecialTokens | None
    preprocessing: Preprocessing
    numerics: Numerics
    split: str
    images: int | None
    store: Kept | dict[str, Kept] | None = None
    tails: Tails | None = None
    grid: tuple[int, int] | None = None
    layout: dict[str, str] | None = None
