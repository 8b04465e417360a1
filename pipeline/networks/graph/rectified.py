"""Deconvnet and guided backpropagation: what every rectifier of a network sends back."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn

from pipeline.networks.graph.call_sites import LINEAR_NODES, Call, CallSites, UnsupportedError, Vouched, argument

Rule = Literal["deconvnet", "guided_backprop"]
TITLES: dict[Rule, str] = {"deconvnet": "deconvnet", "guided_backprop": "guided backpropagation"}
MAX_POOLS = frozenset(
    {f"{kind}max_pool{n}d{end}" for kind in ("", "adaptive_") for n in (1, 2, 3) for end in ("", "_with_indices")}
)
MAX_NODES = frozenset(
    {"MaxPool2DWithIndices", "MaxPool3DWithIndices", "MaxPool2D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D"}
)


def ceiling_of(call: Call) -> float | None:
    """Return the upper bound of a rectifier, which is 0 below 0 and x between; None for any other call."""
    if call.name == "relu":
        return math.inf
    if call.name == "relu6":
        return 6.0
    if call.name == "threshold":
        return math.inf if (argument(call, 1, "threshold"), argument(call, 2, "value")) == (0, 0) else None
    if call.name in ("clamp", "clamp_min", "hardtanh"):
        names = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
        default = (-1.0, 1.0) if call.name == "hardtanh" else (None, None)
        low, top = (argument(call, 1 + at, names[at], default[at]) for at in (0, 1))
        if isinstance(low, (int, float)) and low == 0:
            if top is None:
                return math.inf
            return float(top) if isinstance(top, (int, float)) and top >= 0 else None
    return None


class Rectify(Vouched):
    """Compute min(max(x, 0), top), and send R back where R > 0 and x < top, with `guided` only where 0 < x too.

    Zeiler and Fergus, "Visualizing and understanding convolutional networks" (ECCV 2014); Springenberg et al.,
    "Striving for simplicity" (ICLR workshop 2015).
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, guided: bool, top: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.rule = guided, top
        return x.clamp(0, top) if top < math.inf else x.relu()

    @staticmethod
    def backward(ctx: Any, *relevance: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,), (guided, top), (r,) = ctx.saved_tensors, ctx.rule, relevance
        passes = r > 0
        if guided:
            passes = passes & (x > 0)
        if top < math.inf:
            passes = passes & (x < top)
        return torch.where(passes, r, torch.zeros_like(r)), None, None


class Rectified(CallSites):
    """Apply the rules of either method to rectifiers: ReLU and its clamped forms.

    Linear calls and max pooling, which sends back through the switches of the forward, keep torch's own backward. Any
    other nonlinearity is refused.
    """

    nodes = LINEAR_NODES | MAX_NODES

    def __init__(self, network: nn.Module, rule: Rule) -> None:
        super().__init__(network)
        self.method = TITLES[rule]
        self.guided = rule == "guided_backprop"
        self.rectifiers = 0

    def rule(self, call: Call) -> Any:
        if call.name in MAX_POOLS:
            return call.run()
        if (top := ceiling_of(call)) is not None:
            self.rectifiers += 1
            return Rectify.apply(call.args[0] if call.args else call.kwargs["input"], self.guided, top)
        return NotImplemented

    def audit(self, output: torch.Tensor) -> None:
        if not self.rectifiers:
            raise UnsupportedError(
                f"{self.method}: the network calls no ReLU, whose backward the method is about, so it is not defined"
            )
        super().audit(output)
