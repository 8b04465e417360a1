"""DeepLIFT's RevealCancel rule at call sites: positive and negative parts of every difference, kept apart.

Beside each tensor u that is made of the input lie two parts, d+ >= 0 and d- <= 0 with d+ + d- = u - u0. The gradient of
a tensor is that of both its parts, and parts are made of parts: so the gradient of a score is its multiplier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

from kernels.attribution import secants
from pipeline.networks.graph.call_sites import (
    DROPOUTS,
    ELEMENTWISE,
    REARRANGEMENTS,
    WRITERS,
    Call,
    argument,
    live,
    tensors_in,
    trains,
)
from pipeline.networks.graph.rescale import Differences, Sent
from pipeline.networks.graph.taken_apart import normalisation_of

Parts = tuple[torch.Tensor, torch.Tensor]
Function = Callable[[torch.Tensor], torch.Tensor]
WEIGHTED = {"linear", *(f"conv{kind}{n}d" for kind in ("", "_transpose") for n in (1, 2, 3))}
MEANS = {
    *("mean", "sum", "cumsum", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
}
SCALES = {"mul", "div", "neg"}
SUMS = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}
CHOICES = REARRANGEMENTS | DROPOUTS | {"where", "masked_fill"}
ROUNDING = 64  # in units of the precision: below, a part is what rounding left of none


class RevealCancel(Differences):
    """Shrikumar et al. (2017), sections 3.5.1 to 3.5.3.

    A linear call gives each input's contribution w d to the part of its sign, both of the input's parts alike, and half
    to each where d = 0. One that scales each entry keeps the parts apart, as if folded into the linear call before it.
    A nonlinearity gives both parts their Shapley values. There is no rule for products, quotients, softmax and maxima.
    """

    method = "DeepLIFT RevealCancel"
    linear: ClassVar[bool] = False

    def __init__(self, network: nn.Module, images: int, reference: torch.Tensor) -> None:
        super().__init__(network, images)
        self._reference = reference
        self._parts: Any = WeakIdKeyDictionary()  # of a tensor, with its version: parts of what is overwritten are lost

    def rule(self, call: Call) -> Any:
        name = call.name
        if not call.args:  # the input by its name
            rest = dict(call.kwargs)
            call = Call(name, call.function, (rest.pop("input"),), rest)
        if self.recording:
            return self._recorded(call)
        if name in WRITERS:
            return self._write(call)
        if name in CHOICES:
            return self._chosen(call)
        if name == "relu" or name in ELEMENTWISE:
            return self._elementwise(call)
        if name in WEIGHTED | {"matmul"}:
            return self._weighted(call)
        if name in MEANS or (name == "interpolate" and argument(call, 3, "mode", "nearest") != "bicubic"):
            function = self._of_first(call)
            return self._linear(call, call.args[0], function, function)
        if name == "batch_norm" and not trains(call):
            return self._batch_norm(call)
        if name in SCALES or name in SUMS:
            return self._arithmetic(call)
        return NotImplemented

    def carried(self, source: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
        if not self.recording and live(source):
            self._give(to, self.parts(source))
        return to

    # Parts ------------------------------------------------------------------------------------------------------------

    def parts(self, of: torch.Tensor) -> Parts:
        """Return the parts of a tensor; those of the network's input are its difference, by its sign."""
        if of in self._parts:
            positive, negative, version = self._parts[of]
            if version == of._version:
                return positive, negative
        elif of.is_leaf and of.shape[1:] == self._reference.shape[1:]:
            difference = of - self._reference
            return difference * (difference > 0), difference * (difference < 0)
        raise self.refusal("a write into memory that tensors share", "loses the differences")

    def _give(self, to: torch.Tensor, parts: Parts) -> torch.Tensor:
        self._parts[to] = (*parts, to._version)
        return to

    def _with_parts(self, value: torch.Tensor, parts: Parts) -> Any:
        """Return a value as a tensor whose gradient is that of its parts."""
        made = Sent.apply((value,), lambda sent: (sent, sent), *parts)
        return self._give(made, parts)

    # Calls ------------------------------------------------------------------------------------------------------------

    def _recorded(self, call: Call) -> Any:
        if call.name in ("where", "masked_fill"):
            return call.run()
        if call.name in WRITERS | CHOICES:
            return NotImplemented
        if call.name == "relu" or call.name in ELEMENTWISE:
            u = call.args[0]
            with torch.no_grad():
                y = call.run()
            self.keep(call.name, u, y)
            return Sent.apply((y.clone(),), None, u)
        known = call.name in WEIGHTED | MEANS | SCALES | set(SUMS) | {"matmul", "interpolate", "batch_norm"}
        return call.run() if known and self._is_linear(call) else NotImplemented

    def _of_part(self, at: int) -> Callable[[Any], Any]:
        """Return what puts a part in the place of a tensor; constants have none."""

        def part(each: Any) -> Any:
            if not isinstance(each, torch.Tensor) or not each.is_floating_point():
                return each
            return self.parts(each)[at] if each.requires_grad else torch.zeros_like(each)

        return part

    def _chosen(self, call: Call) -> Any:
        """Choose the entries of the parts as those of the tensor are chosen."""
        found = []
        for at in range(2):
            args, kwargs = tree_map(self._of_part(at), (call.args, dict(call.kwargs)))
            if call.name == "pad" and argument(call, 2, "mode", "constant") == "constant":
                found.append(functional.pad(args[0], argument(call, 1, "pad")))
            elif call.name == "masked_fill":
                found.append(args[0].masked_fill(argument(call, 1, "mask"), 0.0))
            elif call.name == "where":
                args = [0.0 if isinstance(each, (int, float)) else each for each in args]
                found.append(call.function(*args, **kwargs))
            else:
                args = [args[0].view_as(args[0]) if isinstance(args[0], torch.Tensor) else args[0], *args[1:]]
                found.append(call.function(*args, **kwargs))
        output = call.run()
        for each, positive, negative in zip(tensors_in(output), *map(tensors_in, found), strict=True):
            self._give(each, (positive, negative))
        return output

    def _write(self, call: Call) -> Any:
        """Write parts into copies of the parts of the tensor that is written into."""
        into = call.args[0]
        if call.name == "set_data":
            raise self.refusal(call.name, "loses the differences")
        written = []
        for at in range(2):
            part = self._of_part(at)
            destination = part(into).clone()
            call.function(destination, *tree_map(part, call.args[1:]), **tree_map(part, dict(call.kwargs)))
            written.append(destination)
        output = call.run()
        self._give(into, (written[0], written[1]))
        return output

    def _elementwise(self, call: Call) -> Any:
        """Give both parts their Shapley values: half of what each adds alone, half of what it adds to the other."""
        u, function = call.args[0], self._of_first(call)
        if live(call.args[1:], call.kwargs) or not live(u):
            raise self.refusal(call.name, "depends on the input in two ways, which has no rule")

        with torch.no_grad():
            y = function(u)
        u0, y0 = self.kept(call.name, (u, y))
        if u.shape != y.shape:
            raise self.refusal(call.name, "with constants of a larger shape has no rule")
        positive, negative = self.parts(u)
        with torch.no_grad():
            of_positive, of_negative = function(u0 + positive), function(u0 + negative)
            risen = (of_positive - y0 + y - of_negative) / 2
            fallen = (of_negative - y0 + y - of_positive) / 2
            size = torch.maximum(torch.maximum(u0.abs(), positive.abs()), negative.abs())
            slopes = [
                _slope(function, part, made, u0, other, size)
                for part, made, other in ((positive, risen, negative), (negative, fallen, positive))
            ]
        parts = [
            Sent.apply((made,), lambda sent, slope=slope: (sent * slope,), part)
            for made, slope, part in zip((risen, fallen), slopes, (positive, negative), strict=True)
        ]
        return self._with_parts(y, (parts[0], parts[1]))

    def _linear(self, call: Call, u: torch.Tensor, function: Function, absolute: Function) -> Any:
        """Sum the contributions w d by their sign: half of sum w d and half of sum abs(w d), added and subtracted.

        `function` is linear without a constant, and `absolute` has the magnitudes of its weights.
        """
        with torch.no_grad():
            y = call.run()
        positive, negative = self.parts(u)
        difference = positive + negative
        total = function(difference) / 2
        size = absolute(difference * difference.detach().sign()) / 2
        return self._with_parts(y, (total + size, total - size))

    def _of_first(self, call: Call) -> Function:
        return lambda value: call.function(value, *call.args[1:], **call.kwargs)

    def _weighted(self, call: Call) -> Any:
        if call.name == "matmul":
            a, b = argument(call, 0, "input"), argument(call, 1, "other")
            if live(a) and live(b):
                raise self.refusal(call.name, "of two factors that depend on the input has no rule")
            if live(a):
                return self._linear(call, a, lambda value: value @ b, lambda value: value @ b.abs())
            return self._linear(call, b, lambda value: a @ value, lambda value: a.abs() @ value)
        weight, rest = argument(call, 1, "weight"), call.args[3:]
        if live(weight, argument(call, 2, "bias")):
            raise self.refusal(call.name, "of two factors that depend on the input has no rule")
        named = {name: value for name, value in call.kwargs.items() if name not in ("weight", "bias")}
        return self._linear(
            call,
            argument(call, 0, "input"),
            lambda value: call.function(value, weight, None, *rest, **named),
            lambda value: call.function(value, weight.abs(), None, *rest, **named),
        )

    def _scaled(self, call: Call, u: torch.Tensor, by: torch.Tensor | float) -> Any:
        """Scale each entry: its parts stay apart, and change places under a negative factor."""
        with torch.no_grad():
            y = call.run()
        positive, negative = (part * by for part in self.parts(u))
        if not isinstance(by, torch.Tensor):
            return self._with_parts(y, (positive, negative) if by > 0 else (negative, positive))
        keeps = by > 0
        return self._with_parts(y, (torch.where(keeps, positive, negative), torch.where(keeps, negative, positive)))

    def _batch_norm(self, call: Call) -> Any:
        u, scale, _ = normalisation_of(call)
        return self._scaled(call, u, scale.view(-1, *(1,) * (u.ndim - 2)))

    def _arithmetic(self, call: Call) -> Any:
        a, b = argument(call, 0, "input"), argument(call, 1, "other")
        if call.name == "neg":
            return self._scaled(call, a, -1.0)
        if call.name == "div" and (live(b) or call.kwargs.get("rounding_mode") is not None):
            raise self.refusal(call.name, "by what depends on the input has no rule")
        if call.name in SCALES:
            if live(a) and live(b):
                raise self.refusal(call.name, "of two factors that depend on the input has no rule")
            u, by = (a, b) if live(a) else (b, a)
            return self._scaled(call, u, 1 / by if call.name == "div" else by)
        alpha = call.kwargs.get("alpha", 1)
        signs = [sign * factor for sign, factor in zip(SUMS[call.name], (1, alpha), strict=True)]
        if call.name == "rsub":
            signs = [-alpha, 1]
        alive = [(each, sign) for each, sign in zip((a, b), signs, strict=True) if live(each)]
        if len(alive) == 1:
            return self._scaled(call, alive[0][0], float(alive[0][1]))
        with torch.no_grad():
            y = call.run()
        total: Any = 0
        size: Any = 0
        for each, sign in alive:
            positive, negative = self.parts(each)
            difference = (positive + negative) * sign
            total, size = total + difference / 2, size + difference * difference.detach().sign() / 2
        return self._with_parts(y, (total + size, total - size))


def _slope(
    function: Function,
    part: torch.Tensor,
    made: torch.Tensor,
    u0: torch.Tensor,
    other: torch.Tensor,
    size: torch.Tensor,
) -> torch.Tensor:
    """Return made / part; where there is no part, the mean of the derivatives without and with the other part."""
    none = part.abs() <= size * (ROUNDING * torch.finfo(part.dtype).eps)
    slope = made / part.masked_fill(none, 1.0)
    if not part.is_cuda and not bool(none.any()):
        return slope
    middle = u0 + part / 2
    alone, joined = secants.derivative(function, middle), secants.derivative(function, middle + other)
    return torch.where(none, (alone + joined) / 2, slope)
