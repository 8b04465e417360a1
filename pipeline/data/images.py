"""An ingested data set as the later stages see it: shards, what each holds, and which images count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.plan import job as stage
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.store import Reader

if TYPE_CHECKING:
    from pipeline.plan.step import Plan, Step


@dataclass(frozen=True)
class Images:
    """`images.zarr` and the facts of its manifest.

    `contents[i]` is the digest of the pixels of shard i: two shards with equal contents need no second forward pass,
    whatever happened to the files they were decoded from. None: no image of the shard is used.
    """

    store: Path
    files: Files
    count: int
    size: tuple[int, int]
    shard_images: int
    contents: Sequence[str | None]
    splits: dict[str, dict[str, int]]  # valid images by split and shard

    @staticmethod
    def of(plan: Plan, step: Step) -> Images:
        """The images that a step reads, from its parent `ingest`."""
        ingest, manifest = plan.parent(step, "ingest")
        assert ingest.dataset is not None
        return Images.from_manifest(plan.results / ingest.dataset / "images.zarr", manifest)

    @staticmethod
    def from_manifest(store: Path, manifest: Manifest) -> Images:
        facts = manifest.result
        return Images(
            store=store,
            files=stage.below("images.zarr", manifest.files),
            count=facts["images"],
            size=(facts["size"][0], facts["size"][1]),
            shard_images=facts["shard_images"],
            contents=facts["contents"],
            splits=facts["splits"],
        )

    def reader(self) -> Reader:
        return Reader(self.store, self.files)

    def range(self, shard: int) -> tuple[int, int]:
        """First image of a shard, and one past its last."""
        start = shard * self.shard_images
        return start, min(start + self.shard_images, self.count)

    def files_of(self, shard: int) -> Files:
        """The chunk file that holds the pixels of a shard, and what describes it."""
        return {name: self.files[name] for name in ("zarr.json", "image/zarr.json", f"image/c/{shard}/0/0/0")}

    def shards(self, split: str, limit: int | None = None) -> list[int]:
        """Shards that hold a valid image of the split; with `limit`, the first that together hold that many images."""
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
        """Boolean (image,): the images that count, valid and of the split."""
        reader = self.reader()
        return np.asarray(reader["valid"][:]) & (np.asarray(reader["split"][:]) == split)

    def image_ids(self) -> np.ndarray:
        return np.asarray(self.reader()["image_id"][:])


def pixels(reader: Reader, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """The images of these slots, in their order, uint8 (image, channel, y, x); every shard is read once."""
    array, chosen = reader["image"], np.asarray(rows, np.int64)
    step, found = array.chunks[0], np.empty((len(chosen), *array.shape[1:]), np.uint8)
    order = np.argsort(chosen, kind="stable")
    shards, first = np.unique(chosen[order] // step, return_index=True)
    for shard, own in zip(shards.tolist(), np.split(order, first)[1:], strict=True):
        found[own] = array[shard * step : (shard + 1) * step][chosen[own] - shard * step]
    return found
