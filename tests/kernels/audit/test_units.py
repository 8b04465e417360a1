"""Relevance of units against losses, and bootstrap intervals, against plain loops."""

import math

import numpy as np
import pytest
from scipy import stats

from kernels.audit import intervals
from kernels.audit.intervals import mean_interval, resampled
from kernels.audit.units import agreement, chance, holm, overlap, shares, spread

RANDOM = np.random.default_rng(0)


def test_agreement_is_spearmans_of_the_mean_relevance():
    relevance, loss = RANDOM.normal(size=(9, 7)), RANDOM.normal(size=(7, 3))
    images = [np.array([0, 2, 2, 5]), np.array([], np.int64), np.array([8])]
    found = agreement(relevance, loss, images)
    for c in (0, 2):
        mean = [sum(relevance[i][u] for i in images[c]) / len(images[c]) for u in range(7)]
        assert found[c] == pytest.approx(stats.spearmanr(mean, loss[:, c]).statistic, abs=1e-12)
    assert math.isnan(found[1])


def test_the_true_effect_scores_1_and_its_opposite_minus_1():
    loss = RANDOM.normal(size=(20, 4))
    images = [np.array([c]) for c in range(4)]
    assert agreement(loss.T, loss, images) == pytest.approx(1, abs=1e-12)
    assert agreement(-loss.T, loss, images) == pytest.approx(-1, abs=1e-12)


def test_random_relevance_is_at_chance():
    loss, images = RANDOM.normal(size=(30, 200)), [np.array([c]) for c in range(200)]
    found = agreement(RANDOM.normal(size=(200, 30)), loss, images)
    assert abs(found.mean()) < 4 / math.sqrt(200 * 29)
    assert found.std() == pytest.approx(1 / math.sqrt(29), rel=0.15)
    assert np.mean([chance(each, 30) < 0.05 for each in found]) < 0.1


def test_spread_draws_images_again():
    relevance, loss = RANDOM.normal(size=(6, 9)), RANDOM.normal(size=9)
    drawn = np.random.default_rng(2).integers(0, 6, (50, 6))
    found = [stats.spearmanr(relevance[rows].mean(0), loss).statistic for rows in drawn]
    assert spread(relevance, loss, 50, seed=2) == pytest.approx(tuple(np.quantile(found, [0.025, 0.975])))
    assert math.isnan(spread(relevance[:1], loss, 50)[0]) and math.isnan(spread(relevance, np.zeros(9), 50)[0])


def test_overlap_of_the_greatest():
    loss, relevance = np.array([0.5, 0.1, 0.4, 0.0, 0.3]), np.array([9.0, 8.0, 0.0, 0.0, 7.0])
    assert overlap(relevance, loss, 3) == pytest.approx(2 / 3)
    assert overlap(loss, loss, 3) == 1
    assert math.isnan(overlap(relevance, np.zeros(5), 3))
    assert overlap(relevance, loss, 50) == 1  # of all units


@pytest.mark.parametrize("units", [12, 60])
def test_chance_is_that_of_permutations(units):
    ranks = np.arange(units) - (units - 1) / 2
    drawn = RANDOM.permuted(np.tile(ranks, (4000, 1)), axis=1) @ ranks / (ranks @ ranks)
    for least in (0.2, 0.4):
        seen = (np.abs(drawn) >= least).mean()
        assert chance(least, units) == pytest.approx(seen, abs=0.035)
    assert math.isnan(chance(0.5, 3)) and chance(1.0, 9) == 0


def test_holm_step_by_step():
    given = np.array([0.01, 0.04, np.nan, 0.03, 0.5])
    assert holm(given) == pytest.approx([0.04, 0.09, np.nan, 0.09, 0.5], nan_ok=True)
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])


def test_shares_of_positive_values():
    found = shares(np.array([3.0, -5.0, 1.0, 4.0]), ["sky", "sky", "tree", "sky"])
    assert found == pytest.approx({"sky": 7 / 8, "tree": 1 / 8}) and list(found) == ["sky", "tree"]
    assert shares(np.array([-1.0, 0.0]), ["a", "b"]) == {}


def test_resampled_is_the_percentile_bootstrap():
    values = RANDOM.normal(size=15)
    value, low, high = resampled(lambda rows: values[rows].mean(), 15, seed=3, draws=400)
    drawn = np.random.default_rng(3)
    means = [np.mean([values[i] for i in drawn.integers(0, 15, 15)]) for _ in range(400)]
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))
    assert mean_interval(values, seed=3)[:3] == mean_interval(np.append(values, np.nan), seed=3)[:3]


def test_intervals_cover_the_mean():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).exponential(size=48)
        _, low, high, count = mean_interval(values, draws=300)
        covered += low <= 1 <= high
        assert count == 48
    assert 0.88 < covered / 200 <= 0.99


def test_too_few_images():
    assert mean_interval(np.array([np.nan]))[3] == 0
    value, low, _, count = mean_interval(np.array([2.0]))
    assert (value, count) == (2, 1) and math.isnan(low)
    assert math.isnan(resampled(lambda rows: 1.0, 0)[0]) and math.isnan(resampled(lambda rows: 1.0, 1)[1])


def test_means_are_drawn_in_blocks_as_at_once(monkeypatch):
    values = np.random.default_rng(4).random(37)
    whole = mean_interval(values)
    monkeypatch.setattr(intervals, "KEPT", 0)
    monkeypatch.setattr(intervals, "BLOCK", 100)
    assert mean_interval(values) == whole
    monkeypatch.setattr(intervals, "BLOCK", 1)
    assert mean_interval(values) == whole
