"""Gram matrices of a layer's outputs: what linear CKA and its relatives are made from, whatever the layer's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

FEATURES = 4096  # of one product in float32, which stay in the cache: more lose digits and time
SAFE = 2.0**-60, 2.0**100  # squared lengths whose products neither vanish nor overflow in float32
FAR = 8  # squared distance of the first image from the mean over that of the median image, above which it is an outlier


def gram(output: torch.Tensor) -> torch.Tensor:
    """The Gram matrix X Xᵀ of the images of a minibatch, (image, image) float64 on the output's device.

    X is (image, feature): the output, flattened, minus its mean over the images. What is subtracted in float32 is the
    first image, exactly so for a feature whose mean is much larger than its spread, and without a pass over the output
    to find the mean; products of 4096 features each are made in float32 and added in float64, where the matrix is
    centred. Where the first image is an outlier, whose length would take digits from all products, it is done again
    with the image nearest to the mean. The matrix of a layer that gives the same for every image is exactly zero.

    Parameters
    ----------
    output : (image, ...), any number of features, in any memory format; it may be overwritten afterwards.
    """
    exponent = 0
    found = _product(output, exponent, 0)
    if not SAFE[0] <= float(found.diagonal().amax()) <= SAFE[1]:
        # Squares of very small or very large values: once more, divided by a power of two, which changes no digit.
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
    """The Gram matrix of the output over 2 to the exponent, from one of its images."""
    n = len(output)
    found = torch.zeros((n, n), dtype=torch.float64, device=output.device)
    # Memory of their own: new one for each part would be asked of the system, and cost a tenth of the time.
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
    """HKH with H = I - 11ᵀ / n: the Gram matrix from the mean, whatever it was from."""
    mean = found.mean(0)
    mean -= mean.mean() / 2
    return found - (mean + mean[:, None])


def _parts(output: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views (image, ...) of at most `FEATURES` features each, which together are the output."""
    inner = output[0, 0].numel()
    if inner > FEATURES:
        for one in output.unbind(1):
            yield from _parts(one)
    else:
        yield from output.split(max(1, FEATURES // max(1, inner)), dim=1)


def _in_memory_order(output: torch.Tensor) -> torch.Tensor:
    """(image, feature, ...), the features in the order of the memory, as good as any other and the fastest."""
    if output.ndim == 1:
        return output[:, None]
    strides = output.stride()
    return output.permute(0, *sorted(range(1, output.ndim), key=lambda dim: -strides[dim]))
