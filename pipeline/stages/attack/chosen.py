"""Which images are attacked, shard by shard, and what is drawn for each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.plan.job import Job
from pipeline.stages.attack.settings import Pair, Settings, pairs_of


@dataclass(frozen=True)
class Shard:
    """The images of a shard that are chosen for a pair of classes.

    Attributes
    ----------
    number : of the shard. bounds : its slots. places, labels, image_ids : of the images, places in the shard.
    """

    pair: Pair
    number: int
    bounds: tuple[int, int]
    places: tuple[int, ...]
    labels: tuple[int, ...]
    image_ids: tuple[str, ...]

    @property
    def key(self) -> str:
        """Its name among the parts of a store."""
        return f"{self.pair.name}|{self.number}"


def shards_of(job: Job[Settings]) -> dict[str, Shard]:
    """Return the shards of each pair that hold chosen images, by their keys."""
    images, settings = job.images, job.settings
    reader = images.reader()
    labels, ids = np.asarray(reader["label"][:]), images.image_ids()
    counted = images.counted(settings.split)
    found = {}
    for pair in pairs_of(settings):
        chosen = counted & (labels >= 0)
        if pair.source is not None and settings.start == "label":
            chosen &= labels == pair.source
        slots = first_by_hash(np.flatnonzero(chosen), ids, settings.images)
        numbers, first = np.unique(slots // images.shard_images, return_index=True)
        for number, own in zip(numbers.tolist(), np.split(slots, first)[1:], strict=True):
            start, stop = images.range(number)
            places, named = tuple((own - start).tolist()), tuple(map(str, ids[own]))
            shard = Shard(pair, number, (start, stop), places, tuple(labels[own].tolist()), named)
            found[shard.key] = shard
    return found


def first_by_hash(slots: np.ndarray, ids: np.ndarray, count: int | None) -> np.ndarray:
    """Return the first so many slots by a hash of their images' ids, ascending."""
    ordered = sorted(slots.tolist(), key=lambda slot: _hash(str(ids[slot])))
    return np.sort(np.array(ordered[:count], np.int64))


def seed_of(image_id: str) -> int:
    """Return the seed of what is drawn for an image, from its id."""
    return int.from_bytes(_hash(image_id)[:6])


def _hash(image_id: str) -> bytes:
    return hashlib.sha256(image_id.encode("utf-8", "surrogateescape")).digest()


def of_pair(shards: Mapping[str, Shard], pair: Pair) -> list[Shard]:
    """Return the shards of a pair, in their order."""
    return [shard for shard in shards.values() if shard.pair == pair]
