"""Filters by plain sums, pooling by plain loops, and the identity of the flipped kernel."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from kernels.visualization import filters
from kernels.visualization.augment import crops, draws, moved, moves
from kernels.visualization.pooling import p_norm_pool


def test_dead_and_near_duplicates():
    rng = np.random.default_rng(0)
    bank = rng.normal(size=(6, 3, 5, 5))
    bank[1], bank[2] = -2 * bank[0], 1e-4 * bank[2]
    bank[3] = 0
    assert filters.dead(bank).tolist() == [False, False, True, True, False, False]
    at, alike = filters.nearest(bank)
    assert at[:2].tolist() == [1, 0] and at[3] == -1 and math.isnan(alike[3])
    np.testing.assert_allclose(alike[:2], 1)
    other = [
        abs((bank[4] * bank[k]).sum()) / np.sqrt((bank[4] ** 2).sum() * (bank[k] ** 2).sum()) for k in (0, 1, 2, 5)
    ]
    np.testing.assert_allclose(alike[4], max(other))


def test_one_filter_is_like_no_other():
    at, alike = filters.nearest(np.ones((1, 1, 3, 3)))
    assert at.tolist() == [-1] and np.isnan(alike).all()


def test_aliasing_by_plain_sums():
    bank = np.random.default_rng(0).normal(size=(3, 2, 7, 5))
    side = filters.GRID
    expected = []
    for each in bank:
        above = total = 0.0
        for u in range(side):
            for v in range(side):
                fy, fx = min(u, side - u) / side, min(v, side - v) / side
                wave = np.exp(-2j * np.pi * (u * np.arange(7)[:, None] + v * np.arange(5)) / side)
                energy = (np.abs((each * wave).sum((1, 2))) ** 2).sum()
                total += energy
                above += energy * (fy > 0.25 or fx > 0.125)
        expected.append(above / total)
    np.testing.assert_allclose(filters.aliasing(bank, (2, 4)), expected, rtol=1e-10)


def test_aliasing_of_known_filters():
    """A constant passes low frequencies, a checkerboard the highest; at stride 1 nothing is above Nyquist."""
    flat = np.ones((1, 1, 11, 11))
    board = flat * (-1.0) ** np.add.outer(np.arange(11), np.arange(11))
    assert filters.aliasing(flat, (2, 2))[0] < 0.05 and filters.aliasing(board, (2, 2))[0] > 0.99
    assert filters.aliasing(board, (1, 1))[0] == 0
    assert filters.aliasing(flat, (4, 4))[0] > filters.aliasing(flat, (2, 2))[0]
    assert np.isnan(filters.aliasing(0 * flat, (2, 2))[0])


def pooled(values, p, window, stride):
    images, units, height, width = values.shape
    half = window // 2
    rows, columns = range(0, height, stride), range(0, width, stride)
    made = np.zeros((images, units, len(rows), len(columns)))
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            part = np.abs(values[:, :, max(y - half, 0) : y + half + 1, max(x - half, 0) : x + half + 1])
            flat = part.reshape(images, units, -1)
            made[:, :, i, j] = flat.max(2) if p == math.inf else (flat**p).sum(2) ** (1 / p)
    return made


@pytest.mark.parametrize("p", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize(("window", "stride", "size"), [(3, 2, (7, 8)), (5, 3, (9, 6)), (1, 1, (4, 4))])
def test_p_norm_by_loops(p, window, stride, size):
    values = np.random.default_rng(0).normal(size=(2, 3, *size))
    found = p_norm_pool(torch.from_numpy(values), p, window, stride)
    np.testing.assert_allclose(found.numpy(), pooled(values, p, window, stride), rtol=1e-12, atol=1e-12)


def test_p_norm_is_max_pooling_and_a_sum_at_its_ends():
    """The lectures' remark: p = 1 is the depth-wise convolution of abs f with weights 1; p = infinity its maximum."""
    values = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ones = torch.ones(3, 1, 3, 3, dtype=torch.float64)
    summed = functional.conv2d(values.abs(), ones, stride=2, padding=1, groups=3)
    torch.testing.assert_close(p_norm_pool(values, 1, 3, 2), summed, rtol=1e-12, atol=1e-12)
    largest = functional.max_pool2d(values.abs(), 3, 2, 1)
    assert torch.equal(p_norm_pool(values, math.inf, 3, 2), largest)
    torch.testing.assert_close(p_norm_pool(values, 2000.0, 3, 2), largest, rtol=2e-3, atol=0)


