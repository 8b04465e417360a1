"""An ingested data set as the later stages see it: shards, their contents, and the images that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.record import Record
from pipeline.storage.store import Reader, StoreRef


class Ingested(Record):
    """The result of `ingest` in the manifest of a data set.

    Attributes
    ----------
    images : number of slots, including those of removed images. size : (height, width).
    splits : valid images per split and shard.
    contents : digest of the pixels of each shard; None if no image of it is used.
    records : id of the inputs of each shard; None likewise.
    refused : number of refused inputs. ignored : number of files that are not images, by kind.
    cut : of generated images, the share of values beyond black and white.
    """

    images: int
    size: tuple[int, int]
    shard_images: int
    classes: list[str]
    splits: dict[str, dict[str, int]]
    contents: list[str | None]
    records: list[str | None]
    refused: int
    ignored: dict[str, int]
    cut: float | None = None


@dataclass(frozen=True)
class Images:
    """`images.zarr` and the facts of its manifest.

    `contents[i]` is the digest of the pixels of shard i: two shards with equal contents need one forward pass between
    them, whatever happened to their source files. None: no image of the shard is used.
    """

    store: Path
    files: Files
    count: int
    size: tuple[int, int]
    shard_images: int
    contents: Sequence[str | None]
    splits: dict[str, dict[str, int]]  # valid images per split and shard
    classes: list[str]

    @staticmethod
    def from_manifest(store: Path, manifest: Manifest) -> Images:
        facts, ref = Ingested.read(manifest.result), StoreRef.of_manifest(store.parent, store.name, manifest.files)
        return Images(
            ref.path,
            ref.files,
            facts.images,
            facts.size,
            facts.shard_images,
            facts.contents,
            facts.splits,
            facts.classes,
        )

    def reader(self) -> Reader:
        return Reader(self.store, self.files)

    def range(self, shard: int) -> tuple[int, int]:
        """Return the first image of a shard, and one past its last."""
        start = shard * self.shard_images
        return start, min(start + self.shard_images, self.count)

    def files_of(self, shard: int) -> Files:
        """Return the chunk file that holds the pixels of a shard, that of latents if it has any, and the metadata."""
        names = ["zarr.json", "image/zarr.json", f"image/c/{shard}/0/0/0"]
        if "latent/zarr.json" in self.files:
            names += ["latent/zarr.json", *(name for name in self.files if name.startswith(f"latent/c/{shard}/"))]
        return {name: self.files[name] for name in names}

    def shards(self, split: str, limit: int | None = None) -> list[int]:
        """List the shards with a valid image of the split; with `limit`, the first that together hold that many."""
        if not self.splits.get(split):
            raise MicrotomeError(
                f"{self.store.parent.name}: no valid image has split {split!r} (there are: {', '.join(self.splits)})"
            )
        images = {int(shard): count for shard, count in self.splits[split].items()}
        shards = sorted(images)
        if limit is None:
            return shards
        held = np.cumsum([images[shard] for shard in shards])
        return shards[: int(np.searchsorted(held, limit)) + 1]

    def counted(self, split: str) -> np.ndarray:
        """Return boolean (image,): the images that count, which are valid and in the split."""
        reader = self.reader()
        return np.asarray(reader["valid"][:]) & (np.asarray(reader["split"][:]) == split)

    def image_ids(self) -> np.ndarray:
        return np.asarray(self.reader()["image_id"][:])


def pixels(reader: Reader, rows: Sequence[int] | np.ndarray, name: str = "image") -> np.ndarray:
    """Return the images of these slots, in order, as uint8 (image, channel, y, x); each shard is read once.

    `name` is another array of the store, of one entry per image.
    """
    array, chosen = reader[name], np.asarray(rows, np.int64)
    step, found = array.chunks[0], np.empty((len(chosen), *array.shape[1:]), array.dtype)
    order = np.argsort(chosen, kind="stable")
    shards, first = np.unique(chosen[order] // step, return_index=True)
    for shard, own in zip(shards.tolist(), np.split(order, first)[1:], strict=True):
        found[own] = array[shard * step : (shard + 1) * step][chosen[own] - shard * step]
    return found
