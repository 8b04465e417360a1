"""Layer-wise relevance propagation at call sites.

What travels backward is c = R / y, the relevance of each entry divided by its value, so the relevance of an input x is
x times what arrives there. With c, torch's own backward is the rule of all that shares relevance in proportion: sums,
means, pooling, products with constants, rearrangements. A rectifier passes R, and so c where it is active. Other
elementwise functions multiply c by f(x) / x. Max pooling sends all to the largest entry.

Convolutions and linear maps share by their rule. Sums of contributions by sign are convolutions with the positive or
negative part of the weights where the input is known to be nonnegative, and follow from the convolution of magnitudes
elsewhere. A BatchNorm is folded into the convolution before it. Biases, constants and lost relevance are booked in a
`Ledger` where they arise.
"""

from __future__ import annotations

import fnmatch
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from kernels.attribution.relevance import Rule, Shares, by_sign, parts, stabilised
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.gradients import Gradients, Target, gradients, output_of
from pipeline.networks.graph.call_sites import (
    DROPOUTS,
    LINEAR_NODES,
    REARRANGEMENTS,
    WRITERS,
    Call,
    CallSites,
    UnsupportedError,
    Vouched,
    argument,
    tensors_in,
    trains,
)
from pipeline.networks.graph.ledger import Layout, Ledger, layout_of
from pipeline.networks.graph.rectified import MAX_NODES, MAX_POOLS
from pipeline.networks.graph.taken_apart import (
    NORMS,
    multi_head_attention_forward,
    norm_of,
    over_keys,
    scaled_dot_product_attention,
    softmax_of,
)

Preset = Literal["cp_lrp", "attn_lrp"]
ELEMENTWISE = frozenset(
    "gelu silu hardswish mish tanh leaky_relu elu selu celu relu6 hardtanh threshold clamp clamp_min clamp_max prelu "
    "sigmoid hardsigmoid exp expm1 log log1p sqrt rsqrt pow square abs reciprocal softplus erf logsigmoid sin cos "
    "softsign tanhshrink hardshrink softshrink tan sinh cosh atan exp2 log2 special_expit special_erf swish".split()
)
"""Functions of each entry, which pass its relevance on."""
CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
EXTREMES = frozenset({"max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin"})
NONNEGATIVE = frozenset({"relu", "relu6", "sigmoid", "hardsigmoid", "exp", "abs", "square", "softmax", "softplus"})
KEEP_NONNEGATIVE = (
    MAX_POOLS
    | EXTREMES
    | frozenset(
        "add mul mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_bilinear2d sqrt".split()
    )
)
ALL_OF = (slice(None), Ellipsis)
DEPTH = re.compile(r"depth (\d+)(-(\d*))?")


@dataclass(frozen=True)
class Plan:
    """Which rule each convolution or linear map has, and how transformers are treated.

    Attributes
    ----------
    rule : of all without another. rules : by a pattern of the module's name, or `depth A-B` in the order of the
        forward, from 1 on; the first that matches decides.
    preset : `cp_lrp` holds attention weights and the deviation in norms constant (Ali et al., "XAI for transformers",
        ICML 2022); `attn_lrp` expands softmax by its gradient, halves products, and passes norms (Achtibat et al.,
        "AttnLRP", ICML 2024).
    low, high : the least and greatest input, like the input of one image, for the rule z_b.
    signs : whether what positive and negative contributions bring to the input is kept apart.
    """

    rule: Rule = Rule()
    rules: tuple[tuple[str, Rule], ...] = ()
    preset: Preset = "cp_lrp"
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    signs: bool = False


@dataclass(frozen=True)
class Relevance:
    """Relevance of every input, and where the rest of the score is.

    Attributes
    ----------
    values : like the inputs. score, bias, leak : of each image, (image,).
    positive : with `signs`, the part of `values` that contributions above 0 bring.
    layers : by name, the relevance of a layer's output, like the output.
    """

    values: torch.Tensor
    score: torch.Tensor
    bias: torch.Tensor
    leak: torch.Tensor
    positive: torch.Tensor | None
    layers: dict[str, torch.Tensor]


