"""What `similarity` says of a comparison in its manifest, for its page."""

from __future__ import annotations

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Compared(Record):
    """What the manifest of `similarity` says.

    Attributes
    ----------
    layers : network, layer and features of each, of all networks one after the other.
    uniformity : of each network, mean CKA of two different layers and its standard error; None: not defined.
    difference : of each two networks, by how much the second is more uniform, and the standard error.
    undefined : layers that give the same for all images of a minibatch.
    """

    dataset: str
    networks: list[str]
    layers: list[tuple[str, str, str]]
    uniformity: dict[str, tuple[float | None, float | None]]
    difference: list[tuple[str, str, float | None, float | None]]
    undefined: list[str]

    @classmethod
    def of(cls, manifest: Manifest) -> Compared:
        return cls.read(manifest.result)
