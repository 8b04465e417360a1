"""Follow attention through the blocks of a transformer."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def rollout(attention: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the product of (mean over heads + identity) / 2 over all blocks, (image, query, key).

    `attention` holds the weights of each block from the first to the last, (image, head, query, key), whose rows sum to
    1; so do those of the result. Abnar and Zuidema, "Quantifying attention flow in transformers" (ACL 2020), eq. 1.
    """
    return _product([(each.mean(1) + _identity(each)) / 2 for each in attention])


def relevance(attention: Sequence[torch.Tensor], gradient: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute R = (I + E(dS/dA ∘ A)+) R over all blocks, from the identity on, (image, query, key).

    E is the mean over heads, + the positive part before it. Chefer et al., "Generic attention-model explainability"
    (ICCV 2021), eqs. 5 and 6.
    """
    pairs = zip(attention, gradient, strict=True)
    return _product([_identity(a) + (g * a).clamp(min=0).mean(1) for a, g in pairs])


def _identity(attention: torch.Tensor) -> torch.Tensor:
    return torch.eye(attention.shape[-1], dtype=attention.dtype, device=attention.device)


def _product(steps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the product of each image, the last block leftmost.

    Images one by one, each in memory of its own: products of batches, and of matrices that begin at another offset from
    a cache line, round differently.
    """
    images = []
    for blocks in zip(*steps, strict=True):
        found = blocks[0].clone()
        for each in blocks[1:]:
            found = each.clone() @ found
        images.append(found)
    return torch.stack(images)
