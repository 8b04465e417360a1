"""p-norm pooling of magnitudes: from their sum at p = 1 to their maximum at p = infinity.

s(f)(u) = (sum over the window |f|^p)^(1/p) (Springenberg et al., "Striving for simplicity: the all convolutional net",
ICLR workshop 2015, equation 1, with abs f). At p = 1 it is the depth-wise convolution of abs f whose weights are all 1,
as p goes to infinity the max pooling of abs f. torch's `lp_pool2d` leaves the abs out: it is negative or NaN for odd
p and negative f.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def p_norm_pool(values: torch.Tensor, p: float | torch.Tensor, window: int, stride: int) -> torch.Tensor:
    """Return the p-norm over odd windows of maps (image, unit, y, x), with zeros around them: size ceil(size / stride).

    Parameters
    ----------
    p : from 1 on; infinity for the maximum; a tensor to learn it.
    window : side, odd. stride : of the windows' centres.

    Raises
    ------
    ValueError
        An even window, or p below 1, which is no norm.
    """
    if window % 2 == 0:
        raise ValueError(f"window {window}: expected an odd one, which has a centre")
    if not isinstance(p, torch.Tensor) and not p >= 1:
        raise ValueError(f"p {p}: expected 1 or more: below it is no norm")
    size, half = values.abs(), window // 2
    largest = functional.max_pool2d(size, window, stride, half)
    if not isinstance(p, torch.Tensor) and math.isinf(p):
        return largest
    # Relative to the largest of each window, no power overflows or vanishes as a whole.
    spread = functional.unfold(functional.pad(size, (half, half, half, half)), window, stride=stride)
    shares = spread.reshape(len(values), values.shape[1], window * window, *largest.shape[2:])
    safe = largest.clamp_min(torch.finfo(values.dtype).tiny)[:, :, None]
    total = (shares / safe).pow(p).sum(2).clamp_min(1.0)  # it is 1 at least, but in a window of zeros
    return largest * total.pow(1 / p)
