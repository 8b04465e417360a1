"""Whitening of images, each by its own mean and standard deviation."""

import torch
from torch import Tensor


def whiten(images: Tensor) -> Tensor:
    """(image, channel, y, x) of values 0 to 255, float -> each with mean 0 and variance 1 over all its values.

    The standard deviation is taken to be at least 1 / sqrt(values of an image), so that an image of one colour becomes
    0. As in Zhang et al., "Understanding deep learning requires rethinking generalization" (ICLR 2017), section 2,
    whose `per_image_whitening` this is.
    """
    return whitened(images, *statistics(images))


def statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Factor and offset (image) that whiten each image: x * factor + offset."""
    flat = images.flatten(1)
    mean = flat.mean(1)
    # In two passes: one in which mean and variance are found together (`torch.var_mean`) takes ten times as long.
    deviation = torch.linalg.vector_norm(flat - mean[:, None], dim=1) * flat.shape[1] ** -0.5
    factor = deviation.clamp_min(flat.shape[1] ** -0.5).reciprocal()
    return factor, -mean * factor


def whitened(images: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """(image, ...) float by what `statistics` found of each."""
    shape = (-1, *[1] * (images.ndim - 1))
    return torch.addcmul(offset.view(shape), images, factor.view(shape))
