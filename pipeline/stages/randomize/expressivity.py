"""The theorem's network on an experiment's own images: 2n + d weights give any labels to n images of d values.

Theorem 1 and lemma 1 of Zhang et al. (2017). The network is written down and not trained: that it fits a sample says
nothing of what it has learnt.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.expressivity import interpolate, smallest_eigenvalue
from kernels.images.corruption import corrupted_labels
from pipeline.networks.training.repeatable import stream
from pipeline.stages.randomize.results import Expressivity, Fit
from pipeline.stages.randomize.runs import LABELS

IMAGES = 50_000  # at most, which the kernel takes in a tenth of a second
VALUES = 1 << 24  # of all images together at most: 128 MB


@dataclass(frozen=True)
class Built:
    """What the theorem's network comes to, and the seconds that it takes, by the labels that it gives."""

    found: Expressivity
    seconds: dict[str, float]


def build(images: NDArray[np.uint8], labels: NDArray[np.int64], classes: int, crop: int) -> Built:
    """Write down the network for the centres of the first images, with their labels and with random ones.

    Random labels are those of a run with `random_labels` and seed 0. Of images that are equal, the first counts: the
    theorem asks for different ones.

    Raises
    ------
    ValueError
        No direction tells the images apart.
    """
    random = corrupted_labels(labels, classes, 1.0, stream(0, LABELS, 0))
    rows, inputs = different(centres(images, crop))
    fits, seconds = [], {}
    for name, own in (("true labels", labels[rows]), ("random labels", random[rows])):
        began = time.perf_counter()
        network = interpolate(inputs, own.astype(np.float64))
        error = float(np.abs(network(inputs) - own).max())
        seconds[name] = time.perf_counter() - began
        fits.append(Fit(labels=name, largest_error=error))
    eigenvalue = smallest_eigenvalue(np.sort(inputs @ network.direction), network.bias)
    found = Expressivity(
        images=len(inputs),
        values=inputs.shape[1],
        weights=network.weights,
        smallest_eigenvalue=eigenvalue,
        fits=tuple(fits),
    )
    return Built(found, seconds)


def centres(images: NDArray[np.uint8], crop: int) -> NDArray[np.uint8]:
    """Return what networks see of the first images, (image, value), as many as are bounded."""
    top, left = ((length - crop) // 2 for length in images.shape[-2:])
    count = min(len(images), IMAGES, VALUES // (images.shape[1] * crop**2))
    return images[:count, :, top : top + crop, left : left + crop].reshape(count, -1)


def different(images: NDArray[np.uint8]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return the rows of the first of each different image, and these images with values from 0 to 1."""
    first: dict[bytes, int] = {}
    for row, image in enumerate(images):
        first.setdefault(image.tobytes(), row)
    rows = np.array(list(first.values()))
    return rows, images[rows] / 255.0
