"""Erase the pixels that speak for one class and against another, and measure what that does to their log-odds.

Shrikumar et al., "Learning important features through propagating activation differences" (ICML 2017), section 4.1.
"""

from __future__ import annotations

import torch

SHARE = 0.2  # of the pixels: 157 of 28 x 28


def erased(
    inputs: torch.Tensor, reference: torch.Tensor, difference: torch.Tensor, share: float = SHARE
) -> torch.Tensor:
    """Return the inputs with the pixels of the largest positive differences set to the reference.

    At most a share of the pixels, rounded to the nearest, is erased; pixels whose difference is not above 0 stay. Of
    equal ones the first go.

    Parameters
    ----------
    inputs, reference : (image, channel, y, x), the reference of any shape that is broadcast to it.
    difference : (image, y, x), what a pixel contributes to the one class less what it contributes to the other.
    """
    flat = difference.flatten(1)
    count = round(share * flat.shape[1])
    order = flat.sort(dim=1, descending=True, stable=True).indices[:, :count]
    chosen = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, True) & (flat > 0)
    return torch.where(chosen.view(difference.shape)[:, None], reference, inputs)


def change_of_log_odds(
    before: torch.Tensor, after: torch.Tensor, of: torch.Tensor, against: torch.Tensor
) -> torch.Tensor:
    """Return by how much the log-odds of one class against another fall, (image,).

    The log-odds of two classes under softmax are the difference of their logits.

    Parameters
    ----------
    before, after : logits (image, class). of, against : int64 (image,), classes.
    """

    def odds(logits: torch.Tensor) -> torch.Tensor:
        return (logits.gather(1, of[:, None]) - logits.gather(1, against[:, None]))[:, 0]

    return odds(before) - odds(after)
