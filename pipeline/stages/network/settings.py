"""The content of a network's id."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.config.networks import Preprocessing
from pipeline.storage.record import Record


class Settings(Record):
    """The builder, and one of: a training recipe, the seed of random weights, a run, or a checkpoint's digest.

    Attributes
    ----------
    architecture : from `pipeline.networks.identity.architecture`.
    preprocessing : model.json records it, and a training depends on it.
    train : data set, split, recipe and seed, since the weights are not known in advance; without the checkpoint
        interval.
    weights : of a run; the parents name it.
    checkpoint : sha256 of the file, or of each file if published weights have several. prefix : of its keys.
    within : the entry of the file that is read, if it is named.
    """

    architecture: dict[str, Any]
    preprocessing: Preprocessing
    train: dict[str, Any] | None = None
    random: int | None = None
    weights: Literal["of a run"] | None = None
    checkpoint: str | dict[str, str] | None = None
    prefix: str | None = None
    within: str | None = None
