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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from kernels.attribution.relevance import Rule
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.fitness import DEPTH, matches
from pipeline.networks.graph.call_sites import (
    DROPOUTS,
    ELEMENTWISE,
    LINEAR_NODES,
    REARRANGEMENTS,
    WRITERS,
    Call,
    CallSites,
    UnsupportedError,
    argument,
    tensors_in,
    trains,
)
from pipeline.networks.graph.ledger import Layout, Ledger, OtherCallsError, Site, layout_of
from pipeline.networks.graph.rectified import MAX_NODES, MAX_POOLS, ceiling_of
from pipeline.networks.graph.relevance_rules import (
    AtInput,
    Cast,
    Constant,
    Expanded,
    Form,
    Halved,
    Held,
    Linear,
    Mixed,
    Passed,
    Product,
    Unread,
)
from pipeline.networks.graph.taken_apart import (
    NORMS,
    multi_head_attention_forward,
    norm_of,
    normalisation_of,
    over_keys,
    scaled_dot_product_attention,
    softmax_of,
)

Preset = Literal["cp_lrp", "attn_lrp"]
CONVOLUTIONS = frozenset(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))
EXTREMES = frozenset({"max", "min", "amax", "amin", "maximum", "minimum", "fmax", "fmin"})
NONNEGATIVE = frozenset({"sigmoid", "hardsigmoid", "exp", "abs", "absolute", "square", "softmax", "softplus"})
POOLS = frozenset(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))
KEEP_NONNEGATIVE = MAX_POOLS | EXTREMES | POOLS | {"add", "mul", "mean", "sum", "sqrt"}
ALL_OF = (slice(None), Ellipsis)
ALPHA_1 = Rule()


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

    rule: Rule = ALPHA_1
    rules: tuple[tuple[str, Rule], ...] = ()
    preset: Preset = "cp_lrp"
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    signs: bool = False


Met = tuple[str, str, torch.Tensor, Linear | None]
"""A call that books something: its name, its module, its output, and what it computes if that is linear."""


@dataclass(frozen=True)
class Studied:
    """A call of a studied network: its name and module, its layout, and whether a BatchNorm alone reads its output."""

    name: str
    module: str
    layout: Layout
    folds: bool


@dataclass(frozen=True)
class Study:
    """The calls of a forward that book something, in their order, and whether any call is a ReLU.

    `linear` are the modules of its linear maps, and whether each reads the input itself.
    """

    calls: tuple[Studied, ...] = ()
    linear: tuple[tuple[str, bool], ...] = ()
    rectified: bool = False

    @property
    def folded(self) -> set[str]:
        """The modules whose output has no relevance of its own: the last call in them is folded into a BatchNorm."""
        last = {}
        for each in self.calls:
            parts = each.module.split(".")
            last.update({".".join(parts[:end]): each.folds for end in range(1, len(parts) + 1)})
        return {module for module, folds in last.items() if folds}

    @staticmethod
    def of(one: Sequence[Met], two: Sequence[Met], rectified: bool) -> Study:
        """Compare the calls of a forward of one image with those of two."""
        if [each[:2] for each in one] != [each[:2] for each in two]:
            raise UnsupportedError(
                f"{Propagated.method}: the network calls other functions for two images than for one"
            )
        calls = []
        for (name, module, alone, linear), (_, _, among, _) in zip(one, two, strict=True):
            if (layout := layout_of(alone, among)) is None:
                raise UnsupportedError(
                    f"{Propagated.method}: operation {name!r} in module {module!r} mixes the images of a batch, or "
                    f"their values depend on it, or nothing tells which values are whose"
                )
            calls.append(Studied(name, module, layout, linear is not None and linear.foldable))
        maps = tuple((each.module, each.raw) for _, _, _, each in one if each is not None)
        return Study(tuple(calls), maps, rectified)


