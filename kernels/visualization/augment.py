"""Random shifts, turns and zooms of images, so that what a unit wants is no picture of exact pixels.

Olah, Mordvintsev and Schubert, "Feature visualization" (Distill, 2017), "transformation robustness".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional


def draws(seeds: Sequence[Sequence[int]], steps: int, numbers: int) -> NDArray[np.float32]:
    """Return uniform numbers from -1 to 1, (step, image, number), of each image from its own seed alone."""
    made = [np.random.default_rng(list(seed)).uniform(-1, 1, (steps, numbers)) for seed in seeds]
    return np.stack(made, 1).astype(np.float32)


def moves(drawn: NDArray, size: tuple[int, int], shift: float, turn: float, zoom: float) -> torch.Tensor:
    """Return affine maps (image, 2, 3) from the places of a picture to those of an image, both from -1 to 1.

    Parameters
    ----------
    drawn : (image, 4) uniform from -1 to 1: of the shift along y and x, the turn, and the zoom.
    size : (y, x) of the image. shift : pixels at most. turn : degrees at most.
    zoom : factor at most, from 1 on, by which it is enlarged or reduced.
    """
    drawn = np.asarray(drawn, np.float64)
    angle = np.deg2rad(turn) * drawn[:, 2]
    factor = np.exp(-math.log(zoom) * drawn[:, 3])
    height, width = size
    maps = np.zeros((len(drawn), 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = factor * np.cos(angle)
    maps[:, 0, 1] = -factor * np.sin(angle) * height / width
    maps[:, 1, 0] = factor * np.sin(angle) * width / height
    maps[:, 0, 2] = 2 * shift * drawn[:, 1] / width
    maps[:, 1, 2] = 2 * shift * drawn[:, 0] / height
    return torch.from_numpy(maps.astype(np.float32))


def crops(drawn: NDArray, smallest: float) -> torch.Tensor:
    """Return affine maps (image, 2, 3) to parts of an image with a share of its sides from `smallest` to 1.

    `drawn` is (image, 3), uniform from -1 to 1: of the place along y and x, and the share.
    """
    drawn = np.asarray(drawn, np.float64)
    share = smallest + (1 - smallest) * (drawn[:, 2] + 1) / 2
    maps = np.zeros((len(drawn), 2, 3))
    maps[:, 0, 0] = maps[:, 1, 1] = share
    maps[:, 0, 2], maps[:, 1, 2] = (1 - share) * drawn[:, 1], (1 - share) * drawn[:, 0]
    return torch.from_numpy(maps.astype(np.float32))


def moved(images: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """Return images (image, channel, y, x) seen through affine maps; beyond the border, the image is mirrored."""
    grid = functional.affine_grid(maps.to(images.device, images.dtype), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, "bilinear", "reflection", align_corners=False)
