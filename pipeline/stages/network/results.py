"""What `network` promises to the stages that read it."""

from __future__ import annotations

from typing import Any

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Weights(Record):
    """What the manifest of `network` says.

    Attributes
    ----------
    accuracy : of a network that was trained here, or by a run.
    training : folder of the training, beside the weights.
    """

    weights_sha256: str
    parameters: int
    accuracy: Any = None
    training: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Weights:
        return cls.read(manifest.result)
