"""Whiten images, each by its own mean and standard deviation."""

import torch
from torch import Tensor


def whiten(images: Tensor) -> Tensor:
    """Give each image (image, channel, y, x), float of values 0 to 255, mean 0 and variance 1 over all its values.

    The standard deviation is taken to be at least 1 / sqrt(values of an image), so an image of one colour becomes 0.
    This is `per_image_whitening` of Zhang et al., "Understanding deep learning requires rethinking generalization"
    (ICLR 2017), section 2.
    """
    return whitened(images, *statistics(images))


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the factor and offset (image) that whiten each image: x * factor + offset."""
    flat = images.flatten(1)
    mean = flat.mean(1)
    # Two passes, because finding mean and variance in one (`torch.var_mean`) takes ten times as long.
    deviation = torch.linalg.vector_norm(flat - mean[:, None], dim=1) * flat.shape[1] ** -0.5
    factor = deviation.clamp_min(flat.shape[1] ** -0.5).reciprocal()
    return factor, -mean * factor


def whitened(images: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """Apply the factors and offsets of `statistics` to images (image, ...) float."""
    shape = (-1, *[1] * (images.ndim - 1))
    return torch.addcmul(offset.view(shape), images, factor.view(shape))
