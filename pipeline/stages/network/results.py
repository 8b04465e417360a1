"""What `network` promises to later stages."""

from __future__ import annotations

from typing import Any

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Weights(Record):
    """The result in the manifest of `network`.

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
