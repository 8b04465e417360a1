"""Which images are fitted on, which choose the penalty, and which judge: none does two of these."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

import numpy as np

from pipeline.data.images import Images
from pipeline.errors import MicrotomeError
from pipeline.stages.probes.settings import Fitting, Probing

PARTS = ("fit", "choose", "test")


@dataclass(frozen=True)
class Division:
    """Which images are fitted on, which choose the penalty, and which judge.

    Attributes
    ----------
    part : (image) uint8, place in `PARTS` plus one; 0: none of them.
    label : (image) int32.
    picks : (draw, class, shot) slots of images to fit on, -1 where a class has no more.
    shots : those that all classes with an image to fit on have enough images for.
    notes : what a reader has to know.
    """

    part: np.ndarray
    label: np.ndarray
    picks: np.ndarray
    shots: list[int]
    notes: list[str]

    def slots(self, part: str) -> np.ndarray:
        return np.flatnonzero(self.part == PARTS.index(part) + 1)

    @property
    def counts(self) -> dict[str, int]:
        return {part: len(self.slots(part)) for part in PARTS}


def shards_of(images: Images, fitting: Fitting) -> list[int]:
    """Return the shards with images that are fitted on, choose or judge."""
    return sorted({shard for split in fitting.splits for shard in images.shards(split, fitting.images)})


def divide(images: Images, probing: Probing, what: str) -> Division:
    """Give every image its part: by its split, and where a split has two purposes by a hash of the image's id.

    So images that come or go move no other. Errors call it `what`.
    """
    image_id, classes = images.image_ids(), images.classes
    label = np.asarray(images.reader()["label"][:])
    counts = {}
    for split in probing.splits:
        chosen = np.zeros(images.count, bool)
        for shard in images.shards(split, probing.images):
            chosen[slice(*images.range(shard))] = True
        counts[split] = images.counted(split) & (label >= 0) & chosen
    place = ranks(image_id, probing.seed, "part") / 2.0**64
    part = np.zeros(images.count, np.uint8)
    fit, choose, test = (PARTS.index(name) + 1 for name in PARTS)
    part[counts[probing.fit]] = fit
    below = 0.0
    if probing.test == probing.fit:
        part[counts[probing.fit] & (place < probing.share)] = test
        below = probing.share
    else:
        part[counts[probing.test]] = test
    if probing.choose is None:
        part[counts[probing.fit] & (place >= below) & (place < below + probing.share)] = choose
    else:
        part[counts[probing.choose]] = choose
    for at, name in enumerate(PARTS, start=1):
        if not (part == at).any():
            raise MicrotomeError(
                f"{what}: no image with a class is left to {name} on (fit: {probing.fit!r}, choose: "
                f"{probing.choose or 'a share of it'}, test: {probing.test!r}): use more images or another "
                f"`probes.share`"
            )
    slots = np.flatnonzero(part == fit)
    there = np.bincount(label[slots], minlength=len(classes))
    if (there > 0).sum() < 2:
        raise MicrotomeError(
            f"{what}: the {len(slots)} images to fit on are all of class {classes[int(there.argmax())]!r}, and a probe "
            f"takes two"
        )
    notes = [f"class {name!r} has no image to fit on, and is never predicted" for name in compress(classes, there == 0)]
    fewest = int(there[there > 0].min())
    shots = [k for k in probing.shots if k <= fewest]
    if left_out := [k for k in probing.shots if k > fewest]:
        many = ", ".join(map(str, left_out))
        name = classes[int(np.where(there > 0, there, there.max() + 1).argmin())]
        notes.append(f"probes of {many} images a class are left out: class {name!r} has {fewest} to fit on")
    most = max(shots, default=0)
    picked = picks(slots, label[slots], image_id[slots], len(classes), most, probing.draws, probing.seed)
    return Division(part, label.astype(np.int32), picked, shots, notes)


def ranks(image_id: Iterable[str], seed: int, purpose: str) -> np.ndarray:
    """Return (image) uint64 by a hash of each id: an order, or a place among all."""
    head = f"{seed}/{purpose}/".encode()
    digests = (
        hashlib.blake2b(head + str(name).encode("utf-8", "surrogateescape"), digest_size=8).digest()
        for name in image_id
    )
    return np.frombuffer(b"".join(digests), "<u8")


def picks(
    slots: np.ndarray, label: np.ndarray, image_id: Iterable[str], classes: int, shots: int, draws: int, seed: int
) -> np.ndarray:
    """Pick (draw, class, shot) slots: for each draw, the first images of each class in an order of its own.

    -1 stands where a class has no more. The first image of a draw is that of one shot, the first five those of five,
    and so on.
    """
    found = np.full((draws, classes, shots), -1, np.int64)
    for draw in range(draws if shots else 0):
        order = np.lexsort((ranks(image_id, seed, str(draw)), label))
        first = np.searchsorted(label[order], np.arange(classes))
        place = np.arange(len(order)) - first[label[order]]
        own = order[place < shots]
        found[draw, label[own], place[place < shots]] = slots[own]
    return found
