"""Turn colour images into grey ones, for networks of one channel."""

from __future__ import annotations

import torch


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Compute the luma of red, green and blue: uint8 (image, 3, y, x) -> uint8 (image, 1, y, x), on the same device.

    The weights are those of ITU-R BT.601 in 1/65536, rounded to the nearest, in integers. This is what Pillow's mode
    `L` computes, with which most networks of grey images were trained. A grey image stays exactly as it is.
    """
    red, green, blue = pixels.to(torch.int32).split(1, 1)
    return ((19595 * red + 38470 * green + 7471 * blue + 32768) >> 16).to(torch.uint8)
