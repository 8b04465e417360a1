"""Whitening of each image, in float64 and at the edges."""

import numpy as np
import torch

from kernels.images.whiten import whiten


def test_against_numpy():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 9, 8)).astype(np.float64)
    deviation = np.maximum(images.std((1, 2, 3), keepdims=True), 1 / np.sqrt(images[0].size))
    expected = (images - images.mean((1, 2, 3), keepdims=True)) / deviation
    for memory in (torch.contiguous_format, torch.channels_last):
        found = whiten(torch.from_numpy(images).float().contiguous(memory_format=memory))
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_one_colour_becomes_nothing():
    assert whiten(torch.full((2, 3, 4, 4), 255.0)).abs().max() < 1e-3


def test_the_deviation_of_an_image_is_at_least_that_of_one_value_that_differs():
    images = torch.zeros(2, 3, 4, 4)
    images[:, 1, 2, 3] = torch.tensor([0.1, 100.0])
    found, mean = whiten(images), images.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found[0], (images - mean)[0] * 48**0.5)
    torch.testing.assert_close(found[1], (images - mean)[1] / images[1].std(correction=0))