def relevance(
    network: nn.Module, inputs: torch.Tensor, target: Target, plan: Plan, layers: Sequence[str] = ()
) -> Relevance:
    """Share the score of each image among its inputs, by one forward and one backward.

    score = sum(values) + bias + leak holds but for rounding.

    Raises
    ------
    MicrotomeError
        A call has no rule, a pattern matches no module, the plan does not apply to the network, or a layer has no
        relevance of its own.
    """
    sites = Propagated(network, plan, inputs)
    sites.study = _study(network, plan, inputs, target.layer)
    try:
        found = _propagated(network, inputs, target, layers, sites)
    except _OtherCallsError:
        _STUDIES.pop(network, None)
        sites = Propagated(network, plan, inputs)
        sites.study = _study(network, plan, inputs, target.layer)
        found = _propagated(network, inputs, target, layers, sites)
    assert found.inputs is not None
    values = found.inputs * inputs + sites.direct
    positive = None
    if plan.signs:
        rest = values - sites.direct
        positive = sites.positive + rest.clamp(min=0)
    of_layers = {name: output * c for name, (output, c) in found.layers.items()}
    return Relevance(values, found.score, sites.ledger.bias, sites.ledger.leak, positive, of_layers)


def _propagated(
    network: nn.Module, inputs: torch.Tensor, target: Target, layers: Sequence[str], sites: Propagated
) -> Gradients:
    try:
        return gradients(network, inputs, _Scored(target, sites.ledger), layers, sites=sites)
    except MicrotomeError as error:
        for name in layers:
            if name in sites.folded and str(error).startswith(f"layer {name!r}"):
                raise MicrotomeError(
                    f"layer {name!r} has no relevance of its own: it is folded into the BatchNorm after it, which has"
                ) from None
        raise


# The study ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Studied:
    """A call of a studied network: its name and module, its layout, and whether a BatchNorm alone reads its output."""

    name: str
    module: str
    layout: Layout
    folds: bool


class _OtherCallsError(MicrotomeError):
    """The network calls other functions than when it was studied."""


_STUDIES: WeakKeyDictionary[nn.Module, dict[Any, list[Studied]]] = WeakKeyDictionary()


