"""Attacked images in 8 bits: rounded so that the distance to the image does not grow above what is allowed."""

from __future__ import annotations

import numpy as np
import torch

from kernels.attacks.balls import Ball

SCALES = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)
"""Factors by which a difference without a bound is made longer, until it survives the rounding."""


def towards(images: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Round every entry towards the image: no entry's distance grows, so no norm does. Pixels from 0 to 255."""
    return images + (points - images).trunc()


def spending(ball: Ball, points: torch.Tensor) -> torch.Tensor:
    """Round towards the image, then spend what is left of the radius: entries with the largest rests go one further.

    With `linf` and a whole radius this is rounding to the nearest. With `l2`, entry after entry is rounded away from
    the image, those with the largest rest first, as long as the length stays within the radius.
    """
    images = ball.images
    if ball.norm == "linf":
        return images + (points - images).round()
    delta = (points - images).flatten(1).double()
    base = delta.trunc()
    rest = (delta - base).abs()
    order = rest.sort(stable=True, dim=1, descending=True).indices
    price = (2 * base.abs() + 1).where(rest > 0, torch.inf)  # of one more in this entry, in squares
    spent = price.gather(1, order).cumsum(1)
    left = ball.radius**2 - base.square().sum(1, keepdim=True)
    further = torch.zeros_like(rest).scatter(1, order, (spent <= left).double())
    return images + (base + further * delta.sign()).view_as(images).to(images)


def candidates(images: torch.Tensor, points: torch.Tensor) -> list[torch.Tensor]:
    """Return roundings of points without a bound: to the nearest and towards the image, ever longer differences."""
    found = []
    for scale in SCALES:
        longer = (images + scale * (points - images)).clamp(0, 255)
        found += [towards(images, longer), longer.round()]
    return found


def distances(images: torch.Tensor, rounded: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest difference of each row in 255ths, and its length in units of the pixel range, float64 (row,).

    Both are uint8 (row, channel, y, x); the sums are exact.
    """
    delta = (rounded.to(torch.int64) - images.to(torch.int64)).flatten(1)
    return delta.abs().amax(1).double(), delta.square().sum(1).double().sqrt() / 255


def noise(images: torch.Tensor, rounded: torch.Tensor, seeds: list[list[int]]) -> torch.Tensor:
    """Return images with the same differences in random places and with random signs, uint8 like both.

    Every norm of the noise is that of the attack before it is cut to 0 and 255.
    """
    made = torch.empty_like(images)
    for row, seed in enumerate(seeds):
        random = np.random.default_rng(seed)
        delta = (rounded[row].to(torch.int64) - images[row].to(torch.int64)).flatten().cpu().numpy()
        drawn = random.permutation(delta) * random.choice([-1, 1], delta.size)
        pixels = images[row].flatten().cpu().numpy().astype(np.int64) + drawn
        made[row] = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).view_as(images[row])
    return made