class Propagated(CallSites):
    """Apply the rules of layer-wise relevance propagation; see the module."""

    method = "LRP"
    nodes: ClassVar[frozenset[str]] = (
        LINEAR_NODES | MAX_NODES | frozenset({"Relu", "Abs", "Maximum", "Minimum", "Max", "Min", "Amax", "Amin"})
    )

    def __init__(self, network: nn.Module, plan: Plan, inputs: torch.Tensor, study: Study | None = None) -> None:
        super().__init__(network)
        _check_patterns(network, plan)
        self.plan = plan
        self.images, self.shape = len(inputs), tuple(inputs.shape)
        self.ledger = Ledger(len(inputs), inputs.device)
        self.direct = torch.zeros_like(inputs)
        self.positive = torch.zeros_like(inputs)
        self.study = study
        self.calls: list[Met] = []  # without a study
        self.rectifiers = self.split = self.depth = 0
        self.amplified = ""
        self.decided: set[str] = set()  # the patterns whose rule was taken
        self._passed = 0
        self._nonnegative: Any = WeakIdKeyDictionary()  # tensors, and their versions
        self._held: Any = WeakIdKeyDictionary()
        self._raw: Any = WeakIdKeyDictionary()  # the input itself
        self._linear: Any = WeakIdKeyDictionary()  # outputs of linear maps: which map, and their versions

    # Properties of tensors --------------------------------------------------------------------------------------------

    def _is(self, kind: Any, tensor: torch.Tensor) -> bool:
        return kind.get(tensor, -1) == tensor._version

    def _linear_of(self, output: torch.Tensor) -> Linear | None:
        """Return the linear map that a tensor is the output of; None if there is none, or it was written into since."""
        linear, version = self._linear.get(output, (None, -1))
        return linear if version == output._version else None

    def _in_place(self, call: Call, in_place: bool) -> Any:
        given = tensors_in(call.args, call.kwargs)
        self._read(call, given)
        carried = self._carried(call, given)
        linear = self._linear_of(given[0]) if call.name == "clone" else None
        output = super()._in_place(call, in_place)
        for each in tensors_in(output):
            if each.requires_grad:
                for kind in carried:
                    kind[each] = each._version
                if linear is not None:
                    self._linear[each] = linear, each._version
        return output

    def _read(self, call: Call, given: Sequence[torch.Tensor]) -> None:
        """Note what a call reads: the input itself, and outputs of linear maps."""
        for each in given:
            if each.is_leaf and each.requires_grad and tuple(each.shape) == self.shape and not self._modules:
                self._raw[each] = each._version
            if (linear := self._linear_of(each)) is not None and call.name != "clone":
                normalises = call.name == "batch_norm" and each is given[0]
                linear.norms += normalises
                linear.others += not normalises

    def _carried(self, call: Call, given: Sequence[torch.Tensor]) -> list[Any]:
        """Return which properties the result of a call has: not negative, held constant, the input itself."""
        name, of_input = call.name, [each for each in given if each.requires_grad]
        found = []
        copies = name in REARRANGEMENTS | DROPOUTS and name not in WRITERS
        numbers = name in ("add", "mul") and not all(isinstance(each, torch.Tensor) for each in _operands(call))
        filled = name == "pad" and argument(call, 3, "value")
        alike = len(of_input) == len(given) and not numbers and not filled and call.kwargs.get("alpha", 1) == 1
        keeps = alike and (copies or name in KEEP_NONNEGATIVE)
        if name in NONNEGATIVE or ceiling_of(call) is not None or (keeps and self._all(self._nonnegative, of_input)):
            found.append(self._nonnegative)
        if copies and alike and self._all(self._held, of_input):
            found.append(self._held)
        if name in ("clone", "contiguous", "to") and self._all(self._raw, of_input):
            found.append(self._raw)
        return found

    def _all(self, kind: Any, tensors: Sequence[torch.Tensor]) -> bool:
        return all(self._is(kind, each) for each in tensors)

    def _site(self, call: str) -> Site:
        """Return where a call books, once its output is placed."""
        self._passed += 1
        return Site(self.ledger, call, self._passed - 1)

    def _placed(
        self, site: Site, output: torch.Tensor, linear: Linear | None = None, like: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tell a site of the call's output, whose layout was studied; return the output.

        `like` is of the same layout where the output does not tell: a constant is the same for all images.
        """
        if self.study is None:
            self.calls.append((site.call, self.where, (output if like is None else like).detach(), linear))
            return output
        found = self.study.calls[site.at] if site.at < len(self.study.calls) else None
        if (
            found is None
            or (found.name, found.module) != (site.call, self.where)
            or not found.layout.fits(output.shape, self.images)
        ):
            raise OtherCallsError(f"{self.method}: {site.call!r} in module {self.where!r} was not met before")
        site.layout = found.layout
        return output

    def _folds(self) -> bool:
        """Return whether the output of the call that comes next is read by a BatchNorm alone."""
        return self.study is not None and self._passed < len(self.study.calls) and self.study.calls[self._passed].folds

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
        side: tuple[int, ...] = (-1,)
        out: int | None = 0
        if call.name != "linear":
            spatial = int(call.name[-2])
            side = (-1, *[1] * spatial) if x.ndim == spatial + 1 else (1, -1, *[1] * spatial)
            groups = argument(call, 6, "groups", 1)
            out = 0 if "transpose" not in call.name else 1 if groups == 1 else None
        return self._mix(call.name, Linear(function, x, weight, bias, self._next_rule(), side, out))

    def _next_rule(self) -> Rule:
        """Return the rule of the linear map that is called."""
        self.depth += 1
        rule = self._rule_here()
        if rule.kind == "alpha_beta" and rule.beta:
            self.amplified = self.where
        return rule

    def _mix(self, name: str, linear: Linear) -> torch.Tensor:
        """Return f(x, w) + b, with the rule as backward; put it off if a BatchNorm follows."""
        linear.module, linear.raw = self.where, self._is(self._raw, linear.x)
        folds = self._folds()
        site = self._site(name)
        if folds:
            linear.z = self._value(linear)
            u = linear.z.detach() if linear.shift is None else linear.z.detach() + linear.shift
            refusal = self.refusal(name, "is folded into a BatchNorm, and its output has no relevance of its own")
            output = self._placed(site, Unread.apply(linear.x, u, refusal), linear)
        else:
            output = self._placed(site, self._shared(linear, site), linear)
        if linear.out is not None:
            self._linear[output] = linear, output._version
        return output

    def _at_input(self, linear: Linear) -> bool:
        if linear.rule.kind in ("z_b", "w_squared") and not linear.raw:
            raise self.refusal(linear.rule.kind, "is a rule of the layer that reads the input itself")
        return linear.raw and (self.plan.signs or linear.rule.kind in ("z_b", "w_squared"))

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

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the least and the greatest input."""
        if self.plan.low is None or self.plan.high is None:
            raise MicrotomeError(f"{self.method}: the rule z_b needs the bounds of the inputs")
        return self.plan.low, self.plan.high

    def _batch_norm(self, call: Call) -> Any:
        if trains(call):
            raise self.refusal("batch_norm", "in training mode depends on the other images of the batch")
        x, scale, shift = normalisation_of(call)
        linear = self._linear_of(x)
        site = self._site("batch_norm")
        if linear is not None and self._is_output(linear, x):
            assert linear.side is not None
            if linear.x._version != linear.version:
                raise self.refusal("batch_norm", "normalises a linear map whose input was written into since")
            scale = scale.view(linear.side)
            shift = shift.view(linear.side)
            shift = shift if linear.shift is None else shift + linear.shift * scale
            both = replace(linear, bias=None)
            both.scale, both.shift = scale, shift
            return self._placed(site, self._shared(both, site))
        side = (1, -1, *[1] * (x.ndim - 2))
        rule = self._rule_here()
        if rule.kind == "alpha_beta":  # of the two contributions to an entry, the other sign is often missing
            rule = ALPHA_1
        form: Form = "z" if rule.kind == "epsilon" else "single"
        return self._placed(site, Mixed.apply(site, rule, form, scale.view(side), shift.view(side), x))

    def _is_output(self, linear: Linear, x: torch.Tensor) -> bool:
        """Return whether a BatchNorm's axis of units is that of a linear map's output."""
        return linear.side is not None and len(linear.side) in (1, x.ndim) and (len(linear.side) > 1 or x.ndim == 2)

    def _rule_here(self) -> Rule:
        """Return the rule of the call: of a linear map, or of a BatchNorm on its own."""
        for pattern, rule in self.plan.rules:
            if matches(pattern, self.where, self.depth):
                self.decided.add(pattern)
                return rule
        return self.plan.rule

    def check_rules(self) -> None:
        """Refuse rules that decided nothing in a forward: the map would be that of other rules."""
        if idle := [pattern for pattern, _ in self.plan.rules if pattern not in self.decided]:
            raise MicrotomeError(
                f"rules: {idle[0]!r} applies to no convolution or linear map: a BatchNorm after a convolution goes by "
                f"the convolution's name, an earlier pattern decides first, and depths count from 1 to {self.depth}"
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
        self.rectifiers += ceiling_of(call) is not None
        site = self._site(call.name)
        return self._placed(site, Passed.apply(x, y, site))

    def _norm(self, call: Call) -> Any:
        norm = norm_of(self, call)
        if self.plan.preset == "attn_lrp":
            site = self._site(call.name)
            return self._placed(site, Passed.apply(norm.x, call.run().detach(), site))
        deviation = norm.deviation(norm.x)
        y = (deviation * norm.inverse_root(deviation.detach())).reshape(norm.x.shape)
        y = y if norm.weight is None else y * norm.weight
        return y if norm.bias is None else self._plus(call.name, y, norm.bias)

    def _plus(self, name: str, x: torch.Tensor, constant: Any) -> torch.Tensor:
        """Add a constant."""
        return x + self._constant(name, x.expand(torch.broadcast_shapes(x.shape, _shape(constant))), constant)

    def _constant(self, name: str, x: torch.Tensor, value: Any) -> torch.Tensor:
        """Return a constant as a part of the graph, expanded to the shape of what it is added to or joined with."""
        given = torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(x.shape)
        site = self._site(name)
        return self._placed(site, Constant.apply(x, given, site), like=x)

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
            site = self._site("div")
            return self._placed(site, Passed.apply(b, y, site))
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
            halved = not (self._is(self._held, a) or self._is(self._held, b)) and min(a.ndim, b.ndim) > 1
            return Product.apply(a, b) if halved else torch.matmul(*self._halves(a, b))
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
        site = self._site("softmax")
        if self.plan.preset == "attn_lrp":
            return self._placed(site, Expanded.apply(x, y, softmax_of(call).dim, site))
        output = self._placed(site, Held.apply(x, y, site))
        self._held[output] = output._version
        return output

    def _log_softmax(self, call: Call) -> Any:
        x, y = argument(call, 0, "input"), call.run().detach()
        if y.dtype != x.dtype:
            x = self._cast(Call("to", torch.Tensor.to, (x, y.dtype), {}))
        site = self._site("log_softmax")
        return x + self._placed(site, Held.apply(x, y - x.detach(), site))

    def _cast(self, call: Call) -> Any:
        x, y = call.args[0], call.run()
        if y.dtype == x.dtype or not _of_input(y):
            return y
        site = self._site(call.name)
        return self._placed(site, Cast.apply(x, y.detach(), site))

    def _attention(self, call: Call) -> Any:
        with self:
            return scaled_dot_product_attention(self, over_keys, *call.args, **call.kwargs)

    def _heads(self, call: Call) -> Any:
        with self:
            return multi_head_attention_forward(self, *call.args, **call.kwargs)

    def _joined(self, call: Call) -> Any:
        tensors = argument(call, 0, "tensors")
        anchor = next(each for each in tensors if each.requires_grad)
        met = [
            each if each.requires_grad else self._constant(call.name, _beside(anchor, each), each) for each in tensors
        ]
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
        x = (a if _of_input(a) else b).expand(shape)
        a, b = (
            each
            if _of_input(each) or (not isinstance(each, torch.Tensor) and each == 0)
            else self._constant("where", x, each)
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
        x = (a if a.requires_grad else b).expand(shape)
        a, b = (each if each.requires_grad else self._constant(call.name, x, each) for each in (a, b))
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


def _beside(anchor: torch.Tensor, constant: torch.Tensor) -> torch.Tensor:
    """Return entries of a tensor in the shape of a constant that is joined with it."""
    same = anchor.ndim == constant.ndim
    unlike = [at for at, (a, b) in enumerate(zip(anchor.shape, constant.shape, strict=False)) if a != b]
    if not same or len(unlike) > 1 or not anchor.numel():
        return constant
    return anchor.narrow(unlike[0], 0, 1).expand(constant.shape) if unlike else anchor


def _of_input(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def _operands(call: Call) -> tuple[Any, Any]:
    return argument(call, 0, "input"), argument(call, 1, "other")


def _check_patterns(network: nn.Module, plan: Plan) -> None:
    names = [name for name, _ in network.named_modules() if name] + [type(network).__name__]
    for pattern, _ in plan.rules:
        if not DEPTH.fullmatch(pattern) and not fnmatch.filter(names, pattern):
            raise MicrotomeError(f"rules: {pattern!r} matches no module{nearest(pattern, names)}")
