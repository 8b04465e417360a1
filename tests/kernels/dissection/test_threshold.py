"""Exact thresholds against sorting everything; certificates; merging; torch against numba."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from dissection_oracles import KINDS, activations
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.dissection.brackets import BINS, Bracket, Tail, Thresholds, allowed
from kernels.dissection.half import HIGHEST, LOWEST, ZERO, code, value
from kernels.dissection.threshold import count_tail, sample_bracket
from kernels.dissection.upsample import Border, Size, upsample

EVERYTHING = (LOWEST, HIGHEST + 1)


def by_sorting(
    activation: NDArray[np.float16], size: Size, border: Border, quantile: str
) -> tuple[NDArray[np.float16], list[int]]:
    """Thresholds and how many values are above each, by definition."""
    values = upsample(activation, size, border).transpose(1, 0, 2, 3).reshape(activation.shape[1], -1).astype(float)
    rank = int(Fraction(quantile) * values.shape[1])
    threshold = -np.sort(-values, axis=1)[:, rank]
    return threshold.astype(np.float16), [int((row > t).sum()) for row, t in zip(values, threshold, strict=True)]


def passes(shards: list[NDArray[np.float16]], bracket: Bracket, size: Size, border: Border, quantile: float) -> tuple:
    """Count until every unit is certified: thresholds, active counts, passes."""
    units = np.arange(shards[0].shape[1])
    threshold, active = np.full(len(units), np.nan, np.float16), np.zeros(len(units), np.int64)
    rounds = 0
    while len(units):
        rounds += 1
        assert rounds <= 12
        tails = [count_tail(shard[:, units], bracket, size, border) for shard in shards]
        tail = tails[0]
        for other in tails[1:]:
            tail = tail.merge(other)
        found = tail.result(quantile)
        threshold[units[found.certified]] = found.threshold[found.certified]
        active[units[found.certified]] = found.active[found.certified]
        bracket, units = tail.refine(quantile)[~found.certified], units[~found.certified]
    return threshold, active, rounds


@settings(deadline=None, max_examples=120)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(KINDS),
    st.sampled_from(["0.01", "0.005", "0.3", "0.0001", "0.9"]),
    st.integers(1, 5),
    st.integers(0, 2**32 - 1),
)
def test_thresholds_are_those_of_sorting(
    shape: tuple[int, int, int, int],
    size: Size,
    border: Border,
    kind: str,
    quantile: str,
    sampled: int,
    seed: int,
) -> None:
    activation = activations(seed, shape, kind)
    bracket = sample_bracket(activation[:sampled], size, border, float(quantile))
    shards = [activation[:1], activation[1:]] if shape[0] > 1 else [activation]
    threshold, active, _ = passes(shards, bracket, size, border, float(quantile))
    expected, above = by_sorting(activation, size, border, quantile)
    assert np.array_equal(code(threshold), code(expected))
    assert active.tolist() == above


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KINDS), st.integers(LOWEST, HIGHEST), st.integers(1, 66000), st.integers(0, 2**32 - 1))
def test_any_first_bracket_ends_at_the_same_threshold(kind: str, floor: int, width: int, seed: int) -> None:
    activation = activations(seed, (3, 2, 4, 4), kind)
    bracket = Bracket(np.full(2, floor), np.full(2, min(floor + width, HIGHEST + 1)))
    threshold, active, _ = passes([activation], bracket, (8, 8), "zeros", 0.01)
    expected, above = by_sorting(activation, (8, 8), "zeros", "0.01")
    assert np.array_equal(code(threshold), code(expected))
    assert active.tolist() == above


def test_the_zero_border_counts_below_zero_too() -> None:
    """With every value negative, only what blends with the border comes near 0: the top quantile lies there."""
    activation = activations(1, (4, 3, 6, 6), "negative")
    shards, everything = [activation], Bracket(np.full(3, EVERYTHING[0]), np.full(3, EVERYTHING[1]))
    zeros, _, _ = passes(shards, everything, (24, 24), "zeros", 0.02)
    edge, _, _ = passes(shards, everything, (24, 24), "edge", 0.02)
    assert np.array_equal(zeros, by_sorting(activation, (24, 24), "zeros", "0.02")[0])
    assert np.array_equal(edge, by_sorting(activation, (24, 24), "edge", "0.02")[0])
    assert np.all(zeros.astype(float) > edge.astype(float))


def test_native_positions_are_the_values_themselves() -> None:
    activation = activations(2, (50, 3, 5, 4), "normal")
    bracket = sample_bracket(activation, (5, 4), "zeros", 0.005)
    threshold, active, _ = passes([activation], bracket, (5, 4), "zeros", 0.005)
    values = np.sort(activation.transpose(1, 0, 2, 3).reshape(3, -1), axis=1)
    assert np.array_equal(threshold, values[:, -(5 + 1)])
    assert active.tolist() == [5, 5, 5]


def test_a_representative_sample_needs_one_pass_and_few_bins() -> None:
    activation = np.maximum(activations(3, (96, 24, 7, 7), "normal"), np.float16(0))
    bracket = sample_bracket(activation[::2], (28, 28), "edge", 0.01)
    assert np.all(bracket.shift <= 1)
    _, _, rounds = passes([activation], bracket, (28, 28), "edge", 0.01)
    assert rounds <= 2
    certified = count_tail(activation, bracket, (28, 28), "edge").result(0.01).certified
    assert certified.mean() > 0.9


def test_a_unit_that_seldom_fires_is_certified_at_zero_in_one_pass() -> None:
    activation = np.zeros((100, 2, 8, 8), np.float16)
    activation[7, 0, 3, 3] = 5
    bracket = sample_bracket(activation[::10], (32, 32), "edge", 0.01)
    found = count_tail(activation, bracket, (32, 32), "edge").result(0.01)
    assert found.certified.all()
    assert found.threshold.tolist() == [0, 0]
    assert found.active[0] > 0
    assert found.active[1] == 0


def test_merging_in_any_order_gives_the_same_bits() -> None:
    activation = activations(4, (12, 5, 5, 5), "relu")
    bracket = sample_bracket(activation[:4], (20, 15), "edge", 0.02)
    shards = [count_tail(activation[k : k + 3], bracket, (20, 15), "edge") for k in range(0, 12, 3)]
    shards = [pickle.loads(pickle.dumps(shard)) for shard in shards]
    a, b, c, d = shards
    one, other = a.merge(b).merge(c).merge(d), d.merge(b.merge(a)).merge(c)
    whole = count_tail(activation, bracket, (20, 15), "edge")
    assert np.array_equal(one.count, other.count)
    assert np.array_equal(one.count, whole.count)
    assert one.positions == whole.positions == 12 * 300
    assert one.count.dtype == np.int64


def test_tails_stay_small_however_wide_the_bracket() -> None:
    bracket = Bracket(np.array([LOWEST, ZERO, ZERO]), np.array([HIGHEST + 1, ZERO + 1, ZERO + BINS]))
    assert np.diff(bracket.offset).max() <= BINS + 1
    assert bracket.shift.tolist() == [5, 0, 0]
    assert np.diff(bracket.offset).tolist()[1:] == [2, BINS + 1]


def test_a_value_at_the_ceiling_of_a_coarse_bracket_is_above_it() -> None:
    bracket = Bracket(np.array([ZERO]), np.array([ZERO + 4097]))
    assert bracket.shift.tolist() == [2]
    for at, expected in ((ZERO + 4096, -2), (ZERO + 4097, -1)):
        count = count_tail(np.full((1, 1, 2, 2), value(at)), bracket, (4, 4), "edge").count
        assert count[expected] == count.sum() == 16


def test_what_does_not_fit_is_refused() -> None:
    activation = activations(5, (2, 3, 4, 4), "normal")
    bracket = sample_bracket(activation, (8, 8), "edge", 0.1)
    other = Bracket(bracket.floor - 1, bracket.ceiling)
    with pytest.raises(ValueError, match="different brackets"):
        count_tail(activation, bracket, (8, 8), "edge").merge(count_tail(activation, other, (8, 8), "edge"))
    with pytest.raises(ValueError, match="for 3 units, the activations have 2"):
        count_tail(activation[:, :2], bracket, (8, 8), "edge")
    with pytest.raises(ValueError, match="expected float16"):
        count_tail(activation.astype(np.float32), bracket, (8, 8), "edge")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantile is 1"):
        sample_bracket(activation, (8, 8), "edge", 1.0)
    with pytest.raises(ValueError, match="at least one image"):
        sample_bracket(activation[:0], (8, 8), "edge", 0.01)
    with pytest.raises(ValueError, match="floor below"):
        Bracket(np.array([5]), np.array([5]))


def test_a_part_is_taken_off_again():
    rng = np.random.default_rng(5)
    activation = rng.normal(size=(9, 3, 4, 4)).astype(np.float16)
    bracket = sample_bracket(activation[:4], (8, 8), "edge", 0.1)
    every, rest = (count_tail(maps, bracket, (8, 8), "edge") for maps in (activation, activation[3:]))
    first = count_tail(activation[:3], bracket, (8, 8), "edge")
    left = every.without(first)
    assert left.positions == rest.positions
    np.testing.assert_array_equal(left.count, rest.count)
    with pytest.raises(ValueError, match="not counted on a part of the same images"):
        first.without(every)
    with pytest.raises(ValueError, match="different brackets"):
        every.without(count_tail(activation, Bracket(bracket.floor - 1, bracket.ceiling), (8, 8), "edge"))


def test_more_bins_prove_in_one_pass_what_few_do_not():
    rng = np.random.default_rng(6)
    activation = rng.normal(size=(5, 2, 6, 6)).astype(np.float16)
    everything = np.full(2, LOWEST), np.full(2, HIGHEST + 1)
    few, many = (count_tail(activation, Bracket(*everything, bins), (6, 6), "edge") for bins in (BINS, 1 << 16))
    assert not few.result(0.1).certified.any() and many.result(0.1).certified.all()
    narrow = sample_bracket(activation, (6, 6), "edge", 0.1)
    np.testing.assert_array_equal(
        many.result(0.1).threshold, count_tail(activation, narrow, (6, 6), "edge").result(0.1).threshold
    )
    with pytest.raises(ValueError, match="different brackets"):
        few.merge(many)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_value_that_is_not_finite_is_named(value: float, device: str) -> None:
    activation = activations(6, (3, 4, 5, 5), "relu")
    activation[2, 1, 4, 0] = value
    bracket = Bracket(np.full(4, HIGHEST), np.full(4, HIGHEST + 1))
    with pytest.raises(ValueError, match="image 2, unit 1"):
        count_tail(activation, bracket, (5, 5), "edge", device)


@pytest.mark.parametrize(("quantile", "positions", "expected"), [(0.29, 100, 29), (0.01, 300, 3), (0.005, 199, 0)])
def test_a_quantile_is_the_decimal_that_was_written(quantile: float, positions: int, expected: int) -> None:
    assert allowed(quantile, positions) == expected


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 17), st.integers(1, 17)),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(KINDS),
    st.integers(LOWEST, HIGHEST),
    st.integers(1, 66000),
    st.integers(0, 2**32 - 1),
)
def test_torch_counts_the_same_integers(
    shape: tuple[int, int, int, int], size: Size, border: Border, kind: str, floor: int, width: int, seed: int
) -> None:
    activation = activations(seed, shape, kind)
    units = shape[1]
    bracket = Bracket(np.full(units, floor), np.full(units, min(floor + width, HIGHEST + 1)))
    mine = count_tail(activation, bracket, size, border)
    its = count_tail(activation, bracket, size, border, "cpu:0")
    assert np.array_equal(mine.count, its.count)
    assert mine.positions == its.positions
    assert mine.count.dtype == its.count.dtype


def test_results_say_what_is_not_certified() -> None:
    bracket = Bracket(np.array([ZERO, ZERO + 10]), np.array([ZERO + 1, ZERO + 20]))
    tail = Tail(bracket, 100, np.concatenate([[90, 10], np.zeros(11)]).astype(np.int64))
    found: Thresholds = tail.result(0.1)
    assert found.certified.tolist() == [True, False]
    assert found.active.tolist() == [10, -1]
    assert np.isnan(found.threshold[1])
    assert tail.result(0.05).certified.tolist() == [False, False]
    assert tail.refine(0.05).floor.tolist() == [ZERO + 1, ZERO + 10 - BINS]
