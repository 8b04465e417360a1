"""Class activation maps: weigh the units of a layer by what they mean to a class, and add them.

All functions take a layer's output A and the gradient dS/dA of a score, both (image, unit, y, x), and return a raw,
signed map (image, y, x) in their dtype.
"""

from __future__ import annotations

import torch


def cam(activation: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Compute sum_k w_k A_k with the weights of a linear head, (image, unit): Zhou et al. (CVPR 2016), eq. 2.

    Products and a sum, no matrix product: that of a batch rounds differently at different places.
    """
    return (weight[:, :, None, None] * activation).sum(1)


def grad_cam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute sum_k mean(dS/dA_k) A_k: Selvaraju et al., "Grad-CAM" (ICCV 2017), eqs. 1 and 2 before the ReLU."""
    return cam(activation, gradient.mean((2, 3)))


def hires_cam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute sum_k dS/dA_k A_k by position: Draelos and Carin, "HiResCAM" (2020), eq. 3."""
    return (gradient * activation).sum(1)


def layer_cam(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute sum_k max(dS/dA_k, 0) A_k by position: Jiang et al., "LayerCAM" (TIP 2021), eq. 5 before the ReLU."""
    return (gradient.relu() * activation).sum(1)


def grad_cam_pp(activation: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Compute the map of Grad-CAM++ before its ReLU: Chattopadhay et al. (WACV 2018), eqs. 19 and 5.

    The weight of a position is alpha = g^2 / (2 g^2 + g^3 sum A), which for the exponential of a score holds exactly.
    It is computed as 1 / (2 + g sum A), the same where g is not 0: powers of a small gradient would vanish. Where the
    denominator is 0, alpha is 0. Units are weighed by sum(alpha max(g, 0)).
    """
    below = 2 + gradient * activation.sum((2, 3), keepdim=True)
    alpha = torch.where(below != 0, 1 / torch.where(below != 0, below, torch.ones_like(below)), 0 * below)
    return cam(activation, (alpha * gradient.relu()).sum((2, 3)))
