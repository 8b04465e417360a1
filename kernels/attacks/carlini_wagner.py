"""The smallest change that succeeds, by its Euclidean length: Carlini and Wagner (S&P 2017), section VI.A."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.attacks.balls import WHITE

RATE = 0.01
START = 1.0
GROWTH = 10.0
EDGE = 1 - 1e-6  # pixels of 0 and 255 have no finite place behind a hyperbolic tangent
MOMENTS = 0.9, 0.999


@dataclass(frozen=True)
class Smallest:
    """The shortest change of each row.

    Attributes
    ----------
    points : the pixels; the image where no change succeeded. length : of the change, in units of the pixel range, inf
        where none did. margin : there. first : the step after which one first did, all searches counted; -1: never.
    """

    points: torch.Tensor
    length: torch.Tensor
    margin: torch.Tensor
    first: torch.Tensor


def smallest(
    images: torch.Tensor,
    look: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    steps: int,
    searches: int,
) -> Smallest:
    """Minimise ||x - image||^2 + c max(margin, 0) over x = tanh, and search the least c that succeeds.

    Parameters
    ----------
    images : pixels from 0 to 255. look : gives the margin (row,) of points and its gradient, like the points.
    steps : of Adam in each search. searches : values of c, by halving from 1, or times ten until one succeeds.
    """
    rows = len(images)
    wide = -1, *[1] * (images.ndim - 1)
    low, high = (torch.full((rows,), value, device=images.device) for value in (0.0, torch.inf))
    weight = torch.full((rows,), START, device=images.device)
    found = images.clone()
    shortest = torch.full((rows,), torch.inf, device=images.device)
    margins = torch.full((rows,), torch.inf, device=images.device)
    first = torch.full((rows,), -1, dtype=torch.int64, device=images.device)
    origin = torch.atanh((2 * images / WHITE - 1) * EDGE)
    unit = images / WHITE
    for search in range(searches):
        place = origin.clone()
        mean, square = torch.zeros_like(place), torch.zeros_like(place)
        succeeded = torch.zeros(rows, dtype=torch.bool, device=images.device)
        for step in range(steps):
            bent = torch.tanh(place)
            points = (bent + 1) / 2
            margin, pull = look(points * WHITE)
            delta = points - unit
            length = torch.linalg.vector_norm(delta.flatten(1), dim=1)
            better = (margin < 0) & (length < shortest)
            found[better], shortest[better], margins[better] = points[better] * WHITE, length[better], margin[better]
            first[(margin < 0) & (first < 0)] = search * steps + step
            succeeded |= margin < 0
            active = (weight * (margin > 0)).view(wide)
            gradient = (2 * delta + active * WHITE * pull) * (1 - bent.square()) / 2
            mean.lerp_(gradient, 1 - MOMENTS[0])
            square.mul_(MOMENTS[1]).addcmul_(gradient, gradient, value=1 - MOMENTS[1])
            scale = (square / (1 - MOMENTS[1] ** (step + 1))).sqrt().add_(1e-8)
            place = place - RATE * mean / (1 - MOMENTS[0] ** (step + 1)) / scale
        high = torch.where(succeeded, torch.minimum(high, weight), high)
        low = torch.where(succeeded, low, torch.maximum(low, weight))
        weight = torch.where(high.isinf(), weight * GROWTH, (low + high) / 2)
    return Smallest(found, shortest, margins, first)
