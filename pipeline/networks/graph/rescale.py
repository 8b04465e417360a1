"""DeepLIFT's rules at call sites: what each call sends back is its multipliers between an input and its reference.

A `Rescale` first runs in the reference's forward, where it keeps the operands of every call that is not linear, and
then in the inputs' forward, where each such call meets what was kept of it. The gradient of a score is then its
multiplier: sum m (x - x0) = f(x) - f(x0), since that holds for every call on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernels.attribution import maxima, secants
from pipeline.networks.graph import taken_apart
from pipeline.networks.graph.call_sites import (
    ELEMENTWISE,
    LINEAR_NODES,
    Call,
    CallSites,
    Vouched,
    argument,
    live,
    tensors_in,
)
from pipeline.networks.graph.rectified import MAX_POOLS

MaxRule = Literal["cross", "shapley"]
KINKED = {
    *("leaky_relu", "prelu", "rrelu", "relu6", "hardtanh", "hardsigmoid", "hardswish", "elu", "selu", "celu"),
    *("clamp", "clamp_min", "clamp_max", "threshold", "abs", "absolute", "hardshrink", "softshrink", "softsign"),
}
LARGER = {"maximum", "minimum", "fmax", "fmin"}
REDUCED = {"max", "min", "amax", "amin"}
PRODUCTS = {
    *("matmul", "einsum", "linear", "bilinear", "dot"),
    *("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


class Sent(Vouched):
    """Return what was computed from the inputs; send back what `back` makes of the multipliers of the output."""

    @staticmethod
    def forward(ctx: Any, made: tuple[torch.Tensor], back: Any, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return made[0]

    @staticmethod
    def backward(ctx: Any, *sent: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.back(*sent)


class UnclearError(Exception):
    """One reference for all images does not tell what those of a batch meet: each needs one of its own."""


class Differences(CallSites):
    """What the rules of DeepLIFT share: operands of the reference's forward, met again in the inputs' forward.

    Attributes
    ----------
    images : inputs of a batch. shared : whether the reference's forward has one reference for all of them.
    recording : whether the reference's forward runs.
    """

    nodes: ClassVar[frozenset[str]] = LINEAR_NODES
    of_score: ClassVar[bool] = True

    def __init__(self, network: torch.nn.Module, images: int) -> None:
        super().__init__(network)
        self.images, self.shared, self.recording = images, False, True
        self._kept: list[tuple[str, tuple[torch.Tensor, ...]]] = []
        self._next = 0

    def turn(self) -> None:
        """End the reference's forward: the inputs' is next."""
        self.recording, self._next = False, 0

    def keep(self, name: str, *operands: torch.Tensor) -> None:
        """Keep operands of the reference, as they are now: the network may write into them later."""
        self._kept.append((name, tuple(each.detach().clone() for each in operands)))

    def kept(self, name: str, like: Sequence[torch.Tensor | None]) -> tuple[torch.Tensor, ...]:
        """Return what was kept of this call; operands that `like` gives have to fit to those of the inputs."""
        if self._next >= len(self._kept) or self._kept[self._next][0] != name:
            raise self._unlike(name, "is not what the reference's forward calls here: calls depend on values")
        found = self._kept[self._next][1]
        self._kept[self._next] = name, ()
        self._next += 1
        for mine, other in zip(found, like, strict=False):
            if other is not None and not self._fits(mine.shape, other.shape):
                raise self._unlike(name, "gets something of another shape than in the reference's forward")
        return found

    def _fits(self, reference: torch.Size, given: torch.Size) -> bool:
        """Return whether shapes are the same but for one dimension: that of the images, with one reference for all."""
        if reference == given:
            return True
        if len(reference) != len(given):
            return False
        unlike = [at for at, (a, b) in enumerate(zip(reference, given, strict=True)) if a != b]
        return len(unlike) == 1 and (reference[unlike[0]], given[unlike[0]]) == (1, self.images)

    def audit(self, output: torch.Tensor) -> None:
        super().audit(output)
        if self._next < len(self._kept):
            name = self._kept[self._next][0]
            raise self._unlike(name, "is called for the reference alone: calls depend on values")

    def _unlike(self, name: str, why: str) -> Exception:
        """Return why both forwards differ: with one reference for all it may be the number of images."""
        return UnclearError() if self.shared else self.refusal(name, why)


class Rescale(Differences):
    """The rescale rule for functions of one input; products, softmax, norms and maxima by exact shares.

    Linear calls keep torch's own backward. `max_rule` is how a maximum over a window is shared, see
    `kernels.attribution.maxima`.
    """

    method = "DeepLIFT"

    def __init__(self, network: torch.nn.Module, images: int, max_rule: MaxRule = "cross") -> None:
        super().__init__(network, images)
        self.max_rule = max_rule

    def rule(self, call: Call) -> Any:
        name = call.name
        if name == "relu" or name in ELEMENTWISE:
            return self._elementwise(call)
        if name in ("mul", "div") and call.kwargs.get("rounding_mode") is None:
            return self._factors(call)
        if name in PRODUCTS and sum(each.requires_grad for each in tensors_in(call.args, call.kwargs)) > 1:
            return self._product(call)
        if name in taken_apart.SOFTMAXES or name == "logsumexp":
            return self._softmax(call)
        if name in taken_apart.NORMS:
            return self._norm(call)
        if name in MAX_POOLS:
            return self._max_pool(call)
        if name in REDUCED | LARGER:
            return self._maximum(call)
        if name in TAKEN_APART:
            with self:
                return TAKEN_APART[name](self, *call.args, **call.kwargs)
        return NotImplemented

    def _sent(self, made: torch.Tensor, back: Any, *inputs: torch.Tensor) -> Any:
        # While recording, the network gets a copy: what is kept stays as it is.
        return Sent.apply((made.clone() if self.recording else made,), back, *inputs)

    # Functions of one input -------------------------------------------------------------------------------------------

    def _elementwise(self, call: Call) -> Any:
        at = 1 if call.name == "rpow" and not call.args[0].requires_grad else 0
        u = argument(call, at, "input")
        rest = [each for place, each in enumerate(call.args) if place != at]
        named = {name: value for name, value in call.kwargs.items() if name != "input"}
        if live(rest, named):
            raise self.refusal(call.name, "depends on the input in two ways, which has no rule")

        def function(value: torch.Tensor) -> torch.Tensor:
            return call.function(*rest[:at], value, *rest[at:], **named)

        return self._secant(call.name, u, function)

    def _secant(self, name: str, u: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        with torch.no_grad():
            y = function(u)
        if u.shape != y.shape:  # bounds or exponents of another shape
            u = u.expand(y.shape)
        if self.recording:
            self.keep(name, u, y)
            return self._sent(y, None, u)
        u0, y0 = self.kept(name, (u, y))
        given = u.detach()
        if name == "relu":
            slope = secants.of_relu(given, u0, y, y0)
        else:
            slope = secants.secant(function, given, u0, y, y0, "kinked" if name in KINKED else "smooth")
        return self._sent(y, lambda sent: (sent * slope,), u)

    # Products of two factors ------------------------------------------------------------------------------------------

    def _factors(self, call: Call) -> Any:
        """Share a product by its Shapley value: each factor's difference times the mean of the other and its reference.

        A quotient is the product with the reciprocal, whose secant is -1 / (b b0).
        """
        a, b = argument(call, 0, "input"), argument(call, 1, "other")
        if not live(b) or (call.name == "mul" and not live(a)):
            return NotImplemented  # linear
        with torch.no_grad():
            y = call.run()
        both = live(a)
        if self.recording:
            self.keep(call.name, *((a, b) if both else (b,)))
            return self._sent(y, None, *((a, b) if both else (b,)))
        if both:
            a0, b0 = self.kept(call.name, (a, b))
            of_b = (a.detach() + a0) / 2
            of_a = (b.detach() + b0) / 2
        else:
            (b0,), of_b, of_a = self.kept(call.name, (b,)), a, None
        if call.name == "div":
            of_b = -of_b / (b.detach() * b0)
            of_a = (1 / b.detach() + 1 / b0) / 2 if both else None
        shapes = a.shape if both else None, b.shape

        def back(sent: torch.Tensor) -> tuple[torch.Tensor, ...]:
            second = (sent * of_b).sum_to_size(shapes[1])
            return (second,) if of_a is None else ((sent * of_a).sum_to_size(shapes[0]), second)

        return self._sent(y, back, *((a, b) if both else (b,)))

    def _product(self, call: Call) -> Any:
        """Share a function linear in each of two factors: its derivatives at the means of factors and references."""
        leaves, tree = tree_flatten((call.args, dict(call.kwargs)))
        places = [at for at, each in enumerate(leaves) if isinstance(each, torch.Tensor) and each.requires_grad]
        if len(places) > 2 and call.name == "linear":  # of a live bias, too
            with self:
                bias = argument(call, 2, "bias")
                return argument(call, 0, "input") @ argument(call, 1, "weight").mT + bias
        if len(places) > 2 or call.name == "bilinear":
            raise self.refusal(call.name, "of more than two factors that depend on the input has no rule")
        a, b = (leaves[at] for at in places)

        def product(*factors: torch.Tensor) -> torch.Tensor:
            own = list(leaves)
            for at, factor in zip(places, factors, strict=True):
                own[at] = factor
            args, kwargs = tree_unflatten(own, tree)
            return call.function(*args, **kwargs)

        with torch.no_grad():
            y = product(a, b)
        if self.recording:
            self.keep(call.name, a, b)
            return self._sent(y, None, a, b)
        a0, b0 = self.kept(call.name, (a, b))
        means = (a.detach() + a0) / 2, (b.detach() + b0) / 2
        matrices = call.name == "matmul" and a.ndim > 1 and b.ndim > 1

        def back(sent: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if matrices:
                return (sent @ means[1].mT).sum_to_size(a.shape), (means[0].mT @ sent).sum_to_size(b.shape)
            with torch.enable_grad():
                factors = [each.requires_grad_() for each in means]
                return torch.autograd.grad(product(*factors), factors, sent)

        return self._sent(y, back, a, b)

    # Softmax and norms ------------------------------------------------------------------------------------------------

    def _softmax(self, call: Call) -> Any:
        if call.name == "softmin":
            with self:
                return argument(call, 0, "input").neg().softmax(taken_apart.softmax_of(call).dim)
        if call.name == "logsumexp":
            u, dims = argument(call, 0, "input"), argument(call, 1, "dim")
        else:
            read = taken_apart.softmax_of(call)
            u, dims = read.x, read.dim
            if read.dtype not in (None, u.dtype):
                return self._in_another_type(call, read)
        with torch.no_grad():
            y = call.run()
        if self.recording:
            self.keep(call.name, u)
            return self._sent(y, None, u)
        (u0,) = self.kept(call.name, (u,))
        given = u.detach()
        if call.name == "softmax":
            outer, inner = secants.of_softmax(given, u0, dims)
            return self._sent(y, lambda sent: (secants.sent_through_softmax(sent, outer, inner, dims),), u)
        inner, _, _ = secants.of_logsumexp(given, u0, dims)
        if call.name == "log_softmax":
            return self._sent(y, lambda sent: (sent - inner * sent.sum(dims, keepdim=True),), u)
        keepdim = argument(call, 2, "keepdim", False)
        return self._sent(y, lambda sent: (inner * (sent if keepdim else _unsqueezed(sent, dims, u.ndim)),), u)

    def _in_another_type(self, call: Call, read: taken_apart.Softmax) -> Any:
        """Compute softmax in a wider type; or in its own, and then round it as the network does.

        What is rounded keeps its own type: what follows sends back in full precision.
        """
        wide = torch.finfo(read.dtype).bits > torch.finfo(read.x.dtype).bits  # type: ignore[arg-type]
        with self:
            x = read.x.to(read.dtype) if wide else read.x
            exact = x.log_softmax(read.dim) if call.name == "log_softmax" else x.softmax(read.dim)
        if wide:
            return exact
        with torch.no_grad():
            y = call.run().to(exact.dtype)
        if self.recording:
            self.keep("rounding", exact, y)
            return self._sent(y, None, exact)
        exact0, y0 = self.kept("rounding", (exact, y))
        same = exact.detach() == exact0
        slope = torch.where(same, 1.0, (y - y0) / (exact.detach() - exact0).masked_fill(same, 1.0))
        return self._sent(y, lambda sent: (sent * slope,), exact)

    def _norm(self, call: Call) -> Any:
        norm = taken_apart.norm_of(self, call)
        if live(norm.weight, norm.bias):
            with self:
                return norm.taken_apart()
        x = norm.x
        with torch.no_grad():
            y = call.run()
            deviation = norm.deviation(x)
            root = norm.inverse_root(deviation)
        if self.recording:
            self.keep(call.name, deviation, root)
            return self._sent(y, None, x)
        deviation0, root0 = self.kept(call.name, (deviation, root))
        both, weight = deviation.add_(deviation0) if norm.centred else deviation + deviation0, norm.weight

        def back(sent: torch.Tensor) -> tuple[torch.Tensor]:
            sent = (sent if weight is None else sent * weight).reshape(norm.shape)
            found = secants.sent_through_norm(sent, both, root, root0, norm.dims, norm.centred)
            return (found.reshape(x.shape),)

        return self._sent(y, back, x)

    # Maxima -----------------------------------------------------------------------------------------------------------

    def _max_pool(self, call: Call) -> Any:
        pool = Pool(call)
        found, at = self._window_maximum(call.name, pool.input, pool)
        return (found, at) if pool.with_indices else found

    def _window_maximum(self, name: str, u: torch.Tensor, pool: Pool | Whole) -> tuple[Any, torch.Tensor]:
        """Return the maxima of windows, and the places they lie at."""
        with torch.no_grad():
            y, at = pool(u)
        places = pool.places(u) if self.max_rule == "shapley" else None
        if self.max_rule == "shapley" and places is None:
            raise self.refusal(name, "has windows of unequal size, for which `max: shapley` has no rule")
        if self.recording:
            self.keep(name, u, y, at)
            return self._sent(y, None, u), at
        u0, y0, at0 = self.kept(name, (u, y))
        given, outer = u.detach(), u.ndim - pool.dims
        rows, size = u.shape[:outer], math.prod(u.shape[outer:])
        if places is None:
            place, slope = maxima.cross_max(*(each.flatten(outer) for each in (given, u0, y, y0, at, at0)))
            each = 1
        else:
            each, inside, within = places.shape[-1], places >= 0, places.clamp(min=0)

            def windows(values: torch.Tensor) -> torch.Tensor:
                found = values.flatten(outer)[..., within].masked_fill(~inside, -math.inf)
                return found.expand(*rows, *places.shape).reshape(-1, each)

            slope = maxima.shapley_of_max(windows(given), windows(u0)).reshape(*rows, -1)
            place = within.reshape(-1).expand(slope.shape)
        first = torch.arange(math.prod(rows), device=place.device)[:, None] * size
        index = (place.reshape(len(first), -1) + first).flatten()  # of one dimension: so a GPU adds in the same order

        def back(sent: torch.Tensor) -> tuple[torch.Tensor]:
            own = sent.flatten(outer).repeat_interleave(each, -1) if each > 1 else sent.flatten(outer)
            found = torch.zeros(u.numel(), dtype=sent.dtype, device=sent.device)
            return (found.scatter_add_(0, index, (own * slope).flatten()).reshape(u.shape),)

        return self._sent(y, back, u), at

    def _maximum(self, call: Call) -> Any:
        """Take the larger of two apart: b + relu(a - b); and meet a maximum over dimensions."""
        a, other = argument(call, 0, "input"), argument(call, 1, "other")
        falls = call.name in ("minimum", "fmin", "min", "amin")
        if isinstance(other, torch.Tensor):
            with self:
                return other - (other - a).relu() if falls else other + (a - other).relu()
        dims = argument(call, 1, "dim")
        if dims is None or dims == ():
            raise self.refusal(call.name, "over all values takes images together")
        with torch.no_grad():
            plain = call.run()
        with self:  # whatever is in here meets its rule
            rest = [at for at in range(a.ndim) if at not in {each % a.ndim for each in _dims(dims)}]
            wide = a.permute(*rest, *(at for at in range(a.ndim) if at not in rest)).flatten(len(rest))
            wide = wide.neg() if falls else wide
        found, _ = self._window_maximum(call.name, wide, Whole())
        with self:
            found = found.neg() if falls else found
            found = found.reshape(plain.shape if isinstance(plain, torch.Tensor) else plain.values.shape)
        return found if isinstance(plain, torch.Tensor) else type(plain)((found, plain.indices))


class Whole:
    """The last dimension as one window."""

    dims = 1

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found = values.max(-1, keepdim=True)
        return found.values, found.indices

    def places(self, values: torch.Tensor) -> torch.Tensor | None:
        return torch.arange(values.shape[-1], device=values.device)[None]


class Pool:
    """A call of max pooling: its windows, and their maxima with the places they lie at."""

    def __init__(self, call: Call) -> None:
        self.dims = int(call.name[call.name.index("pool") + 4])
        self.adaptive = call.name.startswith("adaptive")
        self.input = argument(call, 0, "input")
        prefix = "adaptive_" if self.adaptive else ""
        self._function = getattr(functional, f"{prefix}max_pool{self.dims}d")
        if self.adaptive:
            asked = argument(call, 2, "return_indices", False)
            self.options = {"output_size": argument(call, 1, "output_size")}
        else:
            asked = argument(call, 6, "return_indices", False)
            self.options = {
                "kernel_size": argument(call, 1, "kernel_size"),
                "stride": argument(call, 2, "stride") or None,
                "padding": argument(call, 3, "padding", 0),
                "dilation": argument(call, 4, "dilation", 1),
                "ceil_mode": argument(call, 5, "ceil_mode", False),
            }
        self.with_indices = asked or call.name.endswith("_with_indices")

    def __call__(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._function(values, **self.options, return_indices=True)

    def places(self, values: torch.Tensor) -> torch.Tensor | None:
        """Return the places of each window in its plane, int64 (window, input), -1 for padding; None if unequal."""
        sizes = values.shape[values.ndim - self.dims :]
        along = [self._along(at, size) for at, size in enumerate(sizes)]
        if any(each is None for each in along):
            return None
        found = torch.zeros((1, 1), dtype=torch.int64)
        for size, each in zip(sizes, along, strict=True):
            assert each is not None
            outer, inner = found[:, None, :, None], each[None, :, None, :]
            joined = torch.where((outer < 0) | (inner < 0), -1, outer * size + inner)
            found = joined.reshape(found.shape[0] * each.shape[0], -1)
        return found.to(values.device)

    def _along(self, at: int, size: int) -> torch.Tensor | None:
        """Return the places of windows along one dimension, int64 (window, input)."""

        def own(value: Any) -> int:
            return int(value[at] if len(value) > 1 else value[0]) if isinstance(value, (tuple, list)) else value

        if self.adaptive:
            given = self.options["output_size"]
            count = own(given) if not isinstance(given, (tuple, list)) or given[at] is not None else size
            if size % (count or size):
                return None
            kernel = size // count
            return torch.arange(count)[:, None] * kernel + torch.arange(kernel)
        kernel = own(self.options["kernel_size"])
        stride = own(self.options["stride"] or self.options["kernel_size"])
        padding, dilation = own(self.options["padding"]), own(self.options["dilation"])
        over = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (-(-over // stride) if self.options["ceil_mode"] else over // stride) + 1
        if self.options["ceil_mode"] and (count - 1) * stride >= size + padding:
            count -= 1  # no window may begin in the padding behind
        found = torch.arange(count)[:, None] * stride + torch.arange(kernel) * dilation - padding
        return torch.where((found < 0) | (found >= size), -1, found)


def _dims(given: Any) -> tuple[int, ...]:
    return (given,) if isinstance(given, int) else tuple(given)


def _unsqueezed(values: torch.Tensor, dims: Any, ndim: int) -> torch.Tensor:
    for at in sorted(each % ndim for each in _dims(dims)):
        values = values.unsqueeze(at)
    return values


def _glu(sites: CallSites, input: torch.Tensor, dim: int = -1) -> torch.Tensor:
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def _added_product(
    sites: CallSites, input: torch.Tensor, first: torch.Tensor, second: torch.Tensor, *, value: float = 1
) -> torch.Tensor:
    return input + first * second * value


def _added_matrices(
    sites: CallSites,
    input: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> torch.Tensor:
    return input * beta + first @ second * alpha


def _euclidean(
    sites: CallSites, x: torch.Tensor, ord: Any = 2, dim: Any = None, keepdim: bool = False, **named: Any
) -> torch.Tensor:
    if ord != 2 or dim is None or named.get("dtype") is not None:
        raise sites.refusal("vector_norm", "is Euclidean over dimensions, or has no rule")
    return (x * x).sum(dim, keepdim=keepdim).sqrt()


def _variance(sites: CallSites, input: torch.Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> torch.Tensor:
    if dim is None or isinstance(dim, bool):
        raise sites.refusal("var", "over all values takes images together")
    correction = kwargs.get("correction", kwargs.get("unbiased", args[0] if args else 1))
    keepdim = kwargs.get("keepdim", args[1] if len(args) > 1 else False)
    deviation = input - input.mean(dim, keepdim=True)
    count = math.prod(input.shape[at] for at in _dims(dim))
    return (deviation * deviation).sum(dim, keepdim=keepdim) / max(count - int(correction), 0)


def _deviation(sites: CallSites, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return _variance(sites, input, *args, **kwargs).sqrt()


def _fused_attention(sites: CallSites, *args: Any, **kwargs: Any) -> torch.Tensor:
    return taken_apart.scaled_dot_product_attention(sites, taken_apart.over_keys, *args, **kwargs)


TAKEN_APART: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": _fused_attention,
    "multi_head_attention_forward": taken_apart.multi_head_attention_forward,
    "linalg_vector_norm": _euclidean,
    "vector_norm": _euclidean,
    "var": _variance,
    "std": _deviation,
    "glu": _glu,
    "addcmul": _added_product,
    "addmm": _added_matrices,
    "baddbmm": _added_matrices,
}
