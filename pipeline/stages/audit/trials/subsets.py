"""Remove random sets of pixels, the same for every method: sensitivity-n and infidelity."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from kernels.audit import faithfulness
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.faithful import Filler, Infidelity, SensitivityN
from pipeline.stages.audit.trials.changed import filler, said, unchanged


def sensitivity_n(batch: Batch, options: SensitivityN) -> dict[str, np.ndarray]:
    """Correlate, over random sets of n pixels, the sum of the map with the drop of the score.

    Ancona et al., "Towards better understanding of gradient-based attribution methods" (ICLR 2018), section 4. Images
    of which no set changes the score, and maps without a difference between sets, have no correlation.
    """
    maps = batch.at_image()
    counts = faithfulness.counts(options.shares, maps[0].size).clip(1)
    found = []
    for at, count in enumerate(counts.tolist()):

        def draw(seed: int, count: int = count, at: int = at) -> np.ndarray:
            return faithfulness.subsets(maps[0].size, count, options.sets, [seed, 4, at])

        drop = drops(batch, ("sets", count, at), options.sets, options.filler, draw)
        found.append(_by_image(batch, maps, draw, faithfulness.correlation, drop))
    values = np.stack(found, 1)
    known = ~np.isnan(values)
    mean = np.where(known.any(1), np.where(known, values, 0).sum(1) / known.sum(1).clip(1), np.nan)
    return {"correlation": values, "mean_correlation": mean}


def infidelity(batch: Batch, options: Infidelity) -> dict[str, np.ndarray]:
    """Compare, over random squares, the sum of the map with the drop of the score.

    Yeh et al., "On the (in)fidelity and sensitivity of explanations" (NeurIPS 2019), section 2.2, with squares that
    are removed as the perturbation, and maps taken as contributions: their sum stands for the inner product.
    """
    maps = batch.at_image()
    side = max(1, round(options.side * min(batch.size)))

    def draw(seed: int) -> np.ndarray:
        return faithfulness.squares(batch.size, side, options.sets, [seed, 5])

    drop = drops(batch, ("squares", side), options.sets, options.filler, draw)
    return {
        name: _by_image(batch, maps, draw, partial(faithfulness.infidelity, scaled=scaled), drop)
        for name, scaled in (("infidelity", False), ("scaled_infidelity", True))
    }


def drops(batch: Batch, key: tuple, sets: int, kind: Filler, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Return by how much the score falls when each of an image's sets is removed, float64 (image, set).

    They are the same for every method, so they are made once for these images.
    """

    def make() -> np.ndarray:
        images, own = len(batch.pixels), filler(batch, kind)
        rows = np.repeat(np.arange(images), sets)
        last: list[tuple[int, np.ndarray]] = []

        def changed(some: slice) -> torch.Tensor:
            made = []
            for point in range(*some.indices(len(rows))):
                image, at = divmod(point, sets)
                if not last or last[0][0] != image:
                    last[:] = [(image, draw(batch.seeds[image]))]
                gone = torch.from_numpy(last[0][1][at].reshape(batch.size))
                made.append(torch.where(gone, own[image], batch.pixels[image]))
            return torch.stack(made)

        score = said(batch, len(rows), rows, changed).score.reshape(images, sets)
        return unchanged(batch).score[:, None] - score

    return batch.memo(("drops", *key, sets, kind), make)


def _by_image(
    batch: Batch,
    maps: np.ndarray,
    draw: Callable[[int], np.ndarray],
    measure: Callable[[np.ndarray, np.ndarray], np.ndarray],
    drop: np.ndarray,
) -> np.ndarray:
    """Measure image by image: all sets of all images at once would fill the memory."""
    found = [
        measure(faithfulness.sums(maps[at : at + 1], draw(seed)[None]), drop[at : at + 1])
        for at, seed in enumerate(batch.seeds[: len(maps)])
    ]
    return np.concatenate(found)
