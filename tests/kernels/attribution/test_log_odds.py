"""Erasing pixels by their contributions, against a loop over pixels."""

import math

import pytest
import torch

from kernels.attribution.log_odds import change_of_log_odds, erased


def by_loop(image, reference, difference, count):
    """Erase one pixel after the other, the largest difference first."""
    image, left = image.clone(), difference.clone()
    for _ in range(count):
        at = int(left.argmax())
        y, x = divmod(at, left.shape[1])
        if left[y, x] <= 0:
            break
        image[:, y, x] = reference[:, y, x]
        left[y, x] = -math.inf
    return image


@pytest.mark.parametrize("share", [0.2, 0.05, 1.0, 0.0])
def test_erased_pixels_are_those_of_a_loop(share):
    generator = torch.Generator().manual_seed(0)
    images, reference = torch.randn(2, 6, 2, 7, 9, generator=generator)
    difference = torch.randint(-4, 5, (6, 7, 9), generator=generator).float()
    difference[1] = -1
    difference[2] = difference[2].clamp(max=0)
    difference[2, 3, 4] = 2
    found = erased(images, reference, difference, share)
    for image, own, each, made in zip(images, reference, difference, found, strict=True):
        assert torch.equal(made, by_loop(image, own, each, round(share * 63)))


def test_a_fifth_of_a_digit_is_157_pixels():
    difference = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0)) + 0.1
    assert int((erased(torch.ones(1, 1, 28, 28), torch.zeros(1), difference) == 0).sum()) == 157


def test_log_odds_are_those_of_the_probabilities():
    before, after = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    of, against = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 0, 2])
    found = change_of_log_odds(before, after, of, against)
    for at in range(4):
        odds = [(each[at].softmax(0)[of[at]] / each[at].softmax(0)[against[at]]).log() for each in (before, after)]
        assert float(found[at]) == pytest.approx(float(odds[0] - odds[1]), abs=1e-12)
