"""Grey of colours, against Pillow."""

import numpy as np
import torch
from PIL import Image

from kernels.images.grey import grey


def test_every_level_of_grey_stays():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(grey(levels.expand(2, 3, 16, 16)), levels.expand(2, 1, 16, 16))


def test_colours_are_those_of_pillow():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 64, 64, 3), np.uint8)
    pixels[0, :8, :8] = np.array(np.meshgrid([0, 255], [0, 255], [0, 255])).T.reshape(-1, 1, 3).repeat(8, 1)
    expected = np.stack([np.asarray(Image.fromarray(each).convert("L")) for each in pixels])
    found = grey(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy()[:, 0], expected)
