"""Corruptions of labels and images: their distributions, what stays, and that a seed decides them."""

import numpy as np
import pytest

from kernels.images.corruption import corrupted_labels, gaussian, moments, shuffled, shuffled_each


def draw(seed=0):
    return np.random.default_rng(seed)


def test_shares_of_labels():
    labels = np.arange(20_000) % 10
    for share in (0.0, 0.3, 1.0):
        found = corrupted_labels(labels, 10, share, draw())
        # One replacement in ten is the true label again.
        assert (found != labels).mean() == pytest.approx(share * 0.9, abs=0.01)
        assert np.bincount(found, minlength=10) / len(found) == pytest.approx(0.1, abs=0.01)
        np.testing.assert_array_equal(found, corrupted_labels(labels, 10, share, draw()))
    assert (corrupted_labels(labels, 10, 1.0, draw(1)) != corrupted_labels(labels, 10, 1.0, draw(2))).mean() > 0.8


def test_a_larger_share_replaces_the_same_labels_and_more():
    labels = np.zeros(5000, np.int64)
    few, many = (corrupted_labels(labels, 7, share, draw()) for share in (0.2, 0.6))
    assert ((few != 0) <= (many != 0)).all() and (few[few != 0] == many[few != 0]).all()


@pytest.mark.parametrize(
    ("share", "classes", "label", "message"),
    [
        (1.1, 3, 0, r"share of corrupted labels is 1.1, expected a number from 0 to 1"),
        (-0.1, 3, 0, r"is -0.1"),
        (float("nan"), 3, 0, r"is nan"),
        (0.5, 1, 0, r"labels of 1 class cannot be corrupted"),
        (0.5, 3, 3, r"labels go from 3 to 3, expected 0 to 2"),
        (0.5, 3, -1, r"labels go from -1 to -1"),
    ],
)
def test_what_is_refused(share, classes, label, message):
    with pytest.raises(ValueError, match=message):
        corrupted_labels(np.full(4, label), classes, share, draw())


def test_shuffled_pixels_are_moved_alike():
    images = draw().integers(0, 256, (6, 3, 5, 7), np.uint8)
    found = shuffled(images, draw(3))
    places = draw(3).permutation(35)
    for image, moved in zip(images, found, strict=True):
        for at, place in enumerate(places):
            assert (moved.reshape(3, -1)[:, at] == image.reshape(3, -1)[:, place]).all()
    np.testing.assert_array_equal(shuffled(images[4:], draw(3)), found[4:])


def test_random_pixels_are_moved_each_in_its_way(monkeypatch):
    monkeypatch.setattr("kernels.images.corruption.BLOCK", 4)
    positions = np.broadcast_to(np.arange(48, dtype=np.uint8).reshape(1, 1, 6, 8), (10, 3, 6, 8))
    found = shuffled_each(np.ascontiguousarray(positions), draw())
    assert (found == found[:, :1]).all(), "the channels of a pixel stay together"
    flat = found[:, 0].reshape(10, -1)
    assert (np.sort(flat, axis=1) == np.arange(48)).all()
    assert len({tuple(row) for row in flat.tolist()}) == 10


def test_gaussian_images_have_the_moments_of_the_data():
    images = np.clip(draw().normal([[[[120]], [[90]], [[130]]]], 30, (50, 3, 20, 20)), 0, 255).astype(np.uint8)
    mean, deviation = moments(images)
    np.testing.assert_allclose(mean, images.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(deviation, images.std((0, 2, 3)), rtol=1e-9)
    found = gaussian((60, 3, 20, 20), mean, deviation, draw(1))
    np.testing.assert_allclose(found.mean((0, 2, 3)), mean, atol=0.8)
    np.testing.assert_allclose(found.std((0, 2, 3)), deviation, rtol=0.02)
    flat = found.reshape(60, 3, -1).astype(float)
    assert abs(np.corrcoef(flat[:, 0, :-1].ravel(), flat[:, 0, 1:].ravel())[0, 1]) < 0.02
    # Out of range is cut off.
    assert gaussian((4, 1, 9, 9), np.array([250.0]), np.array([60.0]), draw()).max() == 255
