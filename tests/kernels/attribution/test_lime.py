"""Local surrogate models against loops and other libraries."""

import math
from itertools import pairwise

import numpy as np
import pytest

from kernels.attribution import lime, masks


def problem(seed=0, samples=120, features=9):
    random = np.random.default_rng(seed)
    shown = random.random((samples, features)) < 0.6
    values = shown @ random.normal(size=features) + 0.5 * shown[:, 0] * shown[:, 1] + 0.2 * random.normal(size=samples)
    return shown, values, random.random(samples) + 0.05


def test_distances_are_those_of_the_masked_inputs():
    random = np.random.default_rng(0)
    x, x0, part = random.normal(size=12), random.normal(size=12), np.arange(12) % 5
    x0[part == 4] = x[part == 4]  # the last part is the same in both
    shown = random.random((20, 4)) < 0.5
    shown[0] = True
    products = np.stack([[(a * b)[part == j].sum() for j in range(5)] for a, b in ((x, x), (x, x0), (x0, x0))])
    whole = np.where(np.concatenate([shown, np.ones((20, 1), bool)], 1)[:, part], x, x0)
    cosine = 1 - whole @ x / (np.linalg.norm(whole, axis=1) * np.linalg.norm(x))
    np.testing.assert_allclose(lime.input_distance(shown, products, "cosine"), cosine, atol=1e-14)
    straight = np.linalg.norm(whole - x, axis=1) / np.linalg.norm(x0 - x)
    np.testing.assert_allclose(lime.input_distance(shown, products, "l2"), straight, atol=1e-14)
    ones = np.ones(4)
    cosine = [1 - each @ ones / (np.linalg.norm(each) * 2) if each.any() else 1 for each in shown.astype(float)]
    np.testing.assert_allclose(lime.mask_distance(shown, "cosine"), cosine, atol=1e-14)
    straight = np.linalg.norm(shown - ones, axis=1) / 2
    np.testing.assert_allclose(lime.mask_distance(shown, "l2"), straight, atol=1e-14)


def test_the_kernel_is_that_of_the_paper_and_the_package_takes_its_root():
    distance = np.array([0, 0.25, 1.0])
    np.testing.assert_allclose(lime.proximity(distance, 0.25), np.exp(-(distance**2) / 0.0625), rtol=1e-15)


@pytest.mark.parametrize("width", [0.1, 0.25, 5.0])
def test_a_linear_function_is_found_whatever_the_kernel(width):
    shown = np.random.default_rng(1).random((40, 3)) < 0.5
    w = np.array([1.0, -2.0, 0.5])
    weight = lime.proximity(lime.mask_distance(shown, "cosine"), width)
    found = lime.linear(shown, shown @ w + 0.3, weight)
    np.testing.assert_allclose(found.weights, w, atol=1e-9)
    assert found.intercept == pytest.approx(0.3, abs=1e-9) and found.fit == pytest.approx(1, abs=1e-12)
    for selection in ("forward", "lasso"):
        sparse = lime.linear(shown, shown @ w + 0.3, np.ones(40), features=2, selection=selection)
        assert np.flatnonzero(sparse.weights).tolist() == [0, 1]


