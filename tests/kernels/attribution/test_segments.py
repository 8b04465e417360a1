"""Segments of images."""

import numpy as np
import pytest

from kernels.attribution import segments


@pytest.mark.parametrize(("size", "cells"), [((8, 8), (2, 4)), ((7, 5), (3, 2)), ((16, 16), (16, 16))])
def test_cells_of_a_grid_are_as_equal_as_pixels_allow(size, cells):
    found = segments.grid(size, cells)
    assert found.shape == size and found[0, 0] == 0 and found[-1, -1] == cells[0] * cells[1] - 1
    heights, widths = np.bincount(found[:, 0] // cells[1]), np.bincount(found[0])
    assert len(heights) == cells[0] and len(widths) == cells[1] and np.ptp(heights) <= 1 and np.ptp(widths) <= 1
    for row in range(cells[0]):
        for column in range(cells[1]):
            y, x = np.nonzero(found == row * cells[1] + column)
            assert len(y) == (np.ptp(y) + 1) * (np.ptp(x) + 1)


def test_more_cells_than_pixels_are_refused():
    with pytest.raises(ValueError, match="9 x 2 cells for 8 x 8 pixels"):
        segments.grid((8, 8), (9, 2))


def test_labels_are_segments_and_the_smallest_join_the_rest():
    labels = np.array([[0, 7, 7, 7], [3, 3, 7, 9], [3, 3, 5, 5]])
    found, numbers = segments.labelled(labels, 6)
    assert numbers.tolist() == [3, 5, 7, 9, 0]
    np.testing.assert_array_equal(numbers[found], labels)
    found, numbers = segments.labelled(labels, 3)
    assert numbers.tolist() == [3, 7, 0]
    np.testing.assert_array_equal(numbers[found], np.where(np.isin(labels, [3, 7]), labels, 0))
    found, numbers = segments.labelled(np.where(labels, labels, 3), 4)
    assert numbers.tolist() == [3, 5, 7, 9] and found.max() == 3
    for whole in (np.zeros((2, 2), int), np.full((2, 2), 4)):
        found, numbers = segments.labelled(whole, 5)
        assert numbers.tolist() == [whole[0, 0]] and not found.any()
    found, numbers = segments.labelled(np.zeros((2, 2), np.uint16), 2)
    assert numbers.tolist() == [0] and not found.any()


def test_a_label_map_is_enlarged_to_the_nearest_place():
    labels = np.array([[1, 2], [3, 4]])
    assert segments.enlarged(labels, (4, 4)).tolist() == [[1, 1, 2, 2]] * 2 + [[3, 3, 4, 4]] * 2
    np.testing.assert_array_equal(segments.enlarged(labels, (2, 2)), labels)
    assert segments.enlarged(np.arange(16).reshape(4, 4), (2, 2)).tolist() == [[5, 7], [13, 15]]


def test_the_smallest_segment_joins_the_neighbour_with_the_longest_border():
    found = segments.joined(np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 3, 3, 3]]), 3)
    assert found.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 2, 2, 2]]
    found = segments.joined(np.array([[0, 0, 1, 1], [0, 0, 1, 1], [2, 3, 3, 3]]), 2)
    assert found.max() == 1
    assert segments.joined(np.arange(4).reshape(2, 2), 1).max() == 0


def test_the_bin_of_a_colour_is_that_of_its_mean():
    pixels = np.zeros((3, 2, 4))
    pixels[0, :, 2:] = 1.0
    pixels[2, :, :2] = [[0.4, 0.6], [0.4, 0.6]]
    parts = np.array([[0, 0, 1, 1], [0, 0, 1, 1]])
    assert segments.colours(pixels, parts).tolist() == [2, 3 * 16]


def smooth(seed=0, size=(40, 48)):
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]] / 10
    return np.stack([(np.sin(y * a + x * b + c) + 1) / 2 for a, b, c in random.normal(size=(3, 3))])


@pytest.mark.parametrize("count", [2, 12, 50])
def test_superpixels_are_no_more_than_wanted_and_the_same_again(count):
    pytest.importorskip("skimage", reason="scikit-image, the extra `segments`, is not installed")
    pixels = smooth()
    found = segments.slic(pixels, count, 10.0, 1.0)
    assert found.shape == (40, 48) and found.dtype == np.int64
    assert found.min() == 0 and len(np.unique(found)) == found.max() + 1 <= count
    assert count < 12 or found.max() + 1 > count / 3
    np.testing.assert_array_equal(segments.slic(pixels, count, 10.0, 1.0), found)


def test_superpixels_of_odd_images():
    pytest.importorskip("skimage", reason="scikit-image, the extra `segments`, is not installed")
    for pixels in (np.zeros((3, 20, 20)), np.ones((1, 9, 30)), np.random.default_rng(0).random((3, 32, 32))):
        found = segments.slic(pixels, 20, 10.0, 1.0)
        assert 1 <= len(np.unique(found)) == found.max() + 1 <= 20
