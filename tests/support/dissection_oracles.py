"""Slow and plain definitions of dissection, and activations that try its corners."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import grid_sample, interpolate

KINDS = ["normal", "relu", "ties", "negative", "constant", "subnormal", "large", "rare"]


def by_torch(maps: NDArray[np.float16], size: tuple[int, int], border: str) -> NDArray[np.float64]:
    """Maps (m, h, w) upsampled by torch in float64."""
    stack = torch.from_numpy(maps.astype(np.float64))[:, None]
    if border == "edge":
        return interpolate(stack, size=size, mode="bilinear", align_corners=False)[:, 0].numpy()
    rows, columns = ((torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1 for n in size)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], dim=-1).expand(len(stack), -1, -1, -1)
    return grid_sample(stack, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0].numpy()


def activations(seed: int, shape: tuple[int, ...], kind: str) -> NDArray[np.float16]:
    """Maps (n, units, h, w) float16 of one of `KINDS`, or "bits": any finite bit pattern."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape)
    if kind == "bits":
        patterns = rng.integers(0, 0x7C00, shape) | (rng.integers(0, 2, shape) << 15)
        return patterns.astype(np.uint16).view(np.float16)
    if kind == "relu":
        values = np.maximum(values - 1, 0)
    elif kind == "ties":
        values = rng.integers(-2, 3, shape) / 2
    elif kind == "negative":
        values = -1 - np.abs(values)
    elif kind == "constant":
        values = np.broadcast_to(rng.integers(-1, 2, (1, shape[1], 1, 1)), shape)
    elif kind == "subnormal":
        values = rng.integers(-40, 41, shape) * 2.0**-24
    elif kind == "large":
        values = rng.uniform(-65504, 65504, shape)
    elif kind == "rare":
        values = np.where(rng.random(shape) < 0.01, 3 + values, -0.0)
    return values.astype(np.float16)
