"""Which images go through a network together: minibatches, the same for every network on the same images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError

SETTINGS = ("images", "minibatch", "epochs", "replacement", "last", "seed")
FEWEST = 4  # images of a minibatch, for which the unbiased estimator of HSIC is defined


@dataclass(frozen=True)
class Minibatch:
    """Images (their slots) in order, and the epoch that they are of."""

    epoch: int
    images: tuple[int, ...]

    @property
    def weight(self) -> int:
        """n (n - 3), what minibatches of unlike sizes are weighted with."""
        return len(self.images) * (len(self.images) - 3)


def require(images: int, how: Mapping[str, Any], what: str) -> None:
    """Raise where so many images make no minibatch. `how` and `what` as in `minibatches`."""
    if images < FEWEST:
        raise MicrotomeError(
            f"{what}: {images} images, and at least {FEWEST} are needed: name a `split` that has more, or give the "
            f"data set more"
        )
    if how["last"] == "drop" and images < how["minibatch"]:
        raise MicrotomeError(
            f"{what}: {images} images make no minibatch of {how['minibatch']}: lower `similarity.minibatch`, or keep a "
            f"smaller one with `last: weigh`"
        )


def minibatches(candidates: np.ndarray, image_id: Sequence[str], how: Mapping[str, Any], what: str) -> list[Minibatch]:
    """Minibatches of the first images among `candidates` (slots), in an order that depends on ids and seed alone.

    Without replacement each epoch is a shuffled list of the images, cut; an image that goes away moves those after it
    and no others. With replacement each minibatch is drawn on its own, no image twice in one.

    Parameters
    ----------
    image_id : of every slot.
    how : images, minibatch, epochs, replacement, last, seed, as in the configuration's `similarity`.
    what : what messages call the images.

    Raises
    ------
    MicrotomeError
        Fewer than four images, or none left after a smaller minibatch is dropped.
    """
    chosen = [int(slot) for slot in candidates[: how["images"]]]
    size = how["minibatch"]
    require(len(chosen), how, what)
    found: list[Minibatch] = []
    for epoch in range(how["epochs"]):
        order = sorted(chosen, key=lambda slot: _place(how["seed"], epoch, image_id[slot]))
        if how["replacement"]:
            draw = np.random.default_rng([how["seed"], epoch])
            parts = [
                [order[at] for at in draw.permutation(len(order))[:size]] for _ in range(max(1, len(order) // size))
            ]
        else:
            parts = [order[at : at + size] for at in range(0, len(order), size)]
        fewest = size if how["last"] == "drop" else FEWEST
        found += [Minibatch(epoch, tuple(part)) for part in parts if len(part) >= fewest]
    return found


def _place(seed: int, epoch: int, image_id: str) -> bytes:
    return hashlib.sha256(f"{seed}/{epoch}/{image_id}".encode("utf-8", "surrogateescape")).digest()
