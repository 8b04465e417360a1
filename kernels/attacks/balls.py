"""Balls around images, in the box of all pixels: projections, directions and random points.

Pixels are floating-point numbers from 0 to 255, (row, channel, y, x).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

Norm = Literal["linf", "l2"]
WHITE = 255.0
TINY = 1e-12
INSIDE = 1 - 1e-6
"""Share of a radius of `l2` that projections keep to: float32 rounds, and no distance may be above the radius."""


@dataclass(frozen=True)
class Ball:
    """All pixels within a distance of images: `radius` in 255ths of the pixel range, for both norms."""

    images: torch.Tensor
    norm: Norm
    radius: float

    def projected(self, points: torch.Tensor) -> torch.Tensor:
        """Return points inside the ball and the box.

        With `linf` these are the nearest. With `l2` the difference is shortened, then cut to the box, which makes it
        no longer; points of the ball that leave the box may have a nearer one.
        """
        if self.norm == "linf":
            low, high = (self.images - self.radius).clamp_min(0), (self.images + self.radius).clamp_max(WHITE)
            return torch.maximum(torch.minimum(points, high), low)
        delta, radius = points - self.images, INSIDE * self.radius
        return (self.images + delta * (radius / lengths(delta).clamp_min(radius))).clamp(0, WHITE)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Return the steepest ascent in the norm: signs, or the gradient of length 1 (0 where there is none)."""
        if self.norm == "linf":
            return gradient.sign()
        return gradient / lengths(gradient).clamp_min(TINY)

    def random(self, seeds: Sequence[Sequence[int]]) -> torch.Tensor:
        """Draw a point of each row from its own seed: uniform in the box of `linf`, or in the ball of `l2`."""
        shape = tuple(self.images.shape[1:])
        drawn = []
        for seed in seeds:
            random = np.random.default_rng(list(seed))
            if self.norm == "linf":
                own = random.uniform(-1, 1, shape)
            else:
                own = random.standard_normal(shape)
                own *= random.uniform() ** (1 / own.size) / np.linalg.norm(own)
            drawn.append(own.astype(np.float32))
        return self.projected(self.images + self.radius * torch.from_numpy(np.stack(drawn)).to(self.images))


def lengths(values: torch.Tensor) -> torch.Tensor:
    """Return the Euclidean length of each row, with the rows' own number of dimensions."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).view(-1, *[1] * (values.ndim - 1))
