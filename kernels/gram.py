"""Gram matrices of a layer's outputs: what linear CKA and its relatives are made from, whatever the layer's shape."""

from __future__ import annotations

import math

import torch

FEATURES = 1024  # of one product in float32, which stay in the cache: more lose digits and time
SAFE = 2.0**-60, 2.0**100  # squared lengths whose products neither vanish nor overflow in float32


def gram(output: torch.Tensor) -> torch.Tensor:
    """The Gram matrix X Xᵀ of the images of a minibatch, (image, image) float64 on the output's device.

    X is (image, feature): the output, flattened, minus its mean over the images. Products of 1024 features each are
    made in float32 and added in float64. The mean is subtracted in float32, exactly so for a feature whose mean is much
    larger than its spread; the mean's own rounding moves all images alike, which every later centring removes. The
    matrix of a layer that gives the same for every image is exactly zero.

    Parameters
    ----------
    output : (image, ...), any number of features, in any memory format; it may be overwritten afterwards.
    """
    rows = _rows(output)
    found = _product(rows, 1.0)
    largest = float(found.diagonal().amax())
    if SAFE[0] <= largest <= SAFE[1]:
        return found
    # Squares of very small or very large values: once more, divided by a power of two, which changes no digit.
    size = float(rows.abs().amax())
    if size == 0 or not math.isfinite(size):
        return found
    exponent = math.frexp(size)[1]
    return torch.ldexp(_product(rows, 2.0**-exponent), torch.tensor(2 * exponent, device=found.device))


def _product(rows: torch.Tensor, scale: float) -> torch.Tensor:
    found = torch.zeros((len(rows), len(rows)), dtype=torch.float64, device=rows.device)
    # Memory of their own: new one for each part would be asked of the system, and cost a tenth of the time.
    room = rows.new_empty((len(rows), min(FEATURES, rows.shape[1])), dtype=torch.float32)
    product = rows.new_empty(found.shape, dtype=torch.float32)
    constant = True
    for part in rows.split(FEATURES, dim=1):
        part = part.float()
        if scale != 1.0:
            part = part * scale
        # The mean of equal values need not be that value: whether they are equal is asked of themselves.
        constant = constant and bool((part == part[:1]).all())
        centred = torch.sub(part, part.mean(0), out=room[:, : part.shape[1]])
        found += torch.mm(centred, centred.T, out=product)
    return torch.zeros_like(found) if constant else found


def _rows(output: torch.Tensor) -> torch.Tensor:
    """(image, feature), the features in the order of the memory: a view where that can be, and the order is nothing."""
    strides = output.stride()
    dims = sorted(range(1, output.ndim), key=lambda dim: -strides[dim])
    return output.permute(0, *dims).reshape(len(output), -1)
