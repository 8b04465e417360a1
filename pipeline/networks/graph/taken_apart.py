"""Composite functions of torch, taken apart into calls for which there are rules: attention, softmax, norms.

Inside the `with` block of call sites, each of these calls meets its rule:

    with sites:
        return scaled_dot_product_attention(sites, over_keys, *call.args, **call.kwargs)

Attention keeps the images first, so that whatever is of an image lies together.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from pipeline.networks.graph.call_sites import Call, CallSites, argument

NORMS = frozenset({"layer_norm", "rms_norm", "group_norm", "instance_norm"})
SOFTMAXES = frozenset({"softmax", "log_softmax", "softmin"})

# Attention ------------------------------------------------------------------------------------------------------------


def over_keys(scores: torch.Tensor) -> torch.Tensor:
    """Return weights (..., query, key) that add up to 1 over the keys."""
    return scores.softmax(-1)


def scaled_dot_product_attention(
    sites: CallSites,
    softmax: Callable[[torch.Tensor], torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Compute torch's function of this name from products of matrices; `softmax` makes weights of scores."""
    if dropout_p:
        raise sites.refusal("scaled_dot_product_attention", "draws random numbers: call `eval()` first")
    if enable_gqa and key.shape[-3] != query.shape[-3]:
        heads = query.shape[-3] // key.shape[-3]
        key, value = _repeated(key, heads), _repeated(value, heads)
    if is_causal:
        attn_mask = torch.ones((query.shape[-2], key.shape[-2]), dtype=torch.bool, device=query.device).tril()
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    return softmax(_scores(query, key, scale, attn_mask)) @ value


