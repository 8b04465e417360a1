"""Compute attention weights before they meet the values, and how far they reach across the image."""

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
    """Compute softmax(scale * query keyᵀ + mask), (..., query, key) float32, which fused kernels do not return.

    Parameters
    ----------
    query, key : (..., head, token, unit), as `torch.nn.functional.scaled_dot_product_attention` takes them: after
        projection, normalisation and rotation. With grouped heads, the number of heads of `key` divides that of
        `query`.
    mask : broadcast to (..., query, key). A boolean mask is False where masked; any other is added.
    causal : each token attends to itself and to those before it.
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
    """Compute the pixels between the centres of the patches of a grid (y, x), row by row: (position, position) float64.

    `patch` is the height and width of a patch in pixels.
    """
    y, x = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    place = torch.stack([y.flatten() * patch[0], x.flatten() * patch[1]], 1)
    return (place[:, None] - place[None]).square().sum(-1).sqrt()


def mean_distance(weights: torch.Tensor, distance: torch.Tensor, special: int = 0) -> torch.Tensor:
    """Compute the distance over which patches attend, averaged over the attending patches: (image, head, 2) float64.

    Class and register tokens have no place in the image and are dropped on both sides. The first value uses the weights
    as they are, so that a weight on such a token counts as distance zero. The second renormalises each patch's weights
    to sum to 1 over the patches; it is NaN if a patch gives all its weight to other tokens.

    Parameters
    ----------
    weights : (image, head, query, key), tokens of the grid last.
    distance : (position, position), as `distances` returns it.
    special : number of tokens before those of the grid.
    """
    weights = weights[..., special:, special:].double()
    distance = distance.to(weights.device)
    far = (weights * distance).sum(-1)
    return torch.stack([far.mean(-1), (far / weights.sum(-1)).mean(-1)], -1)
