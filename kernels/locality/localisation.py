"""Measure spatial localisation: how similar a layer's features at one position are to the image at each position."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from kernels.similarity.cka import Floats, centred, pack
from kernels.similarity.gram import gram


def bounds(size: int, cells: int) -> list[tuple[int, int]]:
    """Return the rows of pixels that belong to each of `cells` rows of a grid, in equal parts up to rounding.

    Raises
    ------
    ValueError
        If there are more cells than pixels.
    """
    if cells > size:
        raise ValueError(f"{cells} cells along {size} pixels; expected at most one cell per pixel")
    edges = [round(cell * size / cells) for cell in range(cells + 1)]
    return list(pairwise(edges))


def patches(images: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """Cut images (image, channel, y, x) into patches (image, value), one per cell of a grid (y, x), row by row."""
    rows, columns = (bounds(size, cells) for size, cells in zip(images.shape[2:], grid, strict=True))
    return [images[:, :, top:bottom, left:right].flatten(1) for top, bottom in rows for left, right in columns]


def position_vectors(positions: list[torch.Tensor]) -> Floats:
    """Compute vectors (position, pair) whose scalar products are HSIC1 of two positions' features (image, feature)."""
    return centred(np.stack([pack(gram(each.flatten(1)).cpu().numpy()) for each in positions]), "unbiased")


def position_hsic(outputs: Floats, inputs: Floats) -> tuple[Floats, Floats, Floats]:
    """Compute HSIC1 of each output position with each input position, (output, input), and of both with themselves."""
    return outputs @ inputs.T, np.einsum("op,op->o", outputs, outputs), np.einsum("ip,ip->i", inputs, inputs)


def position_cka(cross: NDArray, outputs: NDArray, inputs: NDArray) -> Floats:
    """Compute CKA (output, input) from HSIC1 averaged over minibatches; NaN for a position that is constant."""
    length = [np.sqrt(np.where(own > 0, own, np.nan)) for own in (outputs, inputs)]
    return cross / (length[0][:, None] * length[1])
