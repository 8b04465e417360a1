"""How likely an image is: penalties on its norm and its variation, and the Gaussian of a data set.

Each penalty comes with its gradient, so that it costs no graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray


def l2(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared norm of each image (image, ...), (image,), and its gradient 2 x."""
    return images.flatten(1).square().sum(1), 2 * images


def total_variation(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sum of squared differences of neighbours, (image,), of images (image, channel, y, x); its gradient.

    Mahendran and Vedaldi, "Understanding deep image representations by inverting them" (CVPR 2015), equation 6 with
    beta 2.
    """
    value = torch.zeros(len(images), dtype=images.dtype, device=images.device)
    gradient = torch.zeros_like(images)
    for axis in (2, 3):
        length = images.shape[axis] - 1
        step = images.diff(dim=axis)
        value = value + step.square().flatten(1).sum(1)
        gradient.narrow(axis, 1, length).add_(2 * step)
        gradient.narrow(axis, 0, length).sub_(2 * step)
    return value, gradient


@dataclass
class Spectrum:
    """Sums over images (channel, y, x) of one size, in float64, from which their mean and spectra follow.

    Attributes
    ----------
    images : how many. total : (channel, y, x) their sum.
    magnitude : (channel, ky, kx) sum of |F|, with F the orthonormal transform of real images, half of its columns.
    power : (channel, channel, ky, kx) complex, sum of F conj(F) of two channels.
    """

    images: int
    total: NDArray[np.float64]
    magnitude: NDArray[np.float64]
    power: NDArray[np.complex128]

    @staticmethod
    def of(images: NDArray) -> Spectrum:
        """Return the sums over some images (image, channel, y, x)."""
        values = np.asarray(images, np.float64)
        made = np.fft.rfft2(values, norm="ortho")
        power = np.einsum("ncyx,ndyx->cdyx", made, made.conj())
        return Spectrum(len(values), values.sum(0), np.abs(made).sum(0), power)

    def merge(self, other: Spectrum) -> Spectrum:
        """Return the sums over the images of both."""
        return Spectrum(
            self.images + other.images,
            self.total + other.total,
            self.magnitude + other.magnitude,
            self.power + other.power,
        )

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean image, (channel, y, x)."""
        return self.total / self.images

    @property
    def mean_magnitude(self) -> NDArray[np.float64]:
        """The mean of |F| over the images, (channel, ky, kx)."""
        return self.magnitude / self.images

    def covariance(self, ridge: float) -> NDArray[np.complex128]:
        """Return the covariance of the channels at each frequency, (ky, kx, channel, channel).

        That of images whose statistics do not depend on the place: a circulant covariance of pixels, which the Fourier
        transform makes block diagonal. `ridge` times the mean variance is added to the diagonal.
        """
        made = np.fft.rfft2(self.mean, norm="ortho")
        found = self.power / self.images - made[:, None] * made[None].conj()
        blocks = found.transpose(2, 3, 0, 1)
        channels = blocks.shape[-1]
        variance = float(np.trace(blocks, axis1=2, axis2=3).real.mean()) / channels
        return blocks + ridge * variance * np.eye(channels)


class Gaussian:
    """log p(x) up to a constant, of the Gaussian with a data set's mean image and stationary covariance.

    Parameters
    ----------
    mean : (channel, y, x). covariance : (ky, kx, channel, channel), as `Spectrum.covariance` returns it.
    """

    def __init__(self, mean: NDArray, covariance: NDArray, like: torch.Tensor) -> None:
        self.mean = torch.from_numpy(np.ascontiguousarray(mean)).to(like.device, like.dtype)
        inverse = np.linalg.inv(covariance).transpose(2, 3, 0, 1)
        self.precision = torch.from_numpy(np.ascontiguousarray(inverse)).to(like.device, like.dtype.to_complex())

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -1/2 (x - mean)' S^-1 (x - mean), (image,), and its gradient -S^-1 (x - mean)."""
        away = images - self.mean
        made = torch.fft.rfft2(away, norm="ortho")
        whitened = (self.precision[None] * made[:, None]).sum(2)
        pulled = torch.fft.irfft2(whitened, s=images.shape[2:], norm="ortho")
        return -0.5 * (away * pulled).flatten(1).sum(1), -pulled