def test_p_norm_where_torch_lacks_the_abs():
    values = torch.tensor([-3.0, 1, 1, 0], dtype=torch.float64).reshape(1, 1, 2, 2)
    assert float(functional.lp_pool2d(values, 1, 2)) == -1 and math.isnan(float(functional.lp_pool2d(values, 3, 2)))
    assert float(p_norm_pool(values, 1, 3, 2)) == 5
    assert float(p_norm_pool(values, 3, 3, 2)) == pytest.approx(29 ** (1 / 3))


def test_p_norm_is_learnt():
    values = torch.randn(1, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    p = torch.tensor(2.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, q: p_norm_pool(v, q, 3, 2), (values, p))
    blank = torch.zeros(1, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    made = torch.autograd.grad(p_norm_pool(blank, p, 3, 1).sum(), (blank, p))
    assert all(bool(each.isfinite().all()) for each in made)


@pytest.mark.parametrize(("window", "p", "told"), [(2, 2, "window 2"), (3, 0.5, "p 0.5")])
def test_p_norm_refuses(window, p, told):
    with pytest.raises(ValueError, match=told):
        p_norm_pool(torch.zeros(1, 1, 4, 4), p, window, 1)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 2), (2, 1), (3, 0)])
def test_identity_of_the_flipped_kernel(stride, padding):
    """What goes back through a convolution is convolved with the flipped kernel, with zeros put between for strides."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 11, 10, dtype=torch.float64, generator=generator).requires_grad_()
    kernel = torch.randn(4, 2, 5, 3, dtype=torch.float64, generator=generator)
    after = functional.conv2d(x, kernel, stride=stride, padding=padding)
    back = torch.randn(after.shape, dtype=torch.float64, generator=generator)
    (found,) = torch.autograd.grad((after * back).sum(), x)
    height, width = 11 + 2 * padding, 10 + 2 * padding
    spread = torch.zeros(1, 4, height - 4, width - 2, dtype=torch.float64)
    spread[:, :, ::stride, ::stride][:, :, : after.shape[2], : after.shape[3]] = back
    flipped = kernel.flip(2, 3).transpose(0, 1)
    whole = torch.zeros(1, 2, height, width, dtype=torch.float64)
    wide = functional.pad(spread, (2, 2, 4, 4))
    for i in range(height):
        for j in range(width):
            whole[0, :, i, j] = (wide[0, None, :, i : i + 5, j : j + 3] * flipped).sum((1, 2, 3))
    expected = whole[:, :, padding : height - padding, padding : width - padding]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_draws_depend_on_their_own_seed_alone():
    both = draws([(1, 2), (3, 4)], 5, 4)
    np.testing.assert_array_equal(both[:, 1:], draws([(3, 4)], 5, 4))
    assert np.abs(both).max() <= 1 and both.std() > 0.3


def test_a_shift_moves_by_pixels():
    image = torch.rand(1, 2, 9, 7, generator=torch.Generator().manual_seed(0))
    maps = moves(np.array([[1.0, -0.5, 0, 0]]), (9, 7), 2, 0, 1.0)
    found = moved(image, maps)
    torch.testing.assert_close(found[:, :, :7, 1:], image[:, :, 2:, :-1], rtol=0, atol=1e-5)


def test_a_quarter_turn_and_a_crop():
    image = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    turned = moved(image, moves(np.array([[0, 0, 1.0, 0]]), (8, 8), 0, 90, 1.0))
    assert any(torch.allclose(turned, torch.rot90(image, k, (2, 3)), atol=1e-5) for k in (1, 3))
    half = moved(image, crops(np.array([[-1.0, 1.0, -1.0]]), 0.5))
    expected = functional.interpolate(image[:, :, :4, 4:], size=(8, 8), mode="bilinear", align_corners=False)
    torch.testing.assert_close(half[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=0, atol=1e-5)