@pytest.mark.parametrize("ridge", [0.01, 1.0, 30.0])
def test_ridge_regression_is_that_of_scikit_learn(ridge):
    from sklearn.linear_model import Ridge

    shown, values, weight = problem()
    wanted = Ridge(alpha=ridge).fit(shown, values, weight)
    found = lime.linear(shown, values, weight, ridge)
    np.testing.assert_allclose(found.weights, wanted.coef_, atol=1e-12)
    assert found.intercept == pytest.approx(wanted.intercept_, abs=1e-12)
    assert found.fit == pytest.approx(wanted.score(shown, values, weight), abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("features", [1, 3, 6])
def test_forward_selection_adds_the_feature_that_leaves_the_smallest_error(seed, features):
    shown, values, weight = problem(seed)

    def error(own):
        x = np.concatenate([shown[:, own], np.ones((len(shown), 1))], 1) * np.sqrt(weight)[:, None]
        y = values * np.sqrt(weight)
        return ((x @ np.linalg.lstsq(x, y, rcond=None)[0] - y) ** 2).sum()

    wanted = []
    for _ in range(features):
        wanted.append(min(set(range(9)) - set(wanted), key=lambda j: error([*wanted, j])))
    found = lime.linear(shown, values, weight, features=features)
    assert np.flatnonzero(found.weights).tolist() == sorted(wanted)


@pytest.mark.parametrize("seed", range(12))
def test_the_lasso_path_is_that_of_scikit_learn(seed):
    from sklearn.linear_model import lars_path

    shown, values, weight = problem(seed, 60 if seed % 2 else 25, 9 if seed % 3 else 20)
    x = (shown - np.average(shown, axis=0, weights=weight)) * np.sqrt(weight)[:, None]
    y = (values - np.average(values, weights=weight)) * np.sqrt(weight)
    penalties, _, weights = lars_path(x, y, method="lasso")
    knots = lime.lasso_path(x.T @ x, x.T @ y)
    assert all(a > b - 1e-12 for (a, _), (b, _) in pairwise(knots))
    own = np.array([penalty for penalty, _ in knots])[::-1]
    found = np.stack([each for _, each in knots])[::-1]
    for penalty, wanted in zip(penalties * len(x), weights.T, strict=True):
        if penalty > 1e-6:
            mine = [np.interp(penalty, own, column) for column in found.T]
            np.testing.assert_allclose(mine, wanted, atol=1e-8)


def test_the_lasso_chooses_at_most_so_many_and_survives_equal_features():
    shown, values, weight = problem(3)
    twice = np.concatenate([shown, shown[:, :3]], 1)
    for features in range(1, 8):
        for x in (shown, twice):
            found = lime.linear(x, values, weight, 0.0, features, "lasso")
            assert 1 <= np.count_nonzero(found.weights) <= features and np.isfinite(found.weights).all()


def test_a_constant_function_has_no_weights_and_no_fit():
    shown = np.random.default_rng(0).random((30, 4)) < 0.5
    for found in (
        lime.linear(shown, np.full(30, 2.0), np.ones(30)),
        lime.linear(shown, np.full(30, 2.0), np.ones(30), 1.0, 2, "lasso"),
        lime.tree(shown, np.full(30, 2.0), np.ones(30), 3),
    ):
        assert not found.weights.any() and found.intercept == 2 and math.isnan(found.fit)
    nothing = lime.linear(np.zeros((2, 0), bool), np.array([1.0, 1.0]), np.ones(2))
    assert nothing.weights.shape == (0,) and math.isnan(lime.stability(nothing.weights, nothing.weights))


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_trees_are_those_of_scikit_learn(depth, seed):
    from sklearn.tree import DecisionTreeRegressor

    shown, values, weight = problem(seed)
    other = DecisionTreeRegressor(max_depth=depth, random_state=0).fit(shown, values, weight)
    found = lime.tree(shown, values, weight, depth)
    assert found.fit == pytest.approx(other.score(shown, values, weight), abs=1e-12)
    (leaf,) = other.predict(np.ones((1, 9)))
    assert found.intercept + found.weights.sum() == pytest.approx(leaf, abs=1e-12)
    assert np.count_nonzero(found.weights) <= depth
    node = np.zeros(len(shown), int)
    for _ in range(depth):
        inside = found.split[node] >= 0
        present = shown[np.arange(len(shown)), found.split[node]]
        node = np.where(inside, 2 * node + 1 + present, node)
    np.testing.assert_allclose(found.mean[node], other.predict(shown), atol=1e-12)
    assert (found.split >= 0).sum() == other.get_n_leaves() - 1 == np.isfinite(found.mean).sum() // 2


def test_the_pick_is_the_papers_example():
    # Figure 5: feature 2 matters most, in the first rows; a row with the second most covers the rest.
    rows = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 1, 1]], float)
    assert lime.pick(rows, 2) == [0, 4]
    assert lime.pick(rows, 9) == [0, 4, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_the_pick_is_greedy(seed):
    weights = np.random.default_rng(seed).normal(size=(8, 10)) * (np.random.default_rng(seed + 9).random((8, 10)) < 0.4)
    importance = np.sqrt(np.abs(weights).sum(0))

    def covered(rows):
        return importance[(weights[rows] != 0).any(0)].sum() if rows else 0.0

    chosen = []
    for _ in range(3):
        rest = [row for row in range(8) if row not in chosen]
        chosen.append(max(rest, key=lambda row: (round(covered([*chosen, row]), 9), -row)))
    assert lime.pick(weights, 3) == chosen


def test_segments_that_mean_the_same_are_added_up():
    values = np.array([[1.0, -2.0, np.nan], [3.0, 0.5, 4.0]])
    features = np.array([[5, 5, -1], [0, 2, 5]])
    assert lime.by_feature(values, features, 6).tolist() == [[0, 0, 0, 0, 0, 3], [3, 0, 0.5, 0, 0, 4]]


def test_random_masks_are_means_of_what_they_show():
    shown, values, weight = problem(1)
    found, mean = masks.shown(shown, values, weight)
    assert mean == pytest.approx(np.average(values, weights=weight), abs=1e-14)
    for j in range(9):
        own = shown[:, j]
        assert found[j] + mean == pytest.approx(np.average(values[own], weights=weight[own]), abs=1e-12)
    found, _ = masks.shown(np.zeros((4, 2), bool), np.arange(4.0), np.ones(4))
    assert found.tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("features", "selection"), [(None, "forward"), (4, "forward")])
def test_weights_are_those_of_the_package_lime_on_the_same_samples(features, selection):
    base = pytest.importorskip("lime.lime_base", reason="lime is not installed")
    shown, values, _ = problem(2, features=9)
    shown[0] = True
    distance = lime.mask_distance(shown, "cosine")
    ours = lime.proximity(distance, 0.25)
    # The paper's kernel: by default, the package has its root, which is the paper's of a width sqrt(2) times as large.
    package = base.LimeBase(lambda each: lime.proximity(each, 0.25), random_state=0)
    labels = np.stack([values, values], 1)
    chosen = "none" if features is None else "forward_selection"
    intercept, pairs, fit, _ = package.explain_instance_with_data(
        shown.astype(float), labels, distance, 1, features or 9, feature_selection=chosen
    )
    found = lime.linear(shown, values, ours, 1.0, features, selection)
    wanted = np.zeros(9)
    for feature, weight in pairs:
        wanted[feature] = weight
    np.testing.assert_allclose(found.weights, wanted, atol=1e-10)
    assert found.intercept == pytest.approx(intercept, abs=1e-10) and found.fit == pytest.approx(fit, abs=1e-10)
