"""How layer-wise relevance propagation shares the relevance of a unit among its inputs, its bias, and what is lost.

A unit y = sum_j z_j + b has contributions z_j = a_j w_j. P >= 0 is the sum of the positive ones, N <= 0 that of the
negative ones. A rule turns the unit's relevance R into two factors: an input gets z_j s+ or z_j s-, by the sign of its
contribution. A bias is a contribution like any other. Relevance is given as a multiplier c with R = c y, so that it
stays finite where y is small.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["alpha_beta", "epsilon", "gamma", "z_b", "w_squared"]
ULPS = 8
"""Units in the last place of sum |z_j| below which P or N is rounding."""


@dataclass(frozen=True)
class Rule:
    """A rule and its numbers; beta is alpha - 1."""

    kind: Kind = "alpha_beta"
    alpha: float = 1.0
    epsilon: float = 1e-6
    gamma: float = 0.25

    @property
    def beta(self) -> float:
        return self.alpha - 1


@dataclass(frozen=True)
class Shares:
    """The factors of a rule, and what of the relevance goes to the bias and is lost; all of the units' shape.

    `negative` is None where it is 0, and `leak` where nothing is lost.
    """

    positive: torch.Tensor
    negative: torch.Tensor | None
    bias: torch.Tensor | None
    leak: torch.Tensor | None


def by_sign(
    rule: Rule, p: torch.Tensor, n: torch.Tensor | None, bias: torch.Tensor | None, y: torch.Tensor, c: torch.Tensor
) -> Shares:
    """Return the shares of the rules that tell positive contributions from negative ones.

    alpha-beta: s+ = alpha R / P, s- = -beta R / N. Where a sign is missing, its part is lost. Bach et al., "On
    pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation" (PLoS ONE 2015),
    eq. 60. gamma: contributions of the unit's own sign count 1 + gamma times. Montavon et al., "Layer-wise relevance
    propagation: an overview" (2019), and for units below 0 its mirror image, so that |denominator| >= |y|.

    Parameters
    ----------
    p, n : sums of the positive and of the negative contributions without the bias; `n` may be None if beta is 0.
    bias : broadcastable to the units. c : R / y.
    """
    if rule.kind == "gamma":
        assert n is not None
        return _gamma(rule, p, n, bias, y, c)
    r = c * y
    least = torch.finfo(r.dtype).tiny
    up = None if bias is None else bias.clamp(min=0)
    p = p if up is None else p + up
    some = p > least
    positive = torch.where(some, rule.alpha * r / p, 0.0)
    if not rule.beta:
        return Shares(positive, None, None if up is None else up * positive, torch.where(some, 0.0, r))
    assert n is not None
    down = None if bias is None else bias.clamp(max=0)
    n = n if down is None else n + down
    others = n < -least
    negative = torch.where(others, -rule.beta * r / n, 0.0)
    leak = r - torch.where(some, rule.alpha * r, 0.0) + torch.where(others, rule.beta * r, 0.0)
    booked = None if up is None or down is None else up * positive + down * negative
    return Shares(positive, negative, booked, leak)


def _gamma(
    rule: Rule, p: torch.Tensor, n: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, c: torch.Tensor
) -> Shares:
    up, down = (None, None) if bias is None else (bias.clamp(min=0), bias.clamp(max=0))
    own = torch.where(y > 0, p if up is None else p + up, n if down is None else n + down)
    total = y + rule.gamma * own
    factor = torch.where(y == 0, 0.0, c * (y / total))
    more = (1 + rule.gamma) * factor
    positive, negative = torch.where(y > 0, more, factor), torch.where(y < 0, more, factor)
    booked = None if up is None or down is None else up * positive + down * negative
    return Shares(positive, negative, booked, None)


def stabilised(epsilon: float, bias: torch.Tensor | None, y: torch.Tensor, c: torch.Tensor) -> Shares:
    """Return the shares of the epsilon rule, s = R / (y + epsilon sign y): Bach et al. (2015), eq. 58.

    Both signs have one factor. With epsilon 0 it is c, the gradient's.
    """
    if not epsilon:
        return Shares(c, c, None if bias is None else bias * c, None)
    s = c * (y / (y + torch.copysign(y.new_full((), epsilon), y)))
    return Shares(s, s, None if bias is None else bias * s, (c - s) * y)


def parts(z: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P and N from z = P + N and the sum of magnitudes P - N; what is rounding alone is 0."""
    tiny = total * (ULPS * torch.finfo(total.dtype).eps)
    p, n = (total + z) / 2, (z - total) / 2
    return torch.where(p > tiny, p, 0.0), torch.where(n < -tiny, n, 0.0)
