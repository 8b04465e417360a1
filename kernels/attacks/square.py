"""An attack without gradients, by random squares: Andriushchenko et al., "Square attack" (ECCV 2020), algorithm 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.attacks.ascent import Best
from kernels.attacks.balls import WHITE, Ball

SHARE = 0.8  # of the image that the first square covers
HALVED = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10000, after which the share is halved."""


def square(
    ball: Ball, judge: Callable[[torch.Tensor], torch.Tensor], queries: int, seeds: Sequence[Sequence[int]]
) -> Best:
    """Start with vertical stripes, and keep every random square that lowers the margin. Only for `linf`.

    Parameters
    ----------
    judge : the margin (row,) of points. seeds : of each row.
    """
    if ball.norm != "linf":
        raise ValueError(f"random squares are of linf, not of {ball.norm}")
    images, radius = ball.images, ball.radius
    channels, height, width = images.shape[1:]
    random = [np.random.default_rng(list(seed)) for seed in seeds]
    stripes = np.stack([own.choice((-1.0, 1.0), (channels, 1, width)) for own in random]).astype(np.float32)
    points = (images + radius * torch.from_numpy(stripes).to(images)).clamp(0, WHITE)
    best = Best(points, judge(points))
    for query in range(1, queries):
        side = side_of(query / queries, (height, width))
        points = best.points.clone()
        for row, own in enumerate(random):
            top, left = own.integers(0, height - side + 1), own.integers(0, width - side + 1)
            signs = torch.from_numpy(own.choice((-1.0, 1.0), (channels, 1, 1)).astype(np.float32)).to(images)
            where = row, slice(None), slice(top, top + side), slice(left, left + side)
            points[where] = (images[where] + radius * signs).clamp(0, WHITE)
        best.update(points, judge(points), query)
    return best


def side_of(done: float, size: tuple[int, int]) -> int:
    """Return the side of a square after a share of the queries."""
    share = SHARE / 2 ** sum(done * 10_000 > each for each in HALVED)
    return min(max(round(math.sqrt(share * size[0] * size[1])), 1), *size)
