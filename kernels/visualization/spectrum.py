"""Images with a given magnitude spectrum, of which only the phase is free.

Fel et al., "Unlocking feature visualization for deep networks with magnitude constrained optimization" (MACO, NeurIPS
2023), section 4: x = F^-1(r exp(i phi)), with r the mean magnitude spectrum of images.
"""

from __future__ import annotations

import torch


def image_of(phase: torch.Tensor, magnitude: torch.Tensor, width: int) -> torch.Tensor:
    """Return images (image, channel, y, x) with this magnitude spectrum, (channel, ky, kx), orthonormal.

    `phase` (image, channel, ky, kx) is in radians, for half of the columns, as `rfft2` gives them. In the first column,
    and in the last one of an even width, a frequency and its negative both stand: their phases count as opposite, and
    frequencies that are their own negative have the phase 0. So the magnitudes of the image are those given.
    """
    opposed = torch.cat([phase[:, :, :1], phase[:, :, 1:].flip(2)], 2)
    odd = 0.5 * (phase - opposed)
    columns = torch.arange(phase.shape[3], device=phase.device)
    double = (columns == 0) | ((columns == width // 2) & (width % 2 == 0))
    angle = torch.where(double, odd, phase)
    made = torch.polar(magnitude.expand_as(angle), angle)
    return torch.fft.irfft2(made, s=(phase.shape[2], width), norm="ortho")
