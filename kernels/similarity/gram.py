"""Compute Gram matrices of a layer's outputs, the input of linear CKA and its relatives, whatever the layer's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

FEATURES = 4096  # per product in float32; they stay in cache, and more would lose digits and time
SAFE = 2.0**-60, 2.0**100  # squared lengths whose products neither vanish nor overflow in float32
FAR = 8  # squared distance of the first image from the mean over that of the median image, above which it is an outlier


def gram(output: torch.Tensor) -> torch.Tensor:
    """Compute the Gram matrix X Xᵀ of the images of a minibatch, (image, image) float64 on the output's device.

    X is (image, feature): the output, flattened, minus its mean over the images. In float32 the first image is
    subtracted instead of the mean. This is exact for a feature whose mean is much larger than its spread, and it needs
    no pass over the output to find the mean. Products of 4096 features each are computed in float32 and added in
    float64, where the matrix is centred. If the first image is an outlier, its length would cost all products digits,
    so the product is computed again with the image nearest to the mean. The matrix of a layer that gives the same
    output for every image is exactly zero.

    Parameters
    ----------
    output : (image, ...), any number of features, in any memory format; it may be overwritten afterwards.
    """
    exponent = 0
    found = _product(output, exponent, 0)
    if not SAFE[0] <= float(found.diagonal().amax()) <= SAFE[1]:
        # The squares are too small or too large: repeat with values over a power of two, which changes no digit.
        size = float(output.abs().amax())
        if not math.isfinite(size):
            return found
        exponent = math.frexp(size)[1]
        found = _product(output, exponent, 0)
    distance, found = float(found.mean()), _centred(found)
    if distance > FAR * float(found.diagonal().median()):
        found = _centred(_product(output, exponent, int(found.diagonal().argmin())))
    return torch.ldexp(found, torch.tensor(2 * exponent, device=found.device))


def _product(output: torch.Tensor, exponent: int, origin: int) -> torch.Tensor:
    """Compute the Gram matrix of the output over 2 to the exponent, relative to one of its images."""
    n = len(output)
    found = torch.zeros((n, n), dtype=torch.float64, device=output.device)
    # The parts share a buffer: allocating memory for each would cost a tenth of the time.
    room = found.new_empty(n * FEATURES, dtype=torch.float32)
    product = room.new_empty((n, n))
    for part in _parts(_in_memory_order(output)):
        part = part.float()
        if exponent:
            part = part * 2.0**-exponent
        rows = room[: part.numel()].view(part.shape)
        rows = torch.sub(part, part[origin : origin + 1], out=rows).view(n, -1)
        found += torch.mm(rows, rows.T, out=product)
    return found


def _centred(found: torch.Tensor) -> torch.Tensor:
    """Compute HKH with H = I - 11ᵀ / n: the Gram matrix relative to the mean, whatever its origin was."""
    mean = found.mean(0)
    mean -= mean.mean() / 2
    return found - (mean + mean[:, None])


def _parts(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield views (image, ...) of at most `FEATURES` features each, which together are the output."""
    inner = output[0, 0].numel()
    if inner > FEATURES:
        for one in output.unbind(1):
            yield from _parts(one)
    else:
        yield from output.split(max(1, FEATURES // max(1, inner)), dim=1)


def _in_memory_order(output: torch.Tensor) -> torch.Tensor:
    """Return (image, feature, ...) with the features in memory order: as good as any other order, and the fastest."""
    if output.ndim == 1:
        return output[:, None]
    strides = output.stride()
    return output.permute(0, *sorted(range(1, output.ndim), key=lambda dim: -strides[dim]))
