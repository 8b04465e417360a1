"""What `concepts` promises to later stages: categories, their concepts, and refused label maps."""

from __future__ import annotations

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Category(Record):
    """A category of label maps.

    Attributes
    ----------
    place : index on the store's category axis.
    numbers, concepts : the numbers in the label maps, and their names, in the source's order.
    contents : the digest of each shard's label maps.
    """

    name: str
    place: int
    numbers: tuple[int, ...]
    concepts: list[str]
    contents: list[str]


class Labelled(Record):
    """The result in the manifest of `concepts`.

    Attributes
    ----------
    shards : those with label maps. size : (height, width) of the label maps.
    refused : ids of images with refused label maps: they count nowhere.
    """

    shards: list[int]
    categories: list[Category]
    refused: list[str]
    size: tuple[int, int]

    @classmethod
    def of(cls, manifest: Manifest) -> Labelled:
        return cls.read(manifest.result)