def _study(network: nn.Module, plan: Plan, inputs: torch.Tensor, layer: str | None) -> list[Studied]:
    """Return the calls of a network's forward that book something, from an image and two of which it is the first."""
    known = _STUDIES.setdefault(network, {})
    key = tuple(inputs.shape[1:]), inputs.dtype, inputs.device, layer, plan.preset, plan.signs, plan.rules, plan.rule
    if key in known:
        return known[key]
    noise = torch.randn((2, *inputs.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for images in (noise[:1], noise):
        given = images.to(inputs.device, inputs.dtype)
        sites = Propagated(network, plan, given)
        output_of(network, given, layer, sites)
        found.append(sites.calls)
    one, two = found
    if [each[:2] for each in one] != [each[:2] for each in two]:
        raise UnsupportedError(f"{Propagated.method}: the network calls other functions for two images than for one")
    studied = []
    for (name, module, alone, folds), (_, _, among, _) in zip(one, two, strict=True):
        layout = layout_of(alone, among)
        if layout is None:
            raise UnsupportedError(
                f"{Propagated.method}: operation {name!r} in module {module!r} mixes the images of a batch, or their "
                f"values depend on it"
            )
        studied.append(Studied(name, module, layout, folds is not None and folds.foldable))
    known[key] = studied
    return studied


# Rules as backward functions ------------------------------------------------------------------------------------------


@dataclass
class Site:
    """A call that books relevance: the ledger, and the layout of its output."""

    ledger: Ledger
    layout: Layout | None = None

    def book(self, bias: torch.Tensor | None = None, leak: torch.Tensor | None = None) -> None:
        assert self.layout is not None
        if bias is not None:
            self.ledger.book_bias(self.layout, bias)
        if leak is not None:
            self.ledger.book_leak(self.layout, leak)


Form = Literal["z", "p", "pn", "zt", "zp", "single"]


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
    def forward(ctx: Any, x: torch.Tensor, sites: Propagated, site: Site, rule: Rule, linear: Linear) -> torch.Tensor:
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
                positive = sites.of_bounds(v, z, linear, c * y, site)
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


class Unread(Vouched):
    """The output of a convolution that only a BatchNorm reads; relevance goes past it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, refusal: UnsupportedError) -> torch.Tensor:
        ctx.refusal = refusal
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        raise ctx.refusal


class _Seed(torch.autograd.Function):
    """A target's gradient with respect to the output, and what its product with the output misses of the score."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, target: Target, ledger: Ledger) -> torch.Tensor:
        with torch.enable_grad():
            given = output.detach().requires_grad_()
            score = target(given)
            (slope,) = torch.autograd.grad(score.sum(), given, allow_unused=True) if score.requires_grad else (None,)
        slope = torch.zeros_like(given) if slope is None else slope
        ctx.save_for_backward(slope)
        product = (given.detach() * slope).flatten(1).sum(1, dtype=torch.float64)
        ledger.leak = ledger.leak + score.detach().double() - product
        return score.detach()

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> Any:
        (slope,), (c,) = ctx.saved_tensors, sent
        return slope * c.view(-1, *[1] * (slope.ndim - 1)), None, None


@dataclass(frozen=True)
class _Scored:
    """A target whose score is expanded by its gradient; of a logit, or the difference of two, that is exact."""

    target: Target
    ledger: Ledger

    @property
    def layer(self) -> str | None:
        return self.target.layer

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return _Seed.apply(output, self.target, self.ledger)

    def at(self, rows: torch.Tensor) -> Target:
        return self.target.at(rows)


# Call sites -----------------------------------------------------------------------------------------------------------


@dataclass
class Linear:
    """A linear call f(x, w) + b, in which x alone is of the input.

    Attributes
    ----------
    side : the shape in which a number of each output unit is added to the output; None: `bias` has it already.
    out : the axis of the weights that counts output units; None: unknown, so that no BatchNorm is folded into it.
    z : f(x, w), computed. scale, shift : of a folded BatchNorm and the bias, in the shape of `side`.
    norms, others : calls that read the output.
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
    norms: int = 0
    others: int = 0

    def __post_init__(self) -> None:
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


class Propagated(CallSites):
    """Apply the rules of layer-wise relevance propagation; see the module."""

    method = "LRP"
    nodes: ClassVar[frozenset[str]] = (
        LINEAR_NODES | MAX_NODES | frozenset({"Relu", "Abs", "Maximum", "Minimum", "Max", "Min", "Amax", "Amin"})
    )

    def __init__(self, network: nn.Module, plan: Plan, inputs: torch.Tensor) -> None:
        super().__init__(network)
        _check_patterns(network, plan)
        self.plan = plan
        self.images, self.shape = len(inputs), tuple(inputs.shape)
        self.ledger = Ledger(len(inputs), inputs.device)
        self.direct = torch.zeros_like(inputs)
        self.positive = torch.zeros_like(inputs)
        self.study: list[Studied] | None = None
        self.calls: list[tuple[str, str, torch.Tensor, Linear | None]] = []
        self.folded: set[str] = set()
        self.rectifiers = self.split = self.depth = 0
        self.amplified = ""
        self._passed = 0
        self._nonnegative: Any = WeakIdKeyDictionary()  # tensors, and their versions
        self._held: Any = WeakIdKeyDictionary()
        self._raw: Any = WeakIdKeyDictionary()  # the input itself
        self._linear: Any = WeakIdKeyDictionary()  # by its output

    # Properties of tensors --------------------------------------------------------------------------------------------

    def _is(self, kind: Any, tensor: torch.Tensor) -> bool:
        return kind.get(tensor, -1) == tensor._version

    def _in_place(self, call: Call, in_place: bool) -> Any:
        given = tensors_in(call.args, call.kwargs)
        of_input = [each for each in given if each.requires_grad]
        name = call.name
        for each in of_input:
            if each.is_leaf and tuple(each.shape) == self.shape and not self._modules:
                self._raw[each] = each._version
            if (linear := self._linear.get(each)) is not None and name != "clone":
                linear.norms += name == "batch_norm" and each is given[0]
                linear.others += name != "batch_norm" or each is not given[0]
        carried = []
        copies = name in REARRANGEMENTS | DROPOUTS and name not in WRITERS
        alike = len(of_input) == len(given) and not (name == "pad" and argument(call, 3, "value"))
        if name in NONNEGATIVE or (
            (copies or name in KEEP_NONNEGATIVE) and alike and all(self._is(self._nonnegative, x) for x in of_input)
        ):
            carried.append(self._nonnegative)
        if copies and alike and all(self._is(self._held, x) for x in of_input):
            carried.append(self._held)
        if name in ("clone", "contiguous", "to") and self._is(self._raw, of_input[0]):
            carried.append(self._raw)
        linear = self._linear.get(of_input[0]) if name == "clone" else None
        output = super()._in_place(call, in_place)
        for each in tensors_in(output):
            if each.requires_grad:
                for kind in carried:
                    kind[each] = each._version
                if linear is not None:
                    self._linear[each] = linear
        return output

    def _site(self, call: str) -> tuple[Site, Callable[[torch.Tensor, Linear | None], torch.Tensor]]:
        """Return where a call books, and a function that tells of its output."""
        site, at = Site(self.ledger), self._passed
        self._passed += 1

        def made(output: torch.Tensor, linear: Linear | None = None) -> torch.Tensor:
            if self.study is None:
                self.calls.append((call, self.where, output.detach(), linear))
                return output
            found = self.study[at] if at < len(self.study) else None
            if (
                found is None
                or (found.name, found.module) != (call, self.where)
                or not found.layout.fits(output.shape, self.images)
            ):
                raise _OtherCallsError(f"{self.method}: {call!r} in module {self.where!r} was not met before")
            site.layout = found.layout
            return output

        return site, made

    def _folds(self) -> bool:
        """Return whether the output of the call that comes next is read by a BatchNorm alone."""
        return self.study is not None and self._passed < len(self.study) and self.study[self._passed].folds

    # Rules ------------------------------------------------------------------------------------------------------------

    def rule(self, call: Call) -> Any:
        name = call.name
        if name in MAX_POOLS:
            return call.run()
        if name == "relu":
            self.rectifiers += 1
            return call.run()
        if name in ELEMENTWISE:
            return self._elementwise(call)
        if name in NORMS:
            return self._norm(call)
        if name in EXTREMES:
            return self._extreme(call)
        if name in CONVOLUTIONS or name == "linear":
            return self._convolution(call)
        found = _BY_NAME.get(name)
        return NotImplemented if found is None else found(self, call)

    def _convolution(self, call: Call) -> Any:
        x, weight, bias = (argument(call, at, key) for at, key in enumerate(("input", "weight", "bias")))
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            raise self.refusal(call.name, "has weights that depend on the input")
        args = call.args[3:]
        kwargs = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}
        function = partial(_without_bias, call.function, args, kwargs)
        if call.name == "linear":
            side, out = (-1,), 0
        else:
            spatial = int(call.name[-2])
            side = (-1, *[1] * spatial) if x.ndim == spatial + 1 else (1, -1, *[1] * spatial)
            groups = argument(call, 6, "groups", 1)
            out = 0 if "transpose" not in call.name else 1 if groups == 1 else None
        return self._mix(call.name, Linear(function, x, weight, bias, self._next_rule(), side, out))

    def _next_rule(self) -> Rule:
        """Return the rule of the linear map that is called."""
        self.depth += 1
        rule = next(
            (rule for pattern, rule in self.plan.rules if _matches(pattern, self.where, self.depth)), self.plan.rule
        )
        if rule.kind == "alpha_beta" and rule.beta:
            self.amplified = self.where
        return rule

    def _mix(self, name: str, linear: Linear) -> torch.Tensor:
        """Return f(x, w) + b, with the rule as backward; put it off if a BatchNorm follows."""
        linear.module = self.where
        folds = self._folds()
        site, made = self._site(name)
        if folds:
            self.folded.add(self.where)
            linear.z = self._value(linear)
            u = linear.z.detach() if linear.shift is None else linear.z.detach() + linear.shift
            refusal = self.refusal(name, "is folded into a BatchNorm, and its output has no relevance of its own")
            output = made(Unread.apply(linear.x, u, refusal), linear)
        else:
            output = made(self._shared(linear, site), linear)
        if linear.out is not None:
            self._linear[output] = linear
        return output

    def _at_input(self, linear: Linear) -> bool:
        raw = self._is(self._raw, linear.x)
        if linear.rule.kind in ("z_b", "w_squared") and not raw:
            raise self.refusal(linear.rule.kind, "is a rule of the layer that reads the input itself")
        return raw and (self.plan.signs or linear.rule.kind in ("z_b", "w_squared"))

    def _value(self, linear: Linear) -> torch.Tensor:
        """Return f(x, w), as a part of the graph where the rule sends something back through it."""
        plain = self._at_input(linear) or (linear.rule.kind == "alpha_beta" and self._is(self._nonnegative, linear.x))
        return linear.function(linear.x.detach() if plain else linear.x, linear.weight)

    def _shared(self, linear: Linear, site: Site) -> torch.Tensor:
        rule, x, f = linear.rule, linear.x, linear.function
        if self._at_input(linear):
            self.split += 1
            return AtInput.apply(x, self, site, rule, linear)
        nonnegative = self._is(self._nonnegative, x)
        if rule.kind == "alpha_beta" and nonnegative:
            w = linear.folded
            p = f(x, w.clamp(min=0))
            if rule.beta:
                return Mixed.apply(site, rule, "pn", None, linear.shift, p, f(x, w.clamp(max=0)))
            z = self._value(linear) if linear.z is None else linear.z
            return Mixed.apply(site, rule, "p", linear.scale, linear.shift, z, p)
        z = self._value(linear) if linear.z is None else linear.z
        if rule.kind == "epsilon":
            return Mixed.apply(site, rule, "z", linear.scale, linear.shift, z)
        if rule.kind == "gamma" and nonnegative:
            p = f(x, linear.folded.clamp(min=0))
            return Mixed.apply(site, rule, "zp", linear.scale, linear.shift, z, p)
        return Mixed.apply(site, rule, "zt", linear.scale, linear.shift, z, f(x.abs(), linear.weight.abs()))

    def of_bounds(
        self, v: torch.Tensor, z: torch.Tensor, linear: Linear, r: torch.Tensor, site: Site
    ) -> torch.Tensor:
        """Return the relevance of the inputs by z^B: contributions x w - low w+ - high w-, which are never negative.

        Montavon et al., "Explaining nonlinear classification decisions with deep Taylor decomposition" (2017), eq. 13.
        """
        if self.plan.low is None or self.plan.high is None:
            raise MicrotomeError(f"{self.method}: the rule z_b needs the bounds of the inputs")
        f, w = linear.function, linear.folded
        low, high = (
            each.to(v.device, v.dtype).expand_as(v).clone().requires_grad_() for each in (self.plan.low, self.plan.high)
        )
        of_low, of_high = f(low, w.clamp(min=0)), f(high, w.clamp(max=0))
        total = (z - of_low - of_high).detach()
        some = total > 0
        s = torch.where(some, r / total, 0.0)
        site.book(leak=torch.where(some, 0.0, r))
        of_x, of_low, of_high = (
            torch.autograd.grad(each, at, s)[0] for each, at in ((z, v), (of_low, low), (of_high, high))
        )
        return v * of_x - low * of_low - high * of_high

    def _batch_norm(self, call: Call) -> Any:
        if trains(call):
            raise self.refusal("batch_norm", "in training mode depends on the other images of the batch")
        x, scale, shift = _normalisation(call)
        linear = self._linear.get(x)
        site, made = self._site("batch_norm")
        if linear is not None and self._is_output(linear, x):
            assert linear.side is not None
            scale = scale.view(linear.side)
            shift = shift.view(linear.side)
            both = Linear(
                linear.function, linear.x, linear.weight, None, linear.rule, linear.side, linear.out, linear.z
            )
            both.scale = scale
            both.shift = shift if linear.shift is None else shift + linear.shift * scale
            return made(self._shared(both, site))
        side = (1, -1, *[1] * (x.ndim - 2))
        rule = self._rule_here()
        form: Form = "z" if rule.kind == "epsilon" else "single"
        return made(Mixed.apply(site, rule, form, scale.view(side), shift.view(side), x))

    def _is_output(self, linear: Linear, x: torch.Tensor) -> bool:
        """Return whether a BatchNorm's axis of units is that of a linear map's output."""
        return linear.side is not None and len(linear.side) in (1, x.ndim) and (len(linear.side) > 1 or x.ndim == 2)

    def _rule_here(self) -> Rule:
        """Return the rule of a module that is no linear map: a BatchNorm on its own."""
        return next(
            (rule for pattern, rule in self.plan.rules if _matches(pattern, self.where, self.depth)), self.plan.rule
        )

    def _elementwise(self, call: Call) -> Any:
        given = tensors_in(call.args, call.kwargs)
        of_input = [each for each in given if each.requires_grad]
        if len(of_input) != 1:
            raise self.refusal(call.name, "has bounds or exponents that depend on the input")
        (x,) = of_input
        y = call.run().detach()
        if y.shape != x.shape:
            raise self.refusal(call.name, "gives another shape than its input's")
        if call.name in ("relu6", "hardtanh", "threshold", "clamp", "clamp_min") and bool(call.function is not None):
            self.rectifiers += _rectifies(call)
        site, made = self._site(call.name)
        return made(Passed.apply(x, y, site))

    def _norm(self, call: Call) -> Any:
        norm = norm_of(self, call)
        if self.plan.preset == "attn_lrp":
            site, made = self._site(call.name)
            return made(Passed.apply(norm.x, call.run().detach(), site))
        deviation = norm.deviation(norm.x)
        y = (deviation * norm.inverse_root(deviation.detach())).reshape(norm.x.shape)
        y = y if norm.weight is None else y * norm.weight
        return y if norm.bias is None else self._plus(call.name, y, norm.bias)

    def _plus(self, name: str, x: torch.Tensor, constant: Any) -> torch.Tensor:
        """Add a constant."""
        return x + self._constant(name, x, constant, torch.broadcast_shapes(x.shape, _shape(constant)))

    def _constant(self, name: str, x: torch.Tensor, value: Any, shape: Sequence[int]) -> torch.Tensor:
        """Return a constant as a part of the graph, expanded to a shape."""
        given = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(tuple(shape))
        site, made = self._site(name)
        return made(Constant.apply(x, given, site))

    def _sum(self, call: Call) -> Any:
        a, b = _operands(call)
        alpha = call.kwargs.get("alpha", 1)
        if _of_input(a) and _of_input(b):
            return call.run()
        if call.name == "rsub":
            a, b = b, a
        factor = alpha if call.name == "add" else -alpha
        x, constant = (a, b) if _of_input(a) else (b, a)
        if not isinstance(constant, torch.Tensor) and constant == 0:
            return call.run()
        if _of_input(a):
            return self._plus(call.name, x, constant if factor == 1 else constant * factor)
        return self._plus(call.name, x if factor == 1 else x * factor, constant)

    def _product(self, call: Call) -> Any:
        a, b = _operands(call)
        if call.kwargs.get("rounding_mode") is not None:
            raise self.refusal(call.name, "rounds, which has no rule")
        if call.name == "div":
            if not _of_input(b):
                return call.run()
            if _of_input(a):
                return a / b.detach()
            y = call.run().detach()
            if y.shape != b.shape:
                raise self.refusal("div", "gives another shape than its divisor's")
            site, made = self._site("div")
            return made(Passed.apply(b, y, site))
        return call.run() if not (_of_input(a) and _of_input(b)) else torch.mul(*self._halves(a, b))

    def _halves(self, *factors: torch.Tensor) -> list[torch.Tensor]:
        """Return two factors of which each gets half; a constant one gets nothing, and the other all."""
        held = [self._is(self._held, each) for each in factors]
        if any(held) and not all(held):
            return [each.detach() if constant else each for each, constant in zip(factors, held, strict=True)]
        return [Halved.apply(each) for each in factors]

    def _matmul(self, call: Call) -> Any:
        a, b = argument(call, 0, "input"), argument(call, 1, "other", argument(call, 1, "mat2", call.kwargs.get("vec")))
        if a.requires_grad and b.requires_grad:
            return torch.matmul(*self._halves(a, b))
        if a.requires_grad:
            return self._mix("matmul", Linear(torch.matmul, a, b, None, self._next_rule()))
        return self._mix("matmul", Linear(_from_left, b, a, None, self._next_rule()))

    def _addmm(self, call: Call) -> Any:
        added, a, b = (argument(call, at, key) for at, key in enumerate(("input", "mat1", "mat2")))
        if "batch1" in call.kwargs:
            a, b = call.kwargs["batch1"], call.kwargs["batch2"]
        if (call.kwargs.get("beta", 1), call.kwargs.get("alpha", 1)) != (1, 1):
            raise self.refusal(call.name, "scales what it adds, which has no rule")
        product = self._matmul(Call("matmul", torch.matmul, (a, b), {})) if _of_input(a) or _of_input(b) else a @ b
        return self._sum(Call("add", torch.add, (added, product), {}))

    def _addcmul(self, call: Call) -> Any:
        added, a, b = (argument(call, at, key) for at, key in enumerate(("input", "tensor1", "tensor2")))
        if argument(call, 3, "value", 1) != 1:
            raise self.refusal(call.name, "scales what it adds, which has no rule")
        product = self._product(Call("mul", torch.mul, (a, b), {}))
        return self._sum(Call("add", torch.add, (added, product), {}))

    def _einsum(self, call: Call) -> Any:
        equation, *operands = call.args
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
        if len(operands) == 1:
            return call.run()
        if len(operands) != 2:
            raise self.refusal("einsum", "has more than two operands, which has no rule")
        a, b = operands
        if a.requires_grad and b.requires_grad:
            return torch.einsum(equation, *self._halves(a, b))
        if a.requires_grad:
            return self._mix("einsum", Linear(partial(torch.einsum, equation), a, b, None, self._next_rule()))
        return self._mix("einsum", Linear(partial(_einsum_from_left, equation), b, a, None, self._next_rule()))

    def _softmax(self, call: Call) -> Any:
        x = argument(call, 0, "input")
        y = call.run().detach()
        site, made = self._site("softmax")
        if self.plan.preset == "attn_lrp":
            return made(Expanded.apply(x, y, softmax_of(call).dim, site))
        output = made(Held.apply(x, y, site))
        self._held[output] = output._version
        return output

    def _log_softmax(self, call: Call) -> Any:
        x = argument(call, 0, "input")
        return self._plus("log_softmax", x, call.run().detach() - x.detach())

    def _cast(self, call: Call) -> Any:
        x, y = call.args[0], call.run()
        if y.dtype == x.dtype or not _of_input(y):
            return y
        site, made = self._site(call.name)
        return made(Cast.apply(x, y.detach(), site))

    def _attention(self, call: Call) -> Any:
        with self:
            return scaled_dot_product_attention(self, over_keys, *call.args, **call.kwargs)

    def _heads(self, call: Call) -> Any:
        with self:
            return multi_head_attention_forward(self, *call.args, **call.kwargs)

    def _joined(self, call: Call) -> Any:
        tensors = argument(call, 0, "tensors")
        anchor = next(each for each in tensors if each.requires_grad)
        met = [each if each.requires_grad else self._constant(call.name, anchor, each, each.shape) for each in tensors]
        rest = {key: value for key, value in call.kwargs.items() if key != "tensors"}
        return call.function(met, *call.args[1:], **rest)

    def _padded(self, call: Call) -> Any:
        x, pads = argument(call, 0, "input"), argument(call, 1, "pad")
        value = argument(call, 3, "value")
        if not value or argument(call, 2, "mode", "constant") != "constant":
            return call.run()
        border = nn.functional.pad(torch.zeros_like(x), pads, value=value)
        return self._plus("pad", nn.functional.pad(x, pads), border)

    def _chosen(self, call: Call) -> Any:
        condition, a, b = (argument(call, at, key) for at, key in enumerate(("condition", "input", "other")))
        shape = torch.broadcast_shapes(*map(_shape, (condition, a, b)))
        x = a if _of_input(a) else b
        a, b = (
            each
            if _of_input(each) or (not isinstance(each, torch.Tensor) and each == 0)
            else self._constant("where", x, each, shape)
            for each in (a, b)
        )
        return torch.where(condition, a, b)

    def _filled(self, call: Call) -> Any:
        x, mask, value = (argument(call, at, key) for at, key in enumerate(("input", "mask", "value")))
        if not isinstance(value, torch.Tensor) and value == 0:
            return call.run()
        return self._chosen(Call("where", torch.where, (mask, value, x), {}))

    def _extreme(self, call: Call) -> Any:
        other = argument(call, 1, "other")
        if not isinstance(other, torch.Tensor):
            return call.run()
        a, b = _operands(call)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        x = a if a.requires_grad else b
        a, b = (each if each.requires_grad else self._constant(call.name, x, each, shape) for each in (a, b))
        return call.function(a, b)

    def _written_into(self, call: Call) -> Any:
        """Let values be written where no relevance is left without an account: constants that stay have to be 0."""
        destination = call.args[0]
        source = call.args[-1] if call.name == "setitem" else call.args[1]
        whole = call.name == "copy" or any(call.args[1] is each for each in ALL_OF)
        constant = None
        if not _of_input(source):
            constant = source
        elif not destination.requires_grad and not whole:
            constant = destination
        if constant is not None and bool(torch.as_tensor(constant).any()):
            raise self.refusal(call.name, "writes values of the input among constants, or the other way round")
        return NotImplemented

    def _lerped(self, call: Call) -> Any:
        if not all(_of_input(argument(call, at, key)) for at, key in ((0, "input"), (1, "end"))):
            raise self.refusal("lerp", "has a constant end, which has no rule")
        return NotImplemented

    def audit(self, output: torch.Tensor) -> None:
        if self.amplified and not self.rectifiers:
            raise UnsupportedError(
                f"{self.method}: the network calls no ReLU, so alpha above 1 would make relevance grow from layer to "
                f"layer (module {self.amplified!r}): take alpha 1, or another rule"
            )
        if self.plan.signs and not self.split:
            raise UnsupportedError(f"{self.method}: `signs` needs a convolution or linear map of the input itself")
        super().audit(output)


_BY_NAME: Mapping[str, Callable[[Propagated, Call], Any]] = {
    "batch_norm": Propagated._batch_norm,
    "add": Propagated._sum,
    "sub": Propagated._sum,
    "rsub": Propagated._sum,
    "mul": Propagated._product,
    "div": Propagated._product,
    "matmul": Propagated._matmul,
    "addmm": Propagated._addmm,
    "baddbmm": Propagated._addmm,
    "addcmul": Propagated._addcmul,
    "einsum": Propagated._einsum,
    "softmax": Propagated._softmax,
    "log_softmax": Propagated._log_softmax,
    "scaled_dot_product_attention": Propagated._attention,
    "multi_head_attention_forward": Propagated._heads,
    **dict.fromkeys(("to", "type", "type_as", "float", "double"), Propagated._cast),
    **dict.fromkeys(("cat", "concat", "concatenate", "stack", "hstack", "vstack"), Propagated._joined),
    "pad": Propagated._padded,
    "where": Propagated._chosen,
    "masked_fill": Propagated._filled,
    "setitem": Propagated._written_into,
    "copy": Propagated._written_into,
    "lerp": Propagated._lerped,
}


# Arguments ------------------------------------------------------------------------------------------------------------


def _without_bias(function: Any, args: tuple, kwargs: Mapping[str, Any], x: Any, weight: Any) -> torch.Tensor:
    return function(x, weight, None, *args, **kwargs)


def _from_left(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.matmul(weight, x)


def _einsum_from_left(equation: str, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum(equation, weight, x)


def _of_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _operands(call: Call) -> tuple[Any, Any]:
    return argument(call, 0, "input"), argument(call, 1, "other")


def _rectifies(call: Call) -> bool:
    """Return whether a bounded function is a rectifier: 0 below 0."""
    low = {"relu6": 0, "hardtanh": argument(call, 1, "min_val", -1.0), "clamp": argument(call, 1, "min")}
    return low.get(call.name, argument(call, 1, "threshold", argument(call, 1, "min"))) == 0


def _normalisation(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of a call of batch_norm, and its scale and shift, (unit,)."""
    of_network = isinstance(call.function, types.FunctionType)  # torch's own has weight and bias before the statistics
    names = ("running_mean", "running_var", "weight", "bias")
    places = (1, 2, 3, 4) if of_network else (3, 4, 1, 2)
    mean, variance, weight, bias = (argument(call, at, name) for at, name in zip(places, names, strict=True))
    scale = (variance + argument(call, 7, "eps", 1e-5)).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return argument(call, 0, "input"), scale, shift if bias is None else shift + bias


def _matches(pattern: str, module: str, depth: int) -> bool:
    if (found := DEPTH.fullmatch(pattern)) is None:
        return fnmatch.fnmatchcase(module, pattern)
    first, several, last = found.groups()
    return int(first) <= depth and (depth <= int(last) if last else bool(several) or depth == int(first))


def _check_patterns(network: nn.Module, plan: Plan) -> None:
    names = [name for name, _ in network.named_modules() if name] + [type(network).__name__]
    for pattern, _ in plan.rules:
        if not DEPTH.fullmatch(pattern) and not fnmatch.filter(names, pattern):
            raise MicrotomeError(f"rules: {pattern!r} matches no module{nearest(pattern, names)}")
