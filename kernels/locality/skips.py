"""Measure residual additions: how much of the sum is passed on unchanged, compared with what the branch adds."""

from __future__ import annotations

import torch


def norm_ratio(skip: torch.Tensor, branch: torch.Tensor, dim: int) -> torch.Tensor:
    """Compute ||z|| / ||f(z)|| along the units `dim`, float64; NaN where f(z) is zero.

    Raghu et al., "Do vision transformers see like convolutional neural networks?" (NeurIPS 2021), section 5.
    """
    above, below = (torch.linalg.vector_norm(each, dim=dim, dtype=torch.float64) for each in (skip, branch))
    return torch.where(below > 0, above / below, torch.nan)
