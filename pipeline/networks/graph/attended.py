"""The attention weights of every block of a transformer, as part of the autograd graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pipeline.networks.graph.call_sites import (
    REARRANGED_NODES,
    Call,
    CallSites,
    UnsupportedError,
    argument,
    kind_of,
    tensors_in,
)
from pipeline.networks.graph.taken_apart import scaled_dot_product_attention

PRODUCTS = frozenset({"matmul", "addmm", "baddbmm", "einsum"})  # in which weights meet values
UNEQUAL = "is between different tokens, which cannot be followed through blocks"
IN_WINDOWS = "is in windows, or between groups of tokens, not over the whole image"


class Attended(CallSites):
    """Keep the weights that softmax gives over tokens, fused attention taken apart; other calls stay as they are.

    `weights` are those of each block in the order of the forward, (image, head, query, key), as the values meet them.
    A softmax of another form, such as a gate over channels, is attention if its result then meets values in a product
    of matrices, and is refused there.
    """

    method = "attention"
    strict = False

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__(network)
        self.images = images
        self.weights: list[torch.Tensor] = []
        self.modules: list[str] = []
        self._others: dict[Any, UnsupportedError] = {}  # the nodes of other softmaxes: why, if they are attention

    def rule(self, call: Call) -> Any:
        if call.name == "scaled_dot_product_attention":
            return scaled_dot_product_attention(self, self._of_keys, *call.args, **call.kwargs)
        if call.name in PRODUCTS:
            for node in filter(None, (each.grad_fn for each in tensors_in(call.args, call.kwargs))):
                if (refusal := self._others.get(_origin(node))) is not None:
                    raise refusal
        if call.name != "softmax":
            return NotImplemented
        output = call.run()
        if output.ndim < 3:
            return output
        given = argument(call, 1, "dim")
        axis = (0 if output.ndim == 3 else 1) if given is None else given % output.ndim  # torch's choice without `dim`
        square = output.shape[-1] == output.shape[-2]
        if axis == output.ndim - 1 and square and output.ndim < 5:
            return self._kept(output)
        if axis == output.ndim - 1:
            why = IN_WINDOWS if square else UNEQUAL
        elif given is None:
            why = f"has no `dim`, so it runs over axis {axis}, not over the keys: give `dim=-1`"
        else:
            why = f"runs over {'the queries' if axis == output.ndim - 2 else f'axis {axis}'}, not over the keys"
        refusal = self.refusal("attention" if axis == output.ndim - 1 else "softmax", why)
        if square and output.ndim < 5 and (given is None or axis == output.ndim - 2):
            raise refusal
        self._others[output.grad_fn] = refusal
        return output

    def _of_keys(self, scores: torch.Tensor) -> torch.Tensor:
        return self._kept(scores.softmax(-1))

    def _kept(self, weights: torch.Tensor) -> torch.Tensor:
        """Keep weights, and give what follows a copy, since it may write into them."""
        found = weights
        if found.shape[-1] != found.shape[-2]:
            raise self.refusal("attention", UNEQUAL)
        if found.ndim == 3 and found.shape[0] % self.images == 0:
            found = found.unflatten(0, (self.images, found.shape[0] // self.images))
        if found.ndim != 4 or found.shape[0] != self.images:
            raise self.refusal("attention", IN_WINDOWS)
        self.weights.append(found)
        self.modules.append(self.where)
        return found.reshape(weights.shape).clone()

    def checked(self) -> list[torch.Tensor]:
        """Return the weights of all blocks; refuse a network without attention, or with other tokens on the way."""
        if not self.weights:
            raise UnsupportedError("the network computes no attention that can be read: no softmax over tokens")
        first = self.weights[0].shape[-1]
        for module, each in zip(self.modules, self.weights, strict=True):
            if each.shape[-1] != first:
                raise UnsupportedError(
                    f"attention: module {module!r} has {each.shape[-1]} tokens, and {self.modules[0]!r} has {first}: "
                    f"attention cannot be followed through blocks of different tokens"
                )
        return self.weights


def _origin(node: Any) -> Any:
    """Return the node whose result a node rearranges, masks or divides by something."""
    while True:
        inputs = [each for each, _ in node.next_functions if each is not None]
        scales = kind_of(node) == "Div" or (kind_of(node) in ("Mul", "Add") and len(inputs) == 1)
        if not inputs or not (kind_of(node) in REARRANGED_NODES or scales):
            return node
        node = inputs[0]
