"""Measures of objects against slow twins in float64: sums, rings, partial correlations of ranks, the objects' game."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kernels.audit import objects, ranks
from kernels.audit.games import Game


def random_image(seed, count=5, size=9):
    random = np.random.default_rng(seed)
    instances = random.integers(0, count + 1, (size, size)).astype(np.uint8)
    return random.normal(size=(size, size)).astype(np.float32), instances


@pytest.mark.parametrize("seed", range(4))
def test_sums_and_areas_pixel_by_pixel(seed):
    values, instances = random_image(seed)
    total, count, out, every = [0.0] * 6, [0] * 6, 0.0, 0.0
    for y in range(9):
        for x in range(9):
            every += abs(float(values[y, x]))
            if instances[y, x]:
                total[instances[y, x] - 1] += float(values[y, x])
                count[instances[y, x] - 1] += 1
            else:
                out += abs(float(values[y, x]))
    assert np.allclose(objects.sums(values, instances, 6), total, rtol=1e-12, atol=1e-12)
    assert objects.areas(instances, 6).tolist() == count
    assert count[5] == 0
    assert math.isclose(objects.outside(values, instances), out / every, rel_tol=1e-12)
    assert math.isnan(objects.outside(np.zeros((9, 9)), instances))


@pytest.mark.parametrize("width", [1, 2])
def test_a_ring_pixel_by_pixel(width):
    mask = np.random.default_rng(3).random((12, 10)) < 0.06
    mask[0, 0] = mask[11, 9] = True
    found = objects.ring(mask, width)
    for y in range(12):
        for x in range(10):
            near = any(mask[v, u] for v in range(12) for u in range(10) if max(abs(v - y), abs(u - x)) <= width)
            assert found[y, x] == (near and not mask[y, x])


def test_filled_with_the_colour_of_its_ring():
    image = np.zeros((3, 6, 6), np.uint8)
    image[0], image[:, 2:4, 2:4] = 40, 200
    mask = image[1] == 200
    found = objects.filled(image, mask, 2)
    assert (found[0] == 40).all()
    assert not found[1:].any()
    assert image.max() == 200  # the image itself stays
    assert objects.filled(image, np.zeros((6, 6), bool), 2) is None
    assert objects.filled(image, np.ones((6, 6), bool), 2) is None
    image[:, 1, 1] = 11  # mean of 31 pixels of 40 and one of 11
    assert (objects.filled(image, mask, 2)[0, 2:4, 2:4] == round((31 * 40 + 11) / 32)).all()


def residuals(of, on):
    design = np.stack([np.ones(len(on)), on], 1)
    return of - design @ np.linalg.lstsq(design, of, rcond=None)[0]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(4, 14).flatmap(
        lambda count: st.lists(st.tuples(*[st.integers(0, 6)] * 3), min_size=count, max_size=count)
    )
)
def test_partial_correlation_is_that_of_the_residuals_of_the_ranks(rows):
    a, b, given_ = (stats.rankdata(each) for each in np.array(rows, float).T)
    found = ranks.partial_rank_correlation(*np.array(rows, float).T)
    first, second = residuals(a, given_), residuals(b, given_)
    norms = np.linalg.norm(first), np.linalg.norm(second)
    if len(set(given_)) == 1 or min(norms) < 1e-6:
        assert math.isnan(found)
    else:
        assert math.isclose(found, first @ second / (norms[0] * norms[1]), abs_tol=1e-9)


def test_partial_correlation_by_hand():
    area = np.array([1, 2, 3, 4, 5, 6.0])
    truth = np.array([2, 1, 4, 3, 6, 5.0])
    assert math.isnan(ranks.partial_rank_correlation(area, truth, area))  # area itself
    assert ranks.partial_rank_correlation(truth, truth, area) == pytest.approx(1)
    assert ranks.partial_rank_correlation(-truth, truth, area) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("values", "truth", "expected"),
    [
        ([1, 3, 2], [0, 9, 1], 1.0),
        ([4, 3, 2], [0, 9, 1], 0.0),
        ([3, 3, 2], [0, 9, 1], 0.5),
        ([1, 1, 1], [0, 9, 1], 1 / 3),
    ],
)
def test_the_most_important_object(values, truth, expected):
    assert ranks.found(np.array(values, float), np.array(truth, float)) == expected
    assert math.isnan(ranks.found(np.array([1, np.nan, 0]), np.array(truth, float)))


def table(seed, players):
    values = np.random.default_rng(seed).normal(size=2**players)
    return lambda shown: values[(shown * 2 ** np.arange(shown.shape[-1])).sum(-1)]


def shapley_by_definition(value, players):
    found = np.zeros(players)
    for order in permutations(range(players)):
        shown = np.zeros(players, bool)
        for player in order:
            before = value(shown)
            shown[player] = True
            found[player] += value(shown) - before
    return found / math.factorial(players)


@pytest.mark.parametrize("players", [2, 4, 6])
def test_truths_of_few_objects_are_exact(players):
    game, value = Game.of(players, 8, 512, 0), table(players, players)
    assert game.coalitions == 2**players
    scores = value(game.shown)
    every = np.ones(players, bool)
    for k in range(players):
        without = every.copy()
        without[k] = False
        assert game.drops(scores)[k] == value(every) - value(without)
    found = game.shares(scores)
    np.testing.assert_allclose(found.values, shapley_by_definition(value, players), rtol=0, atol=1e-12)
    assert not found.error.any()


def test_truths_of_many_objects_are_sampled_in_pairs():
    players = 11
    random = np.random.default_rng(5)
    alone, members = random.normal(size=players), random.random((30, players)) < 0.2
    pay = random.normal(size=30) * 0.3

    def value(shown):
        return shown @ alone + ((~shown).astype(float) @ members.T == 0) @ pay

    exact = alone + (pay[:, None] * members / np.maximum(members.sum(1, keepdims=True), 1)).sum(0)
    game = Game.of(players, 8, 512, 3)
    assert game.shown.shape == (514 + players, players)
    assert not game.shown[0].any()
    assert game.shown[game.coalitions - 1].all()
    pairs = game.shown[1 : game.coalitions - 1]
    assert np.array_equal(pairs[::2], ~pairs[1::2])
    scores = value(game.shown)
    found = game.shares(scores)
    assert math.isclose(found.values.sum(), scores[game.coalitions - 1] - scores[0], abs_tol=1e-9)
    assert np.abs(found.values - exact).max() < 5 * found.error.max()
    assert np.corrcoef(found.values, exact)[0, 1] > 0.99
    both = np.stack([scores, 2 * scores], 1)
    assert np.array_equal(game.drops(both)[:, 1], 2 * game.drops(both)[:, 0])
    same, other = (Game.of(players, 8, 512, seed) for seed in (3, 4))
    assert np.array_equal(same.shown, game.shown)
    assert not np.array_equal(other.shown, game.shown)
