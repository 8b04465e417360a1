"""Maps that know nothing of a network: what any method has to be better than."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from pipeline.stages.audit.batch import Batch


def random(batch: Batch) -> np.ndarray:
    """Return independent noise from 0 to 1, drawn from the seed of each image, float32 (image, y, x)."""
    return np.stack([np.random.default_rng([seed, 2]).random(batch.size, np.float32) for seed in batch.seeds])


def edges(batch: Batch) -> np.ndarray:
    """Return the magnitude of the gradient of the grey image, by central differences, float32 (image, y, x)."""
    grey = batch.pixels.double().mean(1).numpy()
    along_y, along_x = np.gradient(grey, axis=(1, 2))
    return np.hypot(along_y, along_x).astype(np.float32)


CONTROLS: Mapping[str, Callable[[Batch], np.ndarray]] = {"random": random, "edges": edges}
"""The controls that have a map of their own, whatever the test; a test may have others, that it makes itself."""
