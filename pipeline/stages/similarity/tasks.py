"""What workers do for the stage `similarity`: compare every two layers on one minibatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.storage.store import StoreRef


@dataclass(frozen=True)
class Measured:
    """All measures on one minibatch, (layer, layer) over the layers of all networks."""

    number: int
    images: tuple[int, ...]
    unbiased: np.ndarray
    biased: np.ndarray
    neighbours: np.ndarray
    procrustes: np.ndarray
    shuffled: np.ndarray


def compare(grams: Sequence[StoreRef], number: int, neighbours: int, with_procrustes: bool) -> Measured:
    """On a worker: measure every pair of layers of all networks on the minibatch of this number."""
    from kernels.similarity.alignment import mutual_neighbours, procrustes, procrustes_shuffled
    from kernels.similarity.cka import hsic

    readers = [store.open() for store in grams]
    slots = readers[0]["image"][number]
    images = tuple(int(slot) for slot in slots if slot >= 0)
    n = len(images)
    packed = np.concatenate([reader["gram"][number, :, : n * (n + 1) // 2] for reader in readers])
    nothing = np.full((len(packed), len(packed)), np.nan)
    return Measured(
        number,
        images,
        hsic(packed, "unbiased"),
        hsic(packed, "biased"),
        mutual_neighbours(packed, neighbours) if n > neighbours else nothing,
        procrustes(packed) if with_procrustes else nothing,
        procrustes_shuffled(packed) if with_procrustes else nothing,
    )
