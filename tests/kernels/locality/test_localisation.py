"""Positions against patches: HSIC1 by plain loops, and the parts that images are cut into."""

import numpy as np
import pytest
import torch

from kernels.locality.localisation import bounds, patches, position_cka, position_hsic, position_vectors


def plain_hsic1(x, y):
    n = len(x)
    k, m = ((z - z.mean(0)) @ (z - z.mean(0)).T for z in (x, y))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    total = np.trace(k @ m) + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 * (k @ m).sum() / (n - 2)
    return total / (n * (n - 3))


def test_every_pair_of_positions():
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(3, 9, 5)) + 1000  # position, image, unit
    inputs = rng.normal(size=(4, 9, 7))
    vectors = [position_vectors([torch.from_numpy(each).float() for each in part]) for part in (outputs, inputs)]
    cross, own, other = position_hsic(*vectors)
    rounded = [part.astype(np.float32).astype(np.float64) for part in (outputs, inputs)]
    for a, x in enumerate(rounded[0]):
        assert own[a] == pytest.approx(plain_hsic1(x, x), rel=1e-5)
        for b, y in enumerate(rounded[1]):
            assert cross[a, b] == pytest.approx(plain_hsic1(x, y), abs=1e-5)
            expected = plain_hsic1(x, y) / np.sqrt(plain_hsic1(x, x) * plain_hsic1(y, y))
            assert position_cka(cross, own, other)[a, b] == pytest.approx(expected, abs=1e-6)


def test_a_position_that_never_changes():
    torch.manual_seed(0)
    vectors = position_vectors([torch.ones(6, 3), torch.randn(6, 3)])
    found = position_cka(*position_hsic(vectors, vectors))
    assert np.isnan(found[0]).all() and np.isnan(found[:, 0]).all()
    assert found[1, 1] == pytest.approx(1)


def test_patches_cover_the_image_once():
    images = torch.arange(2 * 3 * 6 * 7).reshape(2, 3, 6, 7).float()
    found = patches(images, (3, 3))
    assert len(found) == 9 and torch.cat(found, 1).sort(1).values.equal(images.flatten(1))
    torch.testing.assert_close(found[1], images[:, :, :2, 2:5].flatten(1))


@pytest.mark.parametrize(("size", "cells"), [(32, 8), (224, 7), (10, 3), (5, 5), (13, 1)])
def test_bounds(size, cells):
    found = bounds(size, cells)
    assert len(found) == cells and found[0][0] == 0 and found[-1][1] == size
    lengths = [stop - start for start, stop in found]
    assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
    with pytest.raises(ValueError, match="6 cells along 5 pixels"):
        bounds(5, 6)
