"""Noise around an image: do its map, and the linear view of its score, still hold?"""

from __future__ import annotations

import numpy as np
import torch

from kernels.attribution.agreement import rank_correlation
from kernels.audit import faithfulness
from pipeline.networks.gradients import gradients, in_chunks, padded
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.faithful import LinearView, Stability
from pipeline.stages.audit.trials.changed import unchanged


def stability(batch: Batch, options: Stability) -> dict[str, np.ndarray]:
    """Explain noisy copies of each image, and compare their maps with its own.

    The largest change is max-sensitivity of Yeh et al. (NeurIPS 2019), relative to the map, over draws.
    """
    assert batch.maps is not None
    alike, change = [], []
    for draw in range(options.draws):
        maps = batch.explain(inputs=batch.normalise(noisy(batch, 255 * options.noise, draw)))
        alike.append(rank_correlation(batch.maps.reshape(len(maps), -1), maps.reshape(len(maps), -1)))
        change.append(faithfulness.relative_change(batch.maps, maps))
    return {"rank_correlation": np.mean(alike, 0), "largest_change": np.max(change, 0)}


def linear_view(batch: Batch, options: LinearView) -> dict[str, np.ndarray]:
    """Return how well S(x) + w (x' - x) says the scores of noisy copies x', by the noise's size.

    That is the view w I + b of Simonyan et al. (2014), section 3, whose b is S(x) - w x.
    """
    size, found = batch.spec.numerics.micro_batch, []
    slopes = torch.cat([_gradient(batch, start, stop, size) for start, stop in in_chunks(len(batch.inputs), size)])
    base = torch.from_numpy(unchanged(batch).score)
    for at, radius in enumerate(options.radii):
        said, true = [], []
        for draw in range(options.draws):
            inputs = batch.normalise(noisy(batch, radius, at * options.draws + draw))
            step = ((inputs - batch.inputs).double() * slopes).flatten(1).sum(1).cpu()
            said.append(base + step)
            true.append(batch.scores_at(inputs).double().cpu())
        found.append(faithfulness.r2(torch.stack(said, 1).numpy(), torch.stack(true, 1).numpy()))
    return {"r2": np.stack(found, 1)}


def _gradient(batch: Batch, start: int, stop: int, size: int) -> torch.Tensor:
    rows = padded(torch.arange(start, stop), size)
    made = gradients(batch.network, batch.inputs[rows], batch.target.at(rows)).inputs
    assert made is not None
    return made[: stop - start].double()


def noisy(batch: Batch, levels: float, draw: int) -> torch.Tensor:
    """Return the images with normal noise of a standard deviation in levels of 0 to 255, rounded, uint8."""
    made = []
    for seed, own in zip(batch.seeds, batch.pixels.numpy(), strict=False):
        noise = np.random.default_rng([seed, 6, draw]).standard_normal(own.shape)
        made.append(np.rint(np.clip(own + levels * noise, 0, 255)).astype(np.uint8))
    return torch.from_numpy(np.stack(made))
