"""What `concepts` promises to the stages that read it: categories, their concepts, and refused label maps."""

from __future__ import annotations

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record


class Category(Record):
    """A category of label maps.

    Attributes
    ----------
    place : on the store's category axis.
    numbers, concepts : in the label maps, and the names of these, in the order of the source.
    contents : of each shard, the digest of its label maps.
    """

    name: str
    place: int
    numbers: tuple[int, ...]
    concepts: list[str]
    contents: list[str]


class Labelled(Record):
    """What the manifest of `concepts` says.

    Attributes
    ----------
    shards : those with label maps. size : (height, width) of these.
    refused : ids of images whose label maps were refused: they count nowhere.
    """

    shards: list[int]
    categories: list[Category]
    refused: list[str]
    size: tuple[int, int]

    @classmethod
    def of(cls, manifest: Manifest) -> Labelled:
        return cls.read(manifest.result)
