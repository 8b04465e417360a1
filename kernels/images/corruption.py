"""Corrupt labelled images, from true labels to pure noise, to measure how easily a network fits them.

After Zhang et al., "Understanding deep learning requires rethinking generalization" (ICLR 2017), section 2. Every draw
comes from a generator that the caller seeds: the same seed gives the same data, bit for bit.
"""

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Generator = np.random.Generator

BLOCK = 4096  # images whose random numbers are held at once


def corrupted_labels(labels: Labels, classes: int, share: float, draw: Generator) -> Labels:
    """Replace each label (image), with probability `share`, by a label drawn evenly from all classes.

    A replacement may be the true label again, as in the paper: with `share` 1 all labels are random, and one in
    `classes` is right by chance.

    Raises
    ------
    ValueError
        If the share is outside [0, 1], if there are fewer than two classes, or if a label is not one of them.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of corrupted labels is {share}, expected a number from 0 to 1")
    if classes < 2:
        raise ValueError(f"labels of {classes} class cannot be corrupted: at least two classes are needed")
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise ValueError(f"labels go from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
    # Both are drawn for every image, so that a larger share replaces the same labels and more.
    replaced = draw.random(len(labels)) < share
    return np.where(replaced, draw.integers(0, classes, len(labels)), labels)


def shuffled(images: Pixels, draw: Generator) -> Pixels:
    """Move the pixels of all images (image, channel, y, x) by one permutation; the channels of a pixel stay together.

    Two calls shuffle images alike if their generators are in the same state.
    """
    flat = images.reshape(*images.shape[:2], -1)
    return np.ascontiguousarray(flat[..., draw.permutation(flat.shape[2])]).reshape(images.shape)


def shuffled_each(images: Pixels, draw: Generator) -> Pixels:
    """Move the pixels of each image (image, channel, y, x) by its own permutation."""
    found = np.empty_like(images)
    count, channels, height, width = images.shape
    for at in range(0, count, BLOCK):
        block = images[at : at + BLOCK].reshape(-1, channels, height * width)
        places = draw.permuted(np.tile(np.arange(height * width), (len(block), 1)), axis=1)
        found[at : at + BLOCK] = np.take_along_axis(block, places[:, None], 2).reshape(-1, channels, height, width)
    return found


def moments(images: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute the mean and standard deviation (channel) over all pixels, exactly, from counts of the 256 values."""
    values = np.arange(256.0)
    counts = np.stack([np.bincount(images[:, at].ravel(), minlength=256) for at in range(images.shape[1])])
    mean = counts @ values / counts.sum(1)
    return mean, np.sqrt(np.maximum(counts @ values**2 / counts.sum(1) - mean**2, 0))


def gaussian(
    shape: tuple[int, ...], mean: NDArray[np.float64], deviation: NDArray[np.float64], draw: Generator
) -> Pixels:
    """Draw images (image, channel, y, x) of independent Gaussian pixels with this mean and deviation (channel).

    Pixels are rounded to whole numbers and clipped to 0 and 255, since an image has no other values.
    """
    found = np.empty(shape, np.uint8)
    for at in range(0, shape[0], BLOCK):
        block = found[at : at + BLOCK]
        noise = draw.standard_normal(block.shape, np.float32)
        noise = noise * deviation[:, None, None].astype(np.float32) + mean[:, None, None].astype(np.float32)
        block[:] = np.clip(np.rint(noise), 0, 255)
    return found
