"""Spatial localisation: how alike what a layer holds at a position is to what the image shows at each."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.similarity.cka import Floats, centred, pack
from kernels.similarity.gram import gram


def bounds(size: int, cells: int) -> list[tuple[int, int]]:
    """The rows of pixels that belong to each of `cells` rows of a grid: equal parts, but for rounding.

    Raises
    ------
    ValueError
        More cells than pixels.
    """
    if cells > size:
        raise ValueError(f"{cells} cells along {size} pixels")
    edges = [round(cell * size / cells) for cell in range(cells + 1)]
    return list(pairwise(edges))


def patches(images: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """The patches (image, value) of images (image, channel, y, x) below each cell of a grid (y, x), row by row."""
    rows, columns = (bounds(size, cells) for size, cells in zip(images.shape[2:], grid, strict=True))
    return [images[:, :, top:bottom, left:right].flatten(1) for top, bottom in rows for left, right in columns]


def position_vectors(positions: list[torch.Tensor]) -> Floats:
    """(position, pair): vectors whose scalar products are HSIC1 of the features (image, feature) at two positions."""
    return centred(np.stack([pack(gram(each.flatten(1)).cpu().numpy()) for each in positions]), "unbiased")


def position_hsic(outputs: Floats, inputs: Floats) -> tuple[Floats, Floats, Floats]:
    """HSIC1 of each output position with each input position (output, input), and of both with themselves."""
    return outputs @ inputs.T, np.einsum("op,op->o", outputs, outputs), np.einsum("ip,ip->i", inputs, inputs)


def position_cka(cross: NDArray, outputs: NDArray, inputs: NDArray) -> Floats:
    """CKA (output, input) from HSIC1 averaged over minibatches; NaN where a position is the same for all images."""
    length = [np.sqrt(np.where(own > 0, own, np.nan)) for own in (outputs, inputs)]
    return cross / (length[0][:, None] * length[1])
