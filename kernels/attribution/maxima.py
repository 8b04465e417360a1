"""Multipliers of DeepLIFT for a maximum over windows: the cross-maximum, and the Shapley value.

For a window's inputs x with references x0, both satisfy sum m (x - x0) = max(x) - max(x0).
"""

from __future__ import annotations

import math

import torch


def cross_max(
    u: torch.Tensor, u0: torch.Tensor, y: torch.Tensor, y0: torch.Tensor, at: torch.Tensor, at0: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each window the place of the one input that gets a multiplier, and the multiplier.

    A maximum that rises above its reference is due to the input that is the maximum, one that falls to the input that
    was: max(x) - max(x0) = (c - max(x0)) + (max(x) - c), with the cross-maximum c = max(max(x), max(x0)). Then
    0 <= m <= 1. If nothing changes, the maximum has the gradient 1 if its own value is that of the reference, else 0.

    Parameters
    ----------
    u, u0 : (..., place), input and reference.
    y, y0 : (..., window), their maxima. at, at0 : int64 (..., window), the places of these.
    """
    shape = torch.broadcast_shapes(y.shape, y0.shape)
    place = torch.where(y >= y0, at, at0).expand(shape)
    full = (*shape[:-1], u.shape[-1])
    difference = (u - u0).expand(full).gather(-1, place)
    none = difference == 0
    return place, torch.where(none, (y == y0).to(u.dtype), (y - y0) / difference.masked_fill(none, 1.0))


def shapley_of_max(x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    """Return the multipliers m = phi / (x - x0) of the Shapley values phi of max(x) against max(x0), (window, input).

    The players are the inputs; one that has not joined is at its reference. The maximum is the integral over thresholds
    t of 1[max > t]. At t, let p inputs rise above it (x > t >= x0) and q fall below it (x0 > t >= x), and no input be
    above it at both: one of the p gets q! (p - 1)! / (p + q)!, one of the q gets -(q - 1)! p! / (p + q)!, and the
    others nothing. Between two neighbouring values of x and x0 nothing changes, so the integral is a sum, exact for
    windows of any size. An input at its reference has the derivative: what it would get at t = x if it rose.

    -inf, at both, is padding: it is no player.
    """
    count = x.shape[1]
    low, high = torch.minimum(x, x0), torch.maximum(x, x0)
    values = torch.cat([low, high], 1).sort(1).values
    values = torch.where(values.isinf(), values.amax(1, keepdim=True), values).sort(1).values
    rises, share = x > x0, _shares(count, x.dtype, x.device)
    total, still = torch.zeros_like(x), torch.zeros_like(x)
    for number in range(2 * count - 1):
        at, width = values[:, number, None], values[:, number + 1, None] - values[:, number, None]
        crossed = (high > at) & (low <= at)
        up, down = crossed & rises, crossed & ~rises
        p, q = up.sum(1, keepdim=True), down.sum(1, keepdim=True)
        open_ = (low <= at).all(1, keepdim=True)
        gain, loss = share[p, q], share[q, p]
        total += torch.where(open_, width * torch.where(up, gain, torch.where(down, -loss, 0.0)), 0.0)
    same = x == x0
    if x.is_cuda or bool(same.any()):  # to ask a GPU would wait for it
        for player in range(count):
            at = x[:, player, None]
            others = torch.ones(count, dtype=torch.bool, device=x.device)
            others[player] = False
            crossed = (high > at) & (low <= at) & others
            p, q = (crossed & rises).sum(1), (crossed & ~rises).sum(1)
            open_ = ((low <= at) | ~others).all(1) & x[:, player].isfinite()
            still[:, player] = torch.where(open_, share[p + 1, q], 0.0)
    return torch.where(same, still, total / (x - x0).masked_fill(same, 1.0))


def _shares(count: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return q! (p - 1)! / (p + q)! at [p, q]; 0 for p = 0."""
    table = torch.zeros((count + 2, count + 2), dtype=torch.float64)
    for p in range(1, count + 2):
        for q in range(count + 2):
            table[p, q] = math.exp(math.lgamma(q + 1) + math.lgamma(p) - math.lgamma(p + q + 1))
    return table.to(device, dtype)
