"""Attention weights as they are before they meet the values, and how far they reach across the image."""

from __future__ import annotations

import math

import torch


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * query keyᵀ + mask), (..., query, key) float32: what a fused kernel does not give out.

    Parameters
    ----------
    query, key : (..., head, token, unit), as `torch.nn.functional.scaled_dot_product_attention` takes them: after
        projection, normalisation and rotation. Of grouped heads, `key` has a divisor of the number of heads of `query`.
    mask : broadcast to (..., query, key); boolean: False is masked; else it is added.
    causal : each token attends to itself and those before it.
    scale : default 1 / sqrt(units).
    """
    query, key = query.float(), key.float()
    if key.shape[-3] != query.shape[-3]:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), -math.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)


def distances(grid: tuple[int, int], patch: tuple[float, float]) -> torch.Tensor:
    """(position, position) float64: pixels between the centres of the patches of a grid (y, x), row by row.

    `patch` is the height and width of one in pixels.
    """
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    place = torch.stack([y.flatten() * patch[0], x.flatten() * patch[1]], 1)
    return (place[:, None] - place[None]).square().sum(-1).sqrt()


def mean_distance(weights: torch.Tensor, distance: torch.Tensor, special: int = 0) -> torch.Tensor:
    """(image, head, 2) float64: the distance over which the patches attend, on average over the attending patches.

    Class and register tokens, which have no place, are dropped on both sides. First as the weights are, so that what
    goes to those tokens counts as no distance; then with the weights of each patch renormalised to 1 over the patches
    (NaN where a patch gives all its weight to other tokens).

    Parameters
    ----------
    weights : (image, head, query, key), tokens of the grid last.
    distance : (position, position), as `distances` gives it.
    special : tokens before those of the grid.
    """
    weights = weights[..., special:, special:].double()
    distance = distance.to(weights.device)
    far = (weights * distance).sum(-1)
    return torch.stack([far.mean(-1), (far / weights.sum(-1)).mean(-1)], -1)
