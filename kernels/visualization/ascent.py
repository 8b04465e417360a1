"""Gradient ascent of many images at once, each for itself.

The rule is Adam (Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015), whose rate falls to 0 as half
a cosine. It works entry by entry, so an image's path depends on no other image of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

FIRST, SECOND = 0.9, 0.99  # how much of their past the two moments keep
TINY = 1e-12  # below the root of the second moment
LOOKS = 4
"""How often an ascent looks where it is, in equal steps; the best of these places and the start is its end."""


@dataclass(frozen=True)
class Ascent:
    """Where an ascent of each image ended.

    Attributes
    ----------
    best : like the start, the place with the highest value among the start and those that were looked at.
    value, start : (image,) its value, and that of the start: never above it.
    step : (image,) int64, the step after which it was found; 0: the start.
    finite : (image,) bool, whether each gradient was, and small enough to be squared; NaN and infinity never leave the
        moments, so the end of the path tells.
    """

    best: torch.Tensor
    value: torch.Tensor
    start: torch.Tensor
    step: torch.Tensor
    finite: torch.Tensor


def ascend(
    start: torch.Tensor,
    gradient: Callable[[torch.Tensor, int], torch.Tensor],
    value: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    rate: float,
    bounded: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Ascent:
    """Climb from each of some places.

    Parameters
    ----------
    start : (image, ...) floating-point.
    gradient : of the place and the number of the step from 0, the gradient to follow, like the place.
    value : of the place, what is to be high, (image,), which no chance enters.
    rate : by which an entry moves at most in one step, about, at first.
    bounded : returns the nearest allowed place.
    """
    place = start.clone()
    mean, square = torch.zeros_like(place), torch.zeros_like(place)
    first = value(place)
    best, highest = place.clone(), first.clone()
    found = torch.zeros(len(place), dtype=torch.int64, device=place.device)
    looks = {round(steps * number / LOOKS) for number in range(1, LOOKS + 1)}
    for step in range(steps):
        given = gradient(place, step)
        mean.lerp_(given, 1 - FIRST)
        square.mul_(SECOND).addcmul_(given, given, value=1 - SECOND)
        own = rate * 0.5 * (1 + math.cos(math.pi * (step + 1) / steps)) if steps > 1 else rate
        root = square.sqrt().mul_((1 - SECOND ** (step + 1)) ** -0.5).add_(TINY)
        place = torch.addcdiv(place, mean, root, value=own / (1 - FIRST ** (step + 1)))
        if bounded is not None:
            place = bounded(place)
        if step + 1 in looks:
            here = value(place)
            higher = here > highest
            best[higher], highest[higher], found[higher] = place[higher], here[higher], step + 1
    finite = (place.isfinite() & square.isfinite()).flatten(1).all(1)
    return Ascent(best, highest, first, found, finite)
