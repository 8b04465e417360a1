"""The backward functions of layer-wise relevance propagation: what is sent back is c = R / y."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from kernels.attribution.relevance import Rule, Shares, by_sign, parts, stabilised
from pipeline.networks.graph.call_sites import UnsupportedError, Vouched
from pipeline.networks.graph.ledger import Site

Form = Literal["z", "p", "pn", "zt", "zp", "single"]


@dataclass
class Linear:
    """A linear call f(x, w) + b, in which x alone is of the input.

    Attributes
    ----------
    side : the shape in which a number of each output unit is added to the output; None: `bias` has it already.
    out : the axis of the weights that counts output units; None: unknown, so that no BatchNorm is folded into it.
    z : f(x, w), computed. scale, shift : of a folded BatchNorm and the bias, in the shape of `side`.
    module, raw : that calls it, and whether x is the network's input. norms, others : calls that read the output.
    version : of x, when it was called.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    x: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    rule: Rule
    side: tuple[int, ...] | None = None
    out: int | None = None
    z: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    module: str = ""
    raw: bool = False
    norms: int = 0
    others: int = 0
    version: int = -1

    def __post_init__(self) -> None:
        if self.version < 0:
            self.version = self.x._version
        self.shift = self.bias if self.bias is None or self.side is None else self.bias.view(self.side)

    @property
    def foldable(self) -> bool:
        return self.norms > 0 and not self.others

    @property
    def folded(self) -> torch.Tensor:
        """The weights, times the scale of a folded BatchNorm."""
        if self.scale is None:
            return self.weight
        assert self.out is not None
        shape = [1] * self.weight.ndim
        shape[self.out] = -1
        return self.weight * self.scale.view(shape)


class Mixed(Vouched):
    """Share the relevance of y = scale z + bias by a rule, given sums of contributions as parts of the graph.

    Forms: `z`, the sum itself, for the epsilon rule; `p`, its value and P; `pn`, P and N, which are scaled; `zt`, z and
    the sum of magnitudes; `zp`, z and P; `single`, one contribution to each entry.
    """

    @staticmethod
    def forward(ctx: Any, site: Site, rule: Rule, form: Form, scale: Any, bias: Any, *given: torch.Tensor) -> Any:
        ctx.save_for_backward(scale, bias, *given)
        ctx.rest = site, rule, form
        y = _affine(form, scale, bias, given)
        return y.clone() if y is given[0] else y

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        scale, bias, *given = ctx.saved_tensors
        site, rule, form = ctx.rest
        (c,) = sent
        y = _affine(form, scale, bias, given)
        if form == "z":
            shares = stabilised(rule.epsilon, bias, y, c)
        else:
            shares = by_sign(rule, *_sums(form, scale, given), bias, y, c)
        site.book(shares.bias, shares.leak)
        return (None,) * 5 + _sent(form, scale, given, shares)


def _affine(form: Form, scale: Any, bias: Any, given: Sequence[torch.Tensor]) -> torch.Tensor:
    z = given[0] + given[1] if form == "pn" else given[0]
    if form != "pn" and scale is not None:
        z = z * scale
    return z if bias is None else z + bias


