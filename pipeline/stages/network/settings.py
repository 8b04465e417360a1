"""What a network's id is made of."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.config.networks import Preprocessing
from pipeline.storage.record import Record


class Settings(Record):
    """The builder, and one of: the recipe of a training, the seed of random weights, a run, or a checkpoint's digest.

    Attributes
    ----------
    architecture : as `pipeline.networks.identity.architecture` says it.
    preprocessing : model.json tells it, and a training depends on it.
    train : data set, split, recipe and seed, since the weights are not known before; not how often it is saved.
    weights : of a run, which the parents name.
    checkpoint : sha256 of the file; where published weights are in several files, of each. prefix : of its keys.
    """

    architecture: dict[str, Any]
    preprocessing: Preprocessing
    train: dict[str, Any] | None = None
    random: int | None = None
    weights: Literal["of a run"] | None = None
    checkpoint: str | dict[str, str] | None = None
    prefix: str | None = None
