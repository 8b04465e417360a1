"""Multipliers of DeepLIFT: by how much an output differs from its reference, per unit of difference of each input.

For an input u, its reference u0 and a function f, the multipliers m satisfy sum m (u - u0) = f(u) - f(u0). References
may have one image where inputs have many: they are broadcast. Shrikumar et al., "Learning important features through
propagating activation differences" (ICML 2017).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

Function = Callable[[torch.Tensor], torch.Tensor]
Kind = Literal["smooth", "kinked"]


def secant(
    function: Function, u: torch.Tensor, u0: torch.Tensor, y: torch.Tensor, y0: torch.Tensor, kind: Kind
) -> torch.Tensor:
    """Return the slope of the line from (u0, y0) to (u, y), elementwise: the rescale rule, eq. 11.

    Where u and u0 are so close that rounding would decide, it is the derivative between them. Smooth functions have
    that within the cube root of the machine's precision, where both are equally exact. At a kink the derivative is no
    approximation, so there it takes over for differences of a few roundings alone.
    """
    difference = u - u0
    size = torch.maximum(u.abs(), u0.abs())
    precision = torch.finfo(u.dtype).eps
    if kind == "smooth":
        near = difference.abs() <= size.clamp(max=1.0) * precision ** (1 / 3)
    else:
        near = difference.abs() <= size * (16 * precision)
    slope = (y - y0) / difference.masked_fill(near, 1.0)
    if not u.is_cuda and not bool(near.any()):  # to ask a GPU would wait for it
        return slope
    return torch.where(near, derivative(function, (u + u0) / 2), slope)


def derivative(function: Function, u: torch.Tensor) -> torch.Tensor:
    """Return the derivative of an elementwise function."""
    with torch.enable_grad():
        given = u.detach().requires_grad_()
        return torch.autograd.grad(function(given).sum(), given)[0]


def of_relu(u: torch.Tensor, u0: torch.Tensor, y: torch.Tensor, y0: torch.Tensor) -> torch.Tensor:
    """Return `secant` of max(u, 0), which is exact wherever u and u0 differ."""
    difference = u - u0
    same = difference == 0
    return torch.where(same, (u > 0).to(u.dtype), (y - y0) / difference.masked_fill_(same, 1.0))


# Softmax --------------------------------------------------------------------------------------------------------------


def of_logsumexp(
    u: torch.Tensor, u0: torch.Tensor, dims: int | tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return multipliers of log(sum(exp(u))), like u, with logsumexp of u and of u0.

    Exponential, sum and logarithm have a secant each: LM(e^u, e^u0) / LM(sum e^u, sum e^u0), with the logarithmic mean
    LM(a, b) = (a - b) / (ln a - ln b). Computed from logarithms, nothing overflows or cancels.
    """
    high, low = torch.logsumexp(u, dims, keepdim=True), torch.logsumexp(u0, dims, keepdim=True)
    above = torch.maximum(high, low)
    inner = torch.exp(torch.maximum(u, u0) - above) * _relative_mean(u, u0)
    return inner / _relative_mean(high, low), high, low


def of_softmax(u: torch.Tensor, u0: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the two factors of softmax's multipliers: of exp(z), where z = u - logsumexp(u), and those of logsumexp.

    `sent_through_softmax` applies them.
    """
    inner, high, low = of_logsumexp(u, u0, dim)
    z, z0 = u - high, u0 - low
    return torch.exp(torch.maximum(z, z0)) * _relative_mean(z, z0), inner


def sent_through_softmax(sent: torch.Tensor, outer: torch.Tensor, inner: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the multipliers of softmax's input from those of its output and the factors of `of_softmax`."""
    of_z = sent * outer
    return of_z - inner * of_z.sum(dim, keepdim=True)


def _relative_mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the logarithmic mean of e^a and e^b over the larger of them: (1 - e^-d) / d with d = |a - b|; 1 at 0."""
    distance = (a - b).abs()
    none = ~(distance > 0)  # equal, or both -inf
    return torch.where(none, 1.0, -torch.expm1(-distance) / distance.masked_fill(none, 1.0))


# Norms ----------------------------------------------------------------------------------------------------------------


def sent_through_norm(
    sent: torch.Tensor,
    deviations: torch.Tensor,
    root: torch.Tensor,
    root0: torch.Tensor,
    dims: tuple[int, ...],
    centred: bool,
) -> torch.Tensor:
    """Return the multipliers of x from those of d r, where d = x - mean(x) and r = (mean(d^2) + eps)^(-1/2).

    The product is split by its Shapley value, square and root have their secants:
    d r - d0 r0 = (d - d0) (r + r0) / 2 + (r - r0) (d + d0) / 2,
    r - r0 = -(r r0)^2 / (r + r0) mean((d + d0) (d - d0)).

    Parameters
    ----------
    deviations : d + d0. root, root0 : r and r0, of size 1 in `dims`. centred : whether d = x - mean(x), or d = x.
    """
    of_root = (sent * deviations).sum(dims, keepdim=True) / 2
    count = deviations.numel() // max(of_root.numel(), 1)
    of_variance = -of_root * (root * root0) ** 2 / ((root + root0) * count)
    of_deviation = sent * ((root + root0) / 2) + of_variance * deviations
    return of_deviation - of_deviation.mean(dims, keepdim=True) if centred else of_deviation
