"""Shapley values against the definition, the least squares of the paper, and games whose values are known."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attribution import shapley


def by_definition(game, players):
    """The mean change over all orders of the players."""
    found = np.zeros(players)
    for order in permutations(range(players)):
        mask = np.zeros(players, bool)
        before = game(mask)
        for player in order:
            mask[player] = True
            after = game(mask)
            found[player] += after - before
            before = after
    return found / math.factorial(players)


def values_of(game, masks):
    return np.array([game(mask) for mask in masks])


def table(seed, players):
    """A game with a random value for each coalition."""
    values = np.random.default_rng(seed).normal(size=2**players)
    return lambda mask: values[int((mask * 2 ** np.arange(players)).sum())]


class Unanimous:
    """A game that is a sum of small coalitions: each pays once all its members are there, in equal parts."""

    def __init__(self, seed, players, coalitions=200, largest=6):
        random = np.random.default_rng(seed)
        self.members = np.zeros((coalitions, players))
        for row in self.members:
            row[random.choice(players, random.integers(1, largest + 1), replace=False)] = 1
        self.pay = random.normal(size=coalitions)
        self.shapley = (self.pay[:, None] * self.members / self.members.sum(1, keepdims=True)).sum(0)

    def __call__(self, masks):
        return ((1.0 - np.asarray(masks, float)) @ self.members.T == 0) @ self.pay


def with_ends(game, masks):
    players = masks.shape[1]
    return game(np.concatenate([np.zeros((1, players)), masks, np.ones((1, players))]))


def test_the_weights_are_those_of_the_theorem():
    np.testing.assert_allclose(shapley.kernel_weights(3), [1 / 3, 1 / 3], rtol=1e-15)
    np.testing.assert_allclose(shapley.kernel_weights(4), [1 / 4, 1 / 8, 1 / 4], rtol=1e-15)


FUNCTIONS = [
    (lambda x: x[0] * x[1] + 2 * x[2], [3, 4, 5], [1, 1, 1], [5, 6, 8]),
    (lambda x: max(x), [3, 5, 1], [0, 0, 0], [4 / 3, 10 / 3, 1 / 3]),
    (lambda x: min(x), [3, 1], [0, 0], [0.5, 0.5]),
    (lambda x: 2 * x[0] - 3 * x[1] + 0.5 * x[2] + 0.25, [1, 2, -4], [0.5, -1, 2], [1, -9, -3]),
]


@pytest.mark.parametrize(("function", "x", "baseline", "wanted"), FUNCTIONS)
def test_known_functions(function, x, baseline, wanted):
    masks = shapley.all_coalitions(len(x))
    found = shapley.Estimate.exact(values_of(lambda mask: function(np.where(mask, x, baseline)), masks))
    np.testing.assert_allclose(found.values, wanted, atol=1e-14)
    assert not found.error.any()


@pytest.mark.parametrize("players", [1, 2, 3, 5, 6])
def test_all_coalitions_give_the_mean_over_all_orders(players):
    game = table(players, players)
    found = shapley.Estimate.exact(values_of(game, shapley.all_coalitions(players)))
    np.testing.assert_allclose(found.values, by_definition(game, players), atol=1e-12)


def least_squares(masks, values, weight, none, every):
    """Theorem 2 of the paper as written, the constraint put in for the last player."""
    y = values - none - masks[:, -1] * (every - none)
    x = masks[:, :-1].astype(float) - masks[:, -1:]
    root = np.sqrt(weight)[:, None]
    first = np.linalg.lstsq(root * x, root[:, 0] * y, rcond=None)[0]
    return np.append(first, every - none - first.sum())


@pytest.mark.parametrize("players", [2, 5, 12])
def test_exact_values_are_the_papers_least_squares_to_1e_12(players):
    masks = shapley.all_coalitions(players)
    values = np.random.default_rng(players).normal(size=len(masks))
    weight = shapley.kernel_weights(players)[masks[1:-1].sum(1) - 1]
    wanted = least_squares(masks[1:-1], values[1:-1], weight, values[0], values[-1])
    np.testing.assert_allclose(shapley.Estimate.exact(values).values, wanted, atol=1e-12)


@pytest.mark.parametrize("players", [2, 3, 6, 7])
def test_a_draw_of_all_coalitions_is_exact_without_error(players):
    drawn = shapley.sample(players, 2**players - 2 if players > 2 else 4, 0)
    assert len({mask.tobytes() for mask in drawn.masks}) == 2**players - 2 == drawn.whole
    game = table(3, players)
    values = values_of(game, np.pad(drawn.masks, ((1, 1), (0, 0)), constant_values=((False, True), (False, False))))
    found = shapley.regression(drawn, values)
    wanted = shapley.Estimate.exact(values_of(game, shapley.all_coalitions(players)))
    np.testing.assert_allclose(found.values, wanted.values, atol=1e-12)
    assert not found.error.any()


@pytest.mark.parametrize(
    ("players", "samples"), [(13, 100), (20, 200), (42, 84), (42, 513), (43, 1024), (200, 600), (1200, 2400)]
)
def test_a_draw_is_of_different_complementary_pairs_by_size(players, samples):
    drawn = shapley.sample(players, samples, [7, 1])
    assert len(drawn.masks) == 2 * (samples // 2) and drawn.weight.sum() == pytest.approx(1, abs=1e-12)
    np.testing.assert_array_equal(drawn.masks[::2], ~drawn.masks[1::2])
    assert len({mask.tobytes() for mask in drawn.masks}) == len(drawn.masks)
    sizes = drawn.masks[::2].sum(1)
    assert (np.diff(sizes[drawn.whole // 2 :]) >= 0).all() and sizes.min() >= 1 and sizes.max() <= players / 2
    again = shapley.sample(players, samples, [7, 1])
    np.testing.assert_array_equal(again.masks, drawn.masks)
    assert not np.array_equal(shapley.sample(players, samples, [7, 2]).masks, drawn.masks)
    whole = drawn.masks[: drawn.whole].sum(1)
    assert all((whole == size).sum() == math.comb(players, size) for size in set(whole.tolist()))


def test_the_weight_of_sizes_is_the_kernels():
    players, found = 14, np.zeros(13)
    for seed in range(300):
        drawn = shapley.sample(players, 120, seed)
        found += np.bincount(drawn.masks.sum(1) - 1, drawn.weight, minlength=13)
    wanted = shapley.kernel_weights(players) * [math.comb(players, s) for s in range(1, players)]
    np.testing.assert_allclose(found / 300, wanted / wanted.sum(), rtol=0.03)


@pytest.mark.parametrize(("players", "samples"), [(1, 10), (10, 19)])
def test_too_few_samples_are_refused(players, samples):
    with pytest.raises(ValueError, match="expected two players and twice as many samples"):
        shapley.sample(players, samples, 0)


@pytest.mark.parametrize(("players", "samples"), [(1, 10), (10, 35)])
def test_fewer_samples_than_four_orders_cost_are_refused(players, samples):
    with pytest.raises(ValueError, match="expected two players and 4"):
        shapley.orders(players, samples, 0)


@settings(max_examples=40, deadline=None)
@given(players=st.integers(3, 20), extra=st.integers(0, 200), seed=st.integers(0, 10**6))
def test_local_accuracy_of_estimates(players, extra, seed):
    game = Unanimous(seed, players, 30, min(players, 6))
    total = float(np.diff(game(np.stack([np.zeros(players), np.ones(players)])))[0])
    drawn = shapley.sample(players, 2 * players + extra, seed)
    found = shapley.regression(drawn, with_ends(game, drawn.masks))
    orders = shapley.orders(players, 4 * players + extra, seed)
    assert orders.size - len(orders) <= 4 * players + extra
    other = shapley.by_orders(orders, with_ends(game, shapley.beginnings(orders)))
    for each in (found, other):
        assert np.isfinite(each.values).all() and np.isfinite(each.error).all()
        assert each.values.sum() == pytest.approx(total, abs=1e-11 * (1 + np.abs(each.values).sum()))


@settings(max_examples=30, deadline=None)
@given(players=st.integers(2, 8), seed=st.integers(0, 10**6))
def test_missingness_symmetry_and_consistency(players, seed):
    random = np.random.default_rng(seed)
    masks, base = shapley.all_coalitions(players), table(seed, players - 1)
    missing = values_of(lambda mask: base(mask[1:]), masks)
    assert shapley.Estimate.exact(missing).values[0] == 0
    alike = values_of(lambda mask: base(np.append(mask[2:], mask[0] + mask[1] == 2)) if players > 2 else 0.0, masks)
    found = shapley.Estimate.exact(alike).values
    assert found[0] == pytest.approx(found[1], abs=1e-13)
    plain = random.normal(size=len(masks))
    more = plain + np.where(masks[:, 0], np.abs(random.normal(size=len(masks))), 0)
    assert shapley.Estimate.exact(more).values[0] >= shapley.Estimate.exact(plain).values[0]


@pytest.mark.parametrize("samples", [96, 256, 1024])
def test_estimates_of_a_linear_game_are_exact(samples):
    pay = np.random.default_rng(0).normal(size=42)
    drawn = shapley.sample(42, samples, 1)
    found = shapley.regression(drawn, with_ends(lambda masks: masks @ pay + 3, drawn.masks))
    np.testing.assert_allclose(found.values, pay, atol=1e-10)
    assert found.error.max() < 1e-9


def estimates(kind, game, samples, seed, players=42):
    if kind == "orders":
        orders = shapley.orders(players, samples, seed)
        return shapley.by_orders(orders, with_ends(game, shapley.beginnings(orders)))
    drawn = shapley.sample(players, samples, seed)
    return shapley.regression(drawn, with_ends(game, drawn.masks))


@pytest.mark.parametrize("kind", ["regression", "orders"])
def test_the_standard_error_covers_the_truth(kind):
    # Of pairs of few coalitions it is somewhat too large, never much too small.
    inside, squares, wanted = [], 0.0, 0.0
    for seed in range(24):
        game = Unanimous(seed % 4, 42)
        found = estimates(kind, game, 1024, [seed, 5])
        apart = found.values - game.shapley
        inside.append(np.abs(apart) < 1.96 * found.error)
        squares, wanted = squares + (apart**2).sum(), wanted + (found.error**2).sum()
    assert 0.9 < np.mean(inside) < 0.99
    assert 0.8 < wanted / squares < 1.7


def test_orders_come_with_their_reverse_and_begin_with_their_players():
    orders = shapley.orders(5, 30, 3)
    assert len(orders) == 6 and np.array_equal(orders[::2, ::-1], orders[1::2])
    masks = shapley.beginnings(orders).reshape(6, 4, 5)
    for order, own in zip(orders, masks, strict=True):
        for size, mask in enumerate(own, 1):
            assert set(np.flatnonzero(mask)) == set(order[:size].tolist())


def test_the_mean_over_all_orders_is_the_definition():
    orders = np.array([order for order in permutations(range(4)) if order[0] < order[-1]])
    orders = np.stack([orders, orders[:, ::-1]], 1).reshape(-1, 4)
    game, masks = table(2, 4), shapley.beginnings(orders)
    whole = np.concatenate([np.zeros((1, 4), bool), masks, np.ones((1, 4), bool)])
    found = shapley.by_orders(orders, values_of(game, whole))
    np.testing.assert_allclose(found.values, by_definition(game, 4), atol=1e-12)


def test_sizes_of_subsets_are_all_there():
    every = [*shapley._every(6, 3)]
    assert len(every) == 10 and all(mask[0] for mask in every)
    assert len([*shapley._every(6, 2)]) == len([*combinations(range(6), 2)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("samples", [256, 512, 1024, 2048, 4096])
def test_the_squared_error_is_below_that_of_the_package_shap(samples):
    package = pytest.importorskip("shap", reason="shap is not installed")
    ours = theirs = 0.0
    for seed in range(3):
        game = Unanimous(seed, 42)
        for turn in range(4):
            ours += ((estimates("regression", game, samples, [seed, turn]).values - game.shapley) ** 2).sum()
            np.random.seed(100 * seed + turn)
            explainer = package.KernelExplainer(game, np.zeros((1, 42)))
            found = explainer.shap_values(np.ones((1, 42)), nsamples=samples, l1_reg=False, silent=True)[0]
            theirs += ((found - game.shapley) ** 2).sum()
    print(f"{samples} samples of 42 players: squared error {ours / theirs:.2f} of that of shap")
    assert ours <= theirs
