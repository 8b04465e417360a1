"""What the id of a network's Gram matrices is made of. The section of the configuration is that of `similarity`."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.config.networks import Preprocessing, SpecialTokens
from pipeline.data.minibatches import Batching
from pipeline.networks.features import Arithmetic
from pipeline.stages.similarity.settings import Features


class Settings(Batching):
    """Which layers of a network, what is read of each, how it is computed, and over which minibatches of a split."""

    layers: Literal["all", "auto"] | list[str]
    features: list[Features]
    special_tokens: int | SpecialTokens | None
    preprocessing: Preprocessing
    numerics: Arithmetic
    split: str
    grid: tuple[int, int] | None = None
    layout: dict[str, str] | None = None

    @property
    def batching(self) -> dict[str, Any]:
        """How the images are put into minibatches, and their split."""
        return {key: getattr(self, key) for key in (*Batching.model_fields, "split")}
