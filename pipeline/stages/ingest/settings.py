"""The content of an ingested data set's id; `pipeline.data.kinds.settings` builds it."""

from __future__ import annotations

from typing import Any

from pipeline.storage.record import Record


class Settings(Record):
    """The snapshot of a data set's listing, and how an image becomes an array.

    Attributes
    ----------
    listing : digest of the whole listing. images : their number. size : (height, width). source : where they come from.
    scenes : version of the drawn scenes. geometry, max_pixels : how a file is decoded. array : of an npz file.
    generator : what makes the images: digests of its code and weights, latent, output.
    reading : how files are read, where it differs from `pipeline.data.decode.AS_STATED`.
    """

    kind: str
    listing: str
    images: int
    size: tuple[int, int]
    shard_images: int
    source: str
    scenes: int | None = None
    geometry: str | None = None
    max_pixels: int | None = None
    array: str | None = None
    reading: dict[str, Any] | None = None
    generator: dict[str, Any] | None = None