def multi_head_attention_forward(
    sites: CallSites,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: torch.Tensor | None,
    in_proj_bias: torch.Tensor | None,
    bias_k: torch.Tensor | None,
    bias_v: torch.Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: torch.Tensor,
    out_proj_bias: torch.Tensor | None,
    training: bool = True,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: torch.Tensor | None = None,
    k_proj_weight: torch.Tensor | None = None,
    v_proj_weight: torch.Tensor | None = None,
    static_k: torch.Tensor | None = None,
    static_v: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute torch's function of this name with the images first.

    Torch's own body makes rows (token, image) and (image, head), in which what is of an image lies apart. Queries, keys
    and values are (token, image, unit), or (token, unit).
    """
    name = "multi_head_attention_forward"
    if training and dropout_p:
        raise sites.refusal(name, "draws random numbers: call `eval()` first")
    if bias_k is not None or bias_v is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise sites.refusal(name, "with keys or values of its own has no rule")
    alone = query.ndim == 2
    given = [each[None] if alone else each.transpose(0, 1) for each in (query, key, value)]
    if query is key and key is value and in_proj_weight is not None:
        parts = functional.linear(given[0], in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        if not use_separate_proj_weight:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        biases: Any = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        parts = tuple(functional.linear(*each) for each in zip(given, weights, biases, strict=True))
    width = embed_dim_to_check // num_heads
    q, k, v = (part.unflatten(-1, (num_heads, width)).transpose(1, 2) for part in parts)
    attends = over_keys(_scores(q, k, 1 / math.sqrt(width), _masks(attn_mask, key_padding_mask, q, k)))
    output = functional.linear((attends @ v).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    output = output[0] if alone else output.transpose(0, 1)
    if not need_weights:
        return output, None
    shown = attends.mean(1) if average_attn_weights else attends
    return output, shown[0] if alone else shown


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float, mask: torch.Tensor | None) -> torch.Tensor:
    """Return (..., query, key): scaled products, -inf where a boolean mask is False, or with a mask added."""
    scores = query @ key.mT * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask


def _repeated(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each head, (..., head, token, unit), so many times in a row."""
    return tensor.unsqueeze(-3).expand(*tensor.shape[:-2], times, *tensor.shape[-2:]).flatten(-4, -3)


def _masks(
    mask: torch.Tensor | None, padding: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor | None:
    """Return what is added to scores (image, head, query, key); a boolean mask of MultiheadAttention is True where not.

    `mask` is (query, key) or (image * head, query, key), `padding` (image, key) or (key,).
    """
    if mask is not None and mask.ndim == 3:
        mask = mask.reshape(*query.shape[:2], *mask.shape[-2:])
    if padding is not None:
        padding = padding.reshape(-1, 1, 1, key.shape[-2])
    added = [_added(each, query.dtype) for each in (mask, padding) if each is not None]
    return None if not added else sum(added[1:], added[0])


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)


# Softmax --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Softmax:
    """A call of softmax: of `x` (after `to(dtype)`), over `dim`."""

    x: torch.Tensor
    dim: int
    dtype: torch.dtype | None


def softmax_of(call: Call) -> Softmax:
    """Return what a call of one of `SOFTMAXES` computes; without `dim`, it is torch's choice."""
    x, dim = argument(call, 0, "input"), argument(call, 1, "dim")
    if dim is None:
        dim = 0 if x.ndim in (0, 1, 3) else 1
    of_network = isinstance(call.function, types.FunctionType)  # whose third argument is a level of the stack
    return Softmax(x, dim % max(x.ndim, 1), call.kwargs.get("dtype", argument(call, 3 if of_network else 2, "dtype")))


# Norms ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Norm:
    """A call of one of `NORMS`: (x - mean) / sqrt(mean((x - mean)^2) + eps) * weight + bias.

    Attributes
    ----------
    x : what is normalised.
    shape : in which shape the means are taken, over its dimensions `dims`.
    centred : whether the mean is subtracted; RMSNorm does not.
    weight, bias : of a shape that is broadcast to that of `x`; None: there is none.
    """

    x: torch.Tensor
    shape: tuple[int, ...]
    dims: tuple[int, ...]
    eps: float
    centred: bool
    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def deviation(self, x: torch.Tensor) -> torch.Tensor:
        """Return x less its mean, in `shape`."""
        grouped = x.reshape(self.shape)
        return grouped - grouped.mean(self.dims, keepdim=True) if self.centred else grouped

    def inverse_root(self, deviation: torch.Tensor) -> torch.Tensor:
        """Return the inverse of the standard deviation, which is broadcast to `shape`."""
        return ((deviation * deviation).mean(self.dims, keepdim=True) + self.eps).rsqrt()

    def scaled(self, normalised: torch.Tensor) -> torch.Tensor:
        """Return the output, from deviation times inverse root."""
        output = normalised.reshape(self.x.shape)
        output = output if self.weight is None else output * self.weight
        return output if self.bias is None else output + self.bias

    def taken_apart(self) -> torch.Tensor:
        """Compute the call from means, squares, a root and products."""
        deviation = self.deviation(self.x)
        return self.scaled(deviation * self.inverse_root(deviation))


def norm_of(sites: CallSites, call: Call) -> Norm:
    """Return what a call of one of `NORMS` computes."""
    x = argument(call, 0, "input")
    if call.name in ("layer_norm", "rms_norm"):
        shape = argument(call, 1, "normalized_shape")
        sizes = (shape,) if isinstance(shape, int) else tuple(shape)
        centred = call.name == "layer_norm"
        bias = argument(call, 3, "bias") if centred else None
        eps = argument(call, 4, "eps", 1e-5) if centred else argument(call, 3, "eps")
        dims = tuple(range(-len(sizes), 0))
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return Norm(x, tuple(x.shape), dims, eps, centred, argument(call, 2, "weight"), bias)
    if call.name == "group_norm":
        groups, weight, bias = (argument(call, *at) for at in ((1, "num_groups"), (2, "weight"), (3, "bias")))
        eps = argument(call, 4, "eps", 1e-5)
    else:
        of_network = isinstance(call.function, types.FunctionType)  # torch's own has weight and bias first
        places = {"weight": 3, "bias": 4} if of_network else {"weight": 1, "bias": 2}
        if not argument(call, 5, "use_input_stats", True):
            raise sites.refusal(call.name, "with running statistics has no rule")
        groups, weight, bias = x.shape[1], *(argument(call, at, name) for name, at in places.items())
        eps = argument(call, 7, "eps", 1e-5)
    by_channel = (-1, *(1,) * (x.ndim - 2))
    weight, bias = (None if each is None else each.reshape(by_channel) for each in (weight, bias))
    return Norm(x, (x.shape[0], groups, -1), (-1,), eps, True, weight, bias)


def normalisation_of(call: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the input of a call of batch_norm, and by its running statistics its scale and shift, (unit,)."""
    of_network = isinstance(call.function, types.FunctionType)  # torch's own has weight and bias before the statistics
    names = ("running_mean", "running_var", "weight", "bias")
    places = (1, 2, 3, 4) if of_network else (3, 4, 1, 2)
    mean, variance, weight, bias = (argument(call, at, name) for at, name in zip(places, names, strict=True))
    scale = (variance + argument(call, 7, "eps", 1e-5)).rsqrt()
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return argument(call, 0, "input"), scale, shift if bias is None else shift + bias
