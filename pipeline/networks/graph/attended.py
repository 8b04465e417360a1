"""The attention weights of every block of a transformer, as part of the autograd graph."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from pipeline.networks.graph.call_sites import Call, CallSites, UnsupportedError, argument


class Attended(CallSites):
    """Keeps the weights that softmax gives over tokens, fused attention taken apart; other calls stay as they are.

    `weights` are those of each block in the order of the forward, (image, head, query, key), as the values meet them.
    """

    method = "attention"
    strict = False

    def __init__(self, network: nn.Module, images: int) -> None:
        super().__init__(network)
        self.images = images
        self.weights: list[torch.Tensor] = []
        self.modules: list[str] = []

    def rule(self, call: Call) -> Any:
        if call.name == "scaled_dot_product_attention":
            return self._taken_apart(*call.args, **call.kwargs)
        if call.name != "softmax":
            return NotImplemented
        output = call.run()
        axis = argument(call, 1, "dim", -1)
        if output.ndim in (3, 4) and output.shape[-1] == output.shape[-2]:
            if axis not in (-1, output.ndim - 1):
                raise self.refusal("softmax", "runs over the queries, not over the keys")
            return self._kept(output)
        return output

    def _taken_apart(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if dropout_p:
            raise self.refusal("scaled_dot_product_attention", "draws random numbers: call `eval()` first")
        if enable_gqa and key.shape[-3] != query.shape[-3]:
            heads = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(heads, -3), value.repeat_interleave(heads, -3)
        scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if attn_mask is not None:
            masked = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if masked else scores + attn_mask
        return self._kept(scores.softmax(-1)) @ value

    def _kept(self, weights: torch.Tensor) -> torch.Tensor:
        """Keep weights, and give what follows a copy, since it may write into them."""
        found = weights
        if found.shape[-1] != found.shape[-2]:
            raise self.refusal("attention", "is between different tokens, which cannot be followed through blocks")
        if found.ndim == 3 and found.shape[0] % self.images == 0:
            found = found.unflatten(0, (self.images, found.shape[0] // self.images))
        if found.ndim != 4 or found.shape[0] != self.images:
            raise self.refusal("attention", "is in windows, or between groups of tokens, not over the whole image")
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
