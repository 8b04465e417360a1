"""Layer-wise relevance propagation: where the score of an image comes from, and an account of the rest.

`pipeline.networks.graph.propagated` has the rules. A network is studied once, on one image and on two, for the layout
of its calls; that is remembered by network and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from pipeline.networks.gradients import Gradients, Target, gradients, output_of
from pipeline.networks.graph.ledger import Ledger, OtherCallsError
from pipeline.networks.graph.propagated import Plan, Preset, Propagated, Study


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
        A call has no rule, a pattern matches no module or decides nothing, the plan does not apply to the network, or a
        layer has no relevance of its own.
    """
    try:
        found, sites = _propagated(network, inputs, target, plan, layers)
    except OtherCallsError:  # of a network that was changed since
        _STUDIES.pop(network, None)
        found, sites = _propagated(network, inputs, target, plan, layers)
    assert found.inputs is not None
    values = found.inputs * inputs + sites.direct
    positive = None
    if plan.signs:
        rest = values - sites.direct
        positive = sites.positive + rest.clamp(min=0)
    of_layers = {name: output * c for name, (output, c) in found.layers.items()}
    return Relevance(values, found.score, sites.ledger.bias, sites.ledger.leak, positive, of_layers)


def _propagated(
    network: nn.Module, inputs: torch.Tensor, target: Target, plan: Plan, layers: Sequence[str]
) -> tuple[Gradients, Propagated]:
    study = study_of(network, plan.preset, inputs, target.layer)
    if folded := [name for name in layers if name in study.folded]:
        raise OtherCallsError(no_relevance(folded[0]))  # unless the network was changed since
    sites = Propagated(network, plan, inputs, study)
    found = gradients(network, inputs, _Scored(target, sites.ledger), layers, sites=sites)
    if target.layer is None:  # else the forward ended before rules that are meant for what follows
        sites.check_rules()
    return found, sites


# The target -----------------------------------------------------------------------------------------------------------


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


# The study ------------------------------------------------------------------------------------------------------------

_STUDIES: WeakKeyDictionary[nn.Module, dict[Any, Study]] = WeakKeyDictionary()


def study_of(network: nn.Module, preset: Preset, inputs: torch.Tensor, layer: str | None = None) -> Study:
    """Return what the calls of a network's forward are like, from an image and two of which it is the first.

    Parameters
    ----------
    inputs : of which the shape of one, the type and the device count. layer : with whose output the forward ends.

    Raises
    ------
    MicrotomeError
        A call has no rule, or mixes the images of a batch.
    """
    known = _STUDIES.setdefault(network, {})
    key = tuple(inputs.shape[1:]), inputs.dtype, inputs.device, layer, preset
    if key not in known:
        noise = torch.randn((2, *inputs.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        one, two = (_met(network, preset, each.to(inputs.device, inputs.dtype), layer) for each in (noise[:1], noise))
        known[key] = Study.of(one.calls, two.calls, two.rectifiers > 0)
    return known[key]


def _met(network: nn.Module, preset: Preset, images: torch.Tensor, layer: str | None) -> Propagated:
    sites = Propagated(network, Plan(preset=preset), images)
    sites.audit(output_of(network, images, layer, sites))
    return sites


def no_relevance(layer: str) -> str:
    """Return why a layer that a BatchNorm follows is refused."""
    return f"layer {layer!r} has no relevance of its own: it is folded into the BatchNorm after it, which has one"
