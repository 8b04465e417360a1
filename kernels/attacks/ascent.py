"""Attacks inside a ball by projected gradient ascent: PGD, and APGD, which chooses its own steps.

A row's path depends on its own gradients alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.attacks.balls import Ball

MOMENTUM = 0.75
INCREASES = 0.75  # share of steps that have to increase the loss between two checks
FIRST, SHORTER, SHORTEST = 0.22, 0.03, 0.06  # the first interval between checks, by how much others shrink, the last


@dataclass(frozen=True)
class Look:
    """A forward and a backward at points: the loss (row,), its gradient, and the margin (row,), below 0 with success.

    The loss is to be maximised.
    """

    loss: torch.Tensor
    gradient: torch.Tensor
    margin: torch.Tensor


@dataclass
class Best:
    """The point of each row with the lowest margin so far, and after which step it was first below 0; -1: never.

    Step 0 is the start.
    """

    points: torch.Tensor
    margin: torch.Tensor
    first: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.points = self.points.clone()
        self.first = torch.where(self.margin < 0, 0, -1)
        self.margin = self.margin.clone()

    def update(self, points: torch.Tensor, margin: torch.Tensor, step: int) -> None:
        """Keep what is better, after a step."""
        lower = margin < self.margin
        self.points[lower], self.margin[lower] = points[lower], margin[lower]
        self.first[(margin < 0) & (self.first < 0)] = step


def pgd(
    start: torch.Tensor,
    ball: Ball,
    look: Callable[[torch.Tensor], Look],
    judge: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    rate: float | None = None,
) -> Best:
    """Climb with steps of one length: Madry et al., "Towards deep learning models resistant to attacks" (ICLR 2018).

    Parameters
    ----------
    start : (row, ...) points of the ball. judge : the margin of points, without a gradient.
    rate : length of a step, in 255ths; default: 2.5 radii over all steps.
    """
    rate = 2.5 * ball.radius / steps if rate is None else rate
    points, seen = start, look(start)
    best = Best(points, seen.margin)
    for step in range(1, steps + 1):
        points = ball.projected(points + rate * ball.direction(seen.gradient))
        if step == steps:
            best.update(points, judge(points), step)
        else:
            seen = look(points)
            best.update(points, seen.margin, step)
    return best


def apgd(start: torch.Tensor, ball: Ball, look: Callable[[torch.Tensor], Look], steps: int) -> Best:
    """Climb with momentum, and with steps that are halved where they bring too little.

    Croce and Hein (ICML 2020), algorithm 1. It looks `steps` + 1 times.
    """
    seen = look(start)
    best = Best(start, seen.margin)
    points, before, gradient = start, start, seen.gradient
    highest, place, pull = seen.loss.clone(), start.clone(), gradient.clone()
    rate = torch.full_like(seen.loss, 2 * ball.radius)
    last, shortened = highest.clone(), torch.ones_like(highest, dtype=torch.bool)
    interval = max(int(FIRST * steps), 1)
    increases, since, previous = torch.zeros_like(highest), 0, seen.loss
    for step in range(steps):
        own = rate.view(-1, *[1] * (points.ndim - 1))
        ahead = ball.projected(points + own * ball.direction(gradient))
        if step:
            ahead = ball.projected(points + MOMENTUM * (ahead - points) + (1 - MOMENTUM) * (points - before))
        before, points = points, ahead
        seen = look(points)
        gradient = seen.gradient
        best.update(points, seen.margin, step + 1)
        higher = seen.loss > highest
        highest = torch.where(higher, seen.loss, highest)
        place[higher], pull[higher] = points[higher], gradient[higher]
        increases = increases + (seen.loss > previous)
        previous, since = seen.loss, since + 1
        if since == interval:
            little = increases <= INCREASES * interval
            still = ~shortened & (last >= highest)
            shortened = little | still
            last = highest.clone()
            rate = torch.where(shortened, rate / 2, rate)
            points, gradient = points.clone(), gradient.clone()
            points[shortened], gradient[shortened] = place[shortened], pull[shortened]
            interval = max(interval - max(int(SHORTER * steps), 1), max(int(SHORTEST * steps), 1))
            increases, since = torch.zeros_like(highest), 0
    return best
