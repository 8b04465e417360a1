"""What `grams` promises to the stages that read it: the layers whose Gram matrices it keeps, and of which images."""

from __future__ import annotations

from pathlib import Path

from pipeline.stages.similarity.settings import Features
from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import StoreRef


class Kept(Record):
    """What the manifest of `grams` says.

    Attributes
    ----------
    layers : name and features of each row of the store, in execution order.
    images : digest of the pixels of all minibatches. count : different images among them.
    """

    layers: list[tuple[str, Features]]
    minibatches: int
    images: str
    count: int

    @classmethod
    def of(cls, manifest: Manifest) -> Kept:
        return cls.read(manifest.result)


def gram_matrices(folder: Path, manifest: Manifest) -> StoreRef:
    """Return the store of a network's Gram matrices, in its folder."""
    return StoreRef.of_manifest(folder, "grams.zarr", manifest.files)
