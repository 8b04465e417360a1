"""Minibatches: the images that go through a network together, the same for every network on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from pipeline.data.images import Images
from pipeline.errors import MicrotomeError
from pipeline.storage.identity import digest
from pipeline.storage.record import Record
from pipeline.storage.store import StoreRef
from pipeline.workers.tasks import run_tasks

FEWEST = 4  # images of a minibatch, the fewest for which the unbiased estimator of HSIC is defined


class Batching(Record):
    """How images are grouped into minibatches.

    Attributes
    ----------
    images : use only the first N. minibatch : images per minibatch. epochs : number of shuffles.
    replacement : draw each minibatch separately from all images; otherwise, cut up a shuffled list of them.
    last : drop a smaller last minibatch, or keep and weight it. seed : each gives other minibatches.
    """

    images: int
    minibatch: int
    epochs: int
    replacement: bool
    last: Literal["drop", "weigh"]
    seed: int


@dataclass(frozen=True)
class Minibatch:
    """Images (their slots) in order, and the epoch that they belong to."""

    epoch: int
    images: tuple[int, ...]

    @property
    def weight(self) -> int:
        """Return n (n - 3), the weight of minibatches that differ in size."""
        return len(self.images) * (len(self.images) - 3)


def require(images: int, how: Batching, what: str) -> None:
    """Raise `MicrotomeError` if so many images make no minibatch. `how` and `what` as in `minibatches`."""
    if images < FEWEST:
        raise MicrotomeError(
            f"{what}: {images} images, and at least {FEWEST} are needed: name a `split` that has more, or give the "
            f"data set more"
        )
    if how.last == "drop" and images < how.minibatch:
        raise MicrotomeError(
            f"{what}: {images} images make no minibatch of {how.minibatch}: lower `similarity.minibatch`, or keep a "
            f"smaller one with `last: weigh`"
        )


def minibatches(candidates: np.ndarray, image_id: Sequence[str], how: Batching, what: str) -> list[Minibatch]:
    """Return minibatches of the first images among `candidates` (slots), in an order set by ids and seed alone.

    Without replacement, each epoch cuts up a shuffled list of the images; removing an image moves only those after it.
    With replacement, each minibatch is drawn separately, with no image twice in one.

    Parameters
    ----------
    image_id : of every slot.
    what : what messages call the images.

    Raises
    ------
    MicrotomeError
        Fewer than four images, or none left after a smaller minibatch is dropped.
    """
    chosen = [int(slot) for slot in candidates[: how.images]]
    size = how.minibatch
    require(len(chosen), how, what)
    found: list[Minibatch] = []
    for epoch in range(how.epochs):
        order = sorted(chosen, key=lambda slot: _place(how.seed, epoch, image_id[slot]))
        if how.replacement:
            draw = np.random.default_rng([how.seed, epoch])
            parts = [
                [order[at] for at in draw.permutation(len(order))[:size]] for _ in range(max(1, len(order) // size))
            ]
        else:
            parts = [order[at : at + size] for at in range(0, len(order), size)]
        fewest = size if how.last == "drop" else FEWEST
        found += [Minibatch(epoch, tuple(part)) for part in parts if len(part) >= fewest]
    return found


def _place(seed: int, epoch: int, image_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{epoch}/{image_id}".encode("utf-8", "surrogateescape")).digest()


def of_split(images: Images, split: str, how: Batching, what: str) -> list[Minibatch]:
    """Return the minibatches of the images of a split that count."""
    return minibatches(np.flatnonzero(images.counted(split)), images.image_ids().tolist(), how, what)


def pixels_of(images: Images, batch: Minibatch) -> StoreRef:
    """Return the store of the images with the files that hold the pixels of a minibatch."""
    shards = sorted({slot // images.shard_images for slot in batch.images})
    return StoreRef(images.store, {name: value for shard in shards for name, value in images.files_of(shard).items()})


def pixel_digests(workers: Any, images: Images, batches: Sequence[Minibatch], label: str) -> dict[int, str]:
    """Return the digest of the pixels of every image used, by slot.

    A changed image then makes only its own minibatches stale.
    """
    by_shard: dict[int, set[int]] = {}
    for slot in sorted({slot for batch in batches for slot in batch.images}):
        by_shard.setdefault(slot // images.shard_images, set()).add(slot)
    tasks = [
        (StoreRef(images.store, images.files_of(shard)), images.range(shard), sorted(slots))
        for shard, slots in by_shard.items()
    ]
    found: dict[int, str] = {}
    for part in run_tasks(workers, digest_images, tasks, len(tasks), f"{label}: images"):
        found |= part
    return found


def digest_images(images: StoreRef, bounds: tuple[int, int], slots: Sequence[int]) -> dict[int, str]:
    """Return the digests of some images of one shard. Runs on a worker."""
    start, stop = bounds
    pixels = images.open()["image"][start:stop]
    return {slot: hashlib.sha256(np.ascontiguousarray(pixels[slot - start]).data).hexdigest()[:20] for slot in slots}


def ids_of(made_of: Sequence[Any], batches: Sequence[Minibatch], pixels: Mapping[int, str]) -> dict[str, str]:
    """Return the id of each minibatch by its number, from the inputs common to all, its pixels and its slots."""
    return {
        str(number): digest([*made_of, [pixels[slot] for slot in batch.images], batch.images])
        for number, batch in enumerate(batches)
    }
