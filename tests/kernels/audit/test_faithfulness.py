"""Curves, sets of pixels, and fillings, against what loops in float64 give, and cases that can be done by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.audit import faithfulness, imputation, structure

DRAW = np.random.default_rng(5)


def test_the_largest_value_comes_first_and_the_first_of_equal_ones() -> None:
    maps = np.array([[[1.0, 3.0], [3.0, -2.0]]])
    np.testing.assert_array_equal(faithfulness.ranks(maps), [[[2, 0], [1, 3]]])
    maps = DRAW.standard_normal((3, 5, 4)).astype(np.float32)
    for own, places in zip(maps, faithfulness.ranks(maps), strict=True):
        np.testing.assert_array_equal(own.ravel()[np.argsort(places.ravel())], np.sort(own.ravel())[::-1])


def test_a_map_that_is_not_finite_has_no_order() -> None:
    with pytest.raises(ValueError, match="not finite"):
        faithfulness.ranks(np.array([[[1.0, np.nan]]]))


def test_shares_become_whole_pixels() -> None:
    np.testing.assert_array_equal(faithfulness.counts([0, 0.2, 0.5, 1], 784), [0, 157, 392, 784])
    np.testing.assert_array_equal(faithfulness.counts([0.5], 5), [3])


def test_what_is_removed_shows_the_filler_and_what_is_inserted_the_image() -> None:
    inputs, filler = torch.ones(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    places = torch.tensor([[[2, 0, 1]]])
    removed = faithfulness.removed(inputs, filler, places, 2)
    assert removed[0].tolist() == [[[1, 0, 0]], [[1, 0, 0]]]
    inserted = faithfulness.removed(filler, inputs, places, 2)
    assert inserted[0].tolist() == [[[0, 1, 1]], [[0, 1, 1]]]
    assert torch.equal(faithfulness.removed(inputs, filler, places, 0), inputs)
    assert torch.equal(faithfulness.removed(inputs, filler, places, 3), filler)


def test_an_area_is_a_mean_height() -> None:
    assert faithfulness.area(np.full(4, 0.3), np.array([0, 0.1, 0.5, 1])) == pytest.approx(0.3)
    assert faithfulness.area(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 0.5
    assert faithfulness.area(np.array([1.0, 0.0, 0.0]), np.array([0.0, 0.25, 1.0])) == 0.125
    assert faithfulness.area(np.array([1.0, 0.0]), np.array([0.2, 0.6])) == pytest.approx(0.5)
    curves, shares = DRAW.standard_normal((2, 3, 6)), np.sort(DRAW.random(6))
    twin = np.trapezoid(curves, shares) / (shares[-1] - shares[0])
    np.testing.assert_allclose(faithfulness.area(curves, shares), twin)
    for wrong in ([0.5], [0.5, 0.5], [1.0, 0.0]):
        with pytest.raises(ValueError, match="ascending"):
            faithfulness.area(np.zeros(len(wrong)), np.array(wrong))


def test_sets_have_their_size_and_come_from_their_seed() -> None:
    drawn = faithfulness.subsets(30, 7, 50, [1, 2])
    assert (drawn.sum(1) == 7).all()
    assert len(np.unique(drawn, axis=0)) > 40
    np.testing.assert_array_equal(drawn, faithfulness.subsets(30, 7, 50, [1, 2]))
    assert not np.array_equal(drawn, faithfulness.subsets(30, 7, 50, [1, 3]))
    for size in (0, 31):
        with pytest.raises(ValueError, match="30 pixels"):
            faithfulness.subsets(30, size, 1, [0])


def test_squares_lie_inside_and_reach_every_corner() -> None:
    drawn = faithfulness.squares((4, 5), 3, 300, [3]).reshape(300, 4, 5)
    assert (drawn.sum((1, 2)) == 9).all()
    corners = {tuple(np.argwhere(each)[0].tolist()) for each in drawn}
    assert corners == {(y, x) for y in range(2) for x in range(3)}
    for each in drawn:
        (y, x), (bottom, right) = np.argwhere(each)[[0, -1]]
        assert (bottom - y, right - x) == (2, 2)
    with pytest.raises(ValueError, match="squares of 5"):
        faithfulness.squares((4, 5), 5, 1, [0])


def test_sums_and_correlations_are_those_of_loops() -> None:
    maps = DRAW.standard_normal((2, 3, 4)).astype(np.float32)
    sets = DRAW.random((2, 6, 12)) < 0.4
    found = faithfulness.sums(maps, sets)
    for image in range(2):
        for at in range(6):
            twin = sum(float(maps[image].flat[pixel]) for pixel in range(12) if sets[image, at, pixel])
            assert found[image, at] == pytest.approx(twin, abs=1e-12)
    drop = DRAW.standard_normal((2, 6))
    twin = [np.corrcoef(a, b)[0, 1] for a, b in zip(found, drop, strict=True)]
    np.testing.assert_allclose(faithfulness.correlation(found, drop), twin)
    assert np.isnan(faithfulness.correlation(np.ones(4), np.arange(4.0)))


def test_a_linear_score_has_sensitivity_n_one_and_no_infidelity() -> None:
    """Of a linear function, gradient x (input - filler) says what each set does: whatever its size."""
    weight, inputs, filler = (DRAW.standard_normal((1, 4, 5)) for _ in range(3))
    said = weight * (inputs - filler)
    for size in (1, 7, 19):
        sets = faithfulness.subsets(20, size, 30, [size])
        moved = np.where(sets.reshape(30, 1, 4, 5), filler, inputs)
        drop = ((weight * inputs).sum() - (weight * moved).sum((1, 2, 3)))[None]
        sums = faithfulness.sums(said, sets[None])
        np.testing.assert_allclose(faithfulness.correlation(sums, drop), 1)
        np.testing.assert_allclose(faithfulness.infidelity(sums, drop, scaled=False), 0, atol=1e-20)
        # Twice the map is wrong by the drop itself, and right once it is scaled.
        np.testing.assert_allclose(faithfulness.infidelity(2 * sums, drop, scaled=False), (drop**2).mean())
        np.testing.assert_allclose(faithfulness.infidelity(2 * sums, drop, scaled=True), 0, atol=1e-12)


def test_infidelity_is_that_of_a_search_for_the_factor() -> None:
    said, drop = DRAW.standard_normal((3, 8)), DRAW.standard_normal((3, 8))
    np.testing.assert_allclose(faithfulness.infidelity(said, drop, False), np.square(said - drop).mean(1))
    for a, b, found in zip(said, drop, faithfulness.infidelity(said, drop, True), strict=True):
        factors = np.linspace(-3, 3, 60_001)
        least = np.square(factors[:, None] * a - b).mean(1).min() / np.square(b).mean()
        assert found == pytest.approx(least, abs=1e-6)
    assert faithfulness.infidelity(np.zeros((1, 4)), np.ones((1, 4)), True) == 1
    assert np.isnan(faithfulness.infidelity(np.ones((1, 4)), np.zeros((1, 4)), True))


def test_r2() -> None:
    score = np.array([1.0, 2.0, 3.0])
    assert faithfulness.r2(score, score) == 1
    assert faithfulness.r2(np.full(3, 2.0), score) == 0
    assert faithfulness.r2(score[::-1], score) == -3
    assert np.isnan(faithfulness.r2(score, np.ones(3)))


def test_relative_change() -> None:
    maps = np.array([[[3.0, 4.0]], [[0.0, 0.0]]])
    found = faithfulness.relative_change(maps, maps + np.array([[[0.0, 5.0]]]))
    assert found[0] == 1
    assert np.isnan(found[1])


def test_imputed_pixels_are_the_weighted_means_of_their_neighbours() -> None:
    image, gone = DRAW.standard_normal((2, 6, 7)), DRAW.random((6, 7)) < 0.6
    found = imputation.imputed(image, gone)
    np.testing.assert_array_equal(found[:, ~gone], image[:, ~gone])
    for y, x in np.argwhere(gone):
        total, weights = np.zeros(2), 0.0
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                if (down, right) != (0, 0) and 0 <= y + down < 6 and 0 <= x + right < 7:
                    weight = 1 / 6 if down == 0 or right == 0 else 1 / 12
                    total, weights = total + weight * found[:, y + down, x + right], weights + weight
        np.testing.assert_allclose(found[:, y, x], total / weights, atol=1e-12)


def test_imputation_by_hand() -> None:
    image = np.array([[[1.0, 9.0, 4.0]]])
    # The pixel between has two direct neighbours; both missing ones of the other lie on a line.
    np.testing.assert_allclose(imputation.imputed(image, np.array([[False, True, False]])), [[[1, 2.5, 4]]])
    np.testing.assert_allclose(imputation.imputed(image, np.array([[False, True, True]])), [[[1, 1, 1]]])
    np.testing.assert_array_equal(imputation.imputed(image, np.zeros((1, 3), bool)), image)
    with pytest.raises(ValueError, match="all pixels are removed"):
        imputation.imputed(image, np.ones((1, 3), bool))


def test_imputed_noise_is_drawn_for_removed_pixels_alone() -> None:
    image, gone = np.zeros((3, 40, 40)), DRAW.random((40, 40)) < 0.5
    found = imputation.imputed(image, gone, 0.2, [1, 2])
    assert (found[:, ~gone] == 0).all()
    assert found[:, gone].std() == pytest.approx(0.2, rel=0.05)
    np.testing.assert_array_equal(found, imputation.imputed(image, gone, 0.2, [1, 2]))


@pytest.mark.parametrize("size", [(20, 24), (11, 11), (7, 9), (2, 5)])
def test_ssim_is_that_of_windows_that_lie_inside(size: tuple[int, int]) -> None:
    a, b = DRAW.random((2, 3, *size))
    side = min(11, *(each - (1 - each % 2) for each in size))
    place = np.arange(side) - side // 2
    line = np.exp(-(place**2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    for one, other, found in zip(a, b, structure.ssim(a, b), strict=True):
        values = []
        for y in range(size[0] - side + 1):
            for x in range(size[1] - side + 1):
                p, q = one[y : y + side, x : x + side], other[y : y + side, x : x + side]
                m, n = (window * p).sum(), (window * q).sum()
                v, w = (window * (p - m) ** 2).sum(), (window * (q - n) ** 2).sum()
                both = (window * (p - m) * (q - n)).sum()
                values.append((2 * m * n + 1e-4) * (2 * both + 9e-4) / ((m**2 + n**2 + 1e-4) * (v + w + 9e-4)))
        assert found == pytest.approx(np.mean(values))


@pytest.mark.slow
def test_ssim_is_scikit_images() -> None:
    from skimage.metrics import structural_similarity

    a, b = DRAW.random((2, 1, 16, 16))
    _, every = structural_similarity(
        a[0], b[0], data_range=1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert structure.ssim(a, b)[0] == pytest.approx(every[5:-5, 5:-5].mean())
    assert structure.ssim(a, a)[0] == pytest.approx(1)


def test_scaled_maps_reach_from_0_to_1() -> None:
    found = structure.scaled(np.array([[[-1.0, 3.0, 0.0]], [[2.0, 2.0, 2.0]]]))
    np.testing.assert_array_equal(found[0], [[0, 1, 0.25]])
    assert np.isnan(found[1]).all()
