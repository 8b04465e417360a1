"""Activations that no network made, for benches of what reads them."""

import numpy as np
from numpy.typing import NDArray


def activations(seed: int, images: int, units: int, h: int) -> NDArray[np.float16]:
    """Smooth maps (image, unit, y, x) after a ReLU, some units and images livelier than others."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((images, units, h + 2, h + 2), np.float32)
    smooth = 2 * noise[..., 1:-1, 1:-1] + noise[..., :-2, 1:-1] + noise[..., 2:, 1:-1]
    smooth += noise[..., 1:-1, :-2] + noise[..., 1:-1, 2:]
    lively = rng.standard_normal((images, units, 1, 1), np.float32) + np.linspace(-1, 1, units)[:, None, None]
    return np.maximum(smooth / 8**0.5 + 0.7 * lively - 0.6, 0).astype(np.float16)
