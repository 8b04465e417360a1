"""Pictures of attacks: the image before and after, the change, and how the maps of important units change."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from pipeline.report.pictures import montage, picture

TILE = 112
"""Longer side of a picture, in pixels."""
GREY = (160, 160, 160)
UP, DOWN = np.array([180.0, 40.0, 20.0]), np.array([20.0, 90.0, 190.0])
"""Colours of what rises and falls in a map."""


def strip(image: np.ndarray, attacked: np.ndarray, changes: Sequence[np.ndarray]) -> Image.Image:
    """Put side by side: an image, the attacked one, their difference, and maps of change.

    Parameters
    ----------
    image, attacked : uint8 (channel, y, x). changes : (y, x) each, NaN where there is no unit.
    """
    size = scaled(image.shape[1], image.shape[2])
    tiles = [picture(image), picture(attacked), difference(image, attacked), *(map_of(each) for each in changes)]
    return montage([tile.resize(size, Image.Resampling.NEAREST) for tile in tiles])


def scaled(height: int, width: int) -> tuple[int, int]:
    """Return (width, height) of a picture whose longer side is `TILE`."""
    factor = TILE / max(height, width)
    return max(1, round(width * factor)), max(1, round(height * factor))


def difference(image: np.ndarray, attacked: np.ndarray) -> Image.Image:
    """Draw the change of every channel about middle grey, its largest magnitude as black or white."""
    delta = attacked.astype(np.float64) - image
    most = np.abs(delta).max()
    return picture(np.rint(127.5 + 127.5 * delta / (most if most else 1)).astype(np.uint8))


def map_of(change: np.ndarray) -> Image.Image:
    """Draw a map of change: what rises is red, what falls blue, its largest magnitude at full colour."""
    if np.isnan(change).all():
        return Image.new("RGB", (change.shape[1], change.shape[0]), GREY)
    most = np.abs(change).max()
    share = (change / most if most else change)[..., None]
    colour = np.where(share > 0, UP, DOWN)
    return Image.fromarray(np.rint(245 + (colour - 245) * np.abs(share)).astype(np.uint8))