def _sums(form: Form, scale: Any, given: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return P and N without the bias."""
    if form == "pn":
        return given[0], given[1]
    if form == "p":
        return given[1], None
    z = given[0] if scale is None else given[0] * scale
    if form == "single":
        return z.clamp(min=0), z.clamp(max=0)
    if form == "zp":
        return given[1], (z - given[1]).clamp(max=0)
    return parts(z, given[1] if scale is None else given[1] * scale.abs())


def _sent(form: Form, scale: Any, given: Sequence[torch.Tensor], shares: Shares) -> tuple[torch.Tensor | None, ...]:
    """Return what each of the given sums gets."""
    up, down = shares.positive, shares.negative

    def scaled(values: torch.Tensor, by: Any) -> torch.Tensor:
        return values if by is None else values * by

    if form == "p":
        return None, up
    if form == "pn":
        return up, down
    if form == "z":
        return (scaled(up, scale),)
    if form == "single":
        z = scaled(given[0], scale)
        return (scaled(torch.where(z > 0, up, torch.zeros_like(up) if down is None else down), scale),)
    if form == "zp":
        assert down is not None
        return scaled(down, scale), up - down
    half = up / 2
    if down is None:
        return scaled(half, scale), half if scale is None else half * scale.abs()
    other = down / 2
    return scaled(half + other, scale), scaled(half - other, None if scale is None else scale.abs())


class AtInput(Vouched):
    """Share the relevance of the first linear map directly among the inputs, which may be 0 or have bounds."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, sites: Any, site: Site, rule: Rule, linear: Linear) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.rest = sites, site, rule, linear
        y = linear.function(x, linear.folded)
        return y if linear.shift is None else y + linear.shift

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        sites, site, rule, linear = ctx.rest
        (c,) = sent
        f, w, bias = linear.function, linear.folded, linear.shift
        with torch.enable_grad():
            v = x.detach().requires_grad_()
            z = f(v, w)
            y = z.detach() if bias is None else z.detach() + bias
            if rule.kind == "z_b":
                positive = _of_bounds(v, z, linear, sites.bounds(), c * y, site)
            elif rule.kind == "w_squared":
                ones = torch.ones_like(v).requires_grad_()
                total = f(ones, w * w)
                some = total.detach() > 0
                site.book(leak=torch.where(some, 0.0, c * y))
                positive = torch.autograd.grad(total, ones, torch.where(some, c * y / total.detach(), 0.0))[0]
            else:
                magnitude = x.detach().abs().requires_grad_()
                total = f(magnitude, w.abs())
                zd, td = z.detach(), total.detach()
                if rule.kind == "epsilon":
                    shares = stabilised(rule.epsilon, bias, y, c)
                else:
                    shares = by_sign(rule, *parts(zd, td), bias, y, c)
                site.book(shares.bias, shares.leak)
                found = []
                for s, sign in ((shares.positive, 1), (shares.negative, -1)):
                    if s is not None:
                        of_z, of_total = (
                            torch.autograd.grad(each, at, s / 2, retain_graph=True)[0]
                            for each, at in ((z, v), (total, magnitude))
                        )
                        found.append(x * of_z + sign * x.abs() * of_total)
                positive = found[0]
                if len(found) > 1:
                    sites.direct = sites.direct + found[1].detach()
        sites.direct = sites.direct + positive.detach()
        sites.positive = sites.positive + positive.detach()
        return torch.zeros_like(x), None, None, None, None


def _of_bounds(
    v: torch.Tensor,
    z: torch.Tensor,
    linear: Linear,
    bounds: tuple[torch.Tensor, torch.Tensor],
    r: torch.Tensor,
    site: Site,
) -> torch.Tensor:
    """Return the relevance of the inputs by z^B: contributions x w - low w+ - high w-, which are never negative.

    Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition" (2017), eq. 13.
    """
    f, w = linear.function, linear.folded
    low, high = (each.to(v.device, v.dtype).expand_as(v).clone().requires_grad_() for each in bounds)
    of_low, of_high = f(low, w.clamp(min=0)), f(high, w.clamp(max=0))
    total = (z - of_low - of_high).detach()
    some = total > 0
    s = torch.where(some, r / total, 0.0)
    site.book(leak=torch.where(some, 0.0, r))
    of_x, of_low, of_high = (
        torch.autograd.grad(each, at, s)[0] for each, at in ((z, v), (of_low, low), (of_high, high))
    )
    return v * of_x - low * of_low - high * of_high


class Constant(Vouched):
    """A constant among values of the input; its relevance is booked as a bias."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, value: torch.Tensor, site: Site) -> torch.Tensor:
        ctx.save_for_backward(value)
        ctx.site = site
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (value,), (c,) = ctx.saved_tensors, sent
        ctx.site.book(bias=torch.where(c == 0, 0.0, c * value))  # infinite ones are masks
        return None, None, None


class Passed(Vouched):
    """Pass relevance through a function of each entry; what arrives where the entry is 0 is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        small = x.abs() <= torch.finfo(x.dtype).tiny ** 0.5
        ctx.save_for_backward(torch.where(small, 0.0, y / x), torch.where(small, y, 0.0))
        ctx.site = site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (ratio, lost), (c,) = ctx.saved_tensors, sent
        ctx.site.book(leak=torch.where(lost == 0, 0.0, c * lost))
        return c * ratio, None, None


class Held(Vouched):
    """Hold values of the input constant; relevance that reaches them is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        ctx.save_for_backward(y)
        ctx.site = site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (y,), (c,) = ctx.saved_tensors, sent
        ctx.site.book(leak=torch.where(c == 0, 0.0, c * y))
        return None, None, None


class Expanded(Vouched):
    """Expand a softmax p(x) by its gradient: an input gets x dp/dx; what that misses of p is lost.

    Achtibat et al., "AttnLRP" (ICML 2024), proposition 3.1.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, axis: int, site: Site) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.rest = axis, site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (x, y), (axis, site), (c,) = ctx.saved_tensors, ctx.rest, sent
        y = y.to(x.dtype)  # which may be wider
        r = c.to(x.dtype) * y
        slope = r - y * r.sum(axis, keepdim=True)
        site.book(leak=r - torch.where(y == 0, 0.0, x * slope))
        return torch.where(y == 0, 0.0, slope), None, None, None


class Cast(Vouched):
    """Change the type of values; what rounding takes of their relevance is lost."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, site: Site) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.site = site
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (x, y), (c,) = ctx.saved_tensors, sent
        narrow = c.to(x.dtype)
        ctx.site.book(leak=c.double() * y.double() - narrow.double() * x.double())
        return narrow, None, None


class Halved(Vouched):
    """Halve what is sent back: one of two factors."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        return sent[0] / 2


class Product(Vouched):
    """Multiply matrices that are both of the input; each gets half.

    Operands are copied so that none is transposed in memory: else the bits depend on an image's place in the batch.
    """

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (a, b), half = ctx.saved_tensors, sent[0] / 2
        of_a, of_b = half @ b.mT.contiguous(), a.contiguous().mT @ half.contiguous()
        return of_a.sum_to_size(a.shape), of_b.sum_to_size(b.shape)


class Unread(Vouched):
    """The output of a convolution that only a BatchNorm reads; relevance goes past it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, refusal: UnsupportedError) -> torch.Tensor:
        ctx.refusal = refusal
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        raise ctx.refusal
