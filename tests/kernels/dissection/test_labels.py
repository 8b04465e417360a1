"""Labels of units against plain loops; Student's t against published tables; intervals against their promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dissection.counts import Counts, iou
from kernels.dissection.labels import NONE, best_concept, ceiling, held_out, interval, label_units, student_t

CATEGORY = np.array([0, 1, 1])


def random_counts(seed: int, groups: int = 6, units: int = 5) -> Counts:
    """Counts that agree with one another, with empty groups, silent units and absent concepts among them."""
    rng = np.random.default_rng(seed)
    counts = Counts.zeros(groups, units, 3, 2)
    for g in range(groups):
        for _ in range(rng.integers(0, 3)):
            labels = np.stack([rng.integers(0, 2, 30), rng.choice([0, 2, 3], 30) * rng.integers(0, 2)])
            active = rng.random((units, 30)) < rng.choice([0, 0.1, 0.5], (units, 1))
            counts.pixels[g] += 30
            counts.unit_area[g] += active.sum(axis=1)
            for k in range(2):
                counts.pixels_in_category[g, k] += 30 * labels[k].any()
                counts.unit_area_in_category[g, :, k] += active.sum(axis=1) * labels[k].any()
            for c, k in enumerate(CATEGORY):
                counts.concept_area[g, c] += (labels[k] == c + 1).sum()
                counts.intersection[g, :, c] += (active & (labels[k] == c + 1)).sum(axis=1)
    return counts


def plain_iou(counts: Counts, groups: list[int], unit: int, concept: int, union: str) -> float:
    together = sum(int(counts.intersection[g, unit, concept]) for g in groups)
    if union == "all":
        area = sum(int(counts.unit_area[g, unit]) for g in groups)
    else:
        area = sum(int(counts.unit_area_in_category[g, unit, CATEGORY[concept]]) for g in groups)
    either = area + sum(int(counts.concept_area[g, concept]) for g in groups) - together
    return together / either if either else 0.0


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["all", "category"]))
def test_labels_are_those_of_plain_loops(seed: int, union: str) -> None:
    counts = random_counts(seed)
    labels = label_units(counts, CATEGORY, union)  # type: ignore[arg-type]
    everything = list(range(6))
    held = [g for g in everything if counts.pixels[g]]
    for unit in range(5):
        scores = [plain_iou(counts, everything, unit, c, union) for c in range(3)]
        best = scores.index(max(scores)) if max(scores) > 0 else NONE
        assert labels.column[unit] == best
        assert labels.iou[unit] == max(scores)
        even = [plain_iou(counts, [0, 2, 4], unit, c, union) for c in range(3)]
        odd = plain_iou(counts, [1, 3, 5], unit, even.index(max(even)), union)
        defined = max(even) > 0 and counts.pixels[1::2].sum() > 0
        assert labels.held_out[unit] == odd if defined else np.isnan(labels.held_out[unit])
        if best == NONE or len(held) < 2:
            assert np.isnan(labels.low[unit])
            assert np.isnan(labels.high[unit])
        else:
            without = [plain_iou(counts, [g for g in held if g != left], unit, best, union) for left in held]
            mean = sum(without) / len(held)
            error = ((len(held) - 1) / len(held) * sum((one - mean) ** 2 for one in without)) ** 0.5
            reach = student_t(len(held) - 1) * error
            assert labels.low[unit] == pytest.approx(max(scores[best] - reach, 0), abs=1e-12)
            assert labels.high[unit] == pytest.approx(min(scores[best] + reach, 1), abs=1e-12)
        if best == NONE:
            assert np.isnan(labels.ceiling[unit])
        else:
            assert labels.iou[unit] <= labels.ceiling[unit] <= 1


def test_ties_go_to_the_first_concept() -> None:
    column, best = best_concept(np.array([[0.25, 0.5, 0.5], [0, 0, 0], [0.1, 0.1, 0.1]]))
    assert column.tolist() == [1, NONE, 0]
    assert best.tolist() == [0.5, 0, 0.1]


def test_the_ceiling_is_reached_when_one_area_holds_the_other() -> None:
    counts = Counts.zeros(2, 2, 1, 1)
    counts.pixels[:] = 1000
    counts.unit_area[:] = [10, 10]
    counts.unit_area_in_category[:] = 10
    counts.concept_area[:] = 300
    counts.intersection[:, 0, 0], counts.intersection[:, 1, 0] = 10, 3
    values = iou(counts, [0])[:, 0]
    limit = ceiling(counts, [0], "all", np.array([0, 0]))
    assert values[0] == limit[0] == limit[1] == 1 / 30
    assert values[1] < limit[1]


def test_held_out_is_free_of_the_bias_of_choosing() -> None:
    """Of 200 concepts that are all chance, the best one's own IoU is far above chance; held out it is not."""
    rng = np.random.default_rng(0)
    units, concepts, groups = 300, 200, 20
    counts = Counts.zeros(groups, units, concepts, 1)
    counts.pixels[:] = 1000
    counts.unit_area[:] = counts.unit_area_in_category[:, :, 0] = 20
    counts.concept_area[:] = 50
    counts.intersection[:] = rng.binomial(20, 0.05, counts.intersection.shape)
    chance = 1 / (20 + 50 - 1)
    labels = label_units(counts, np.zeros(concepts, int))
    assert labels.iou.mean() > 1.5 * chance
    assert held_out(counts, np.zeros(concepts, int)).mean() == pytest.approx(chance, rel=0.05)


def test_intervals_cover_what_they_promise() -> None:
    rng = np.random.default_rng(1)
    units, groups = 2000, 20
    counts = Counts.zeros(groups, units, 1, 1)
    counts.pixels[:] = 10_000
    rate = rng.gamma(9, 1 / 9, (groups, units))
    counts.unit_area[:] = rng.poisson(100 * rate)
    counts.concept_area[:] = 300
    counts.intersection[:, :, 0] = rng.binomial(counts.unit_area, 0.4)
    counts.unit_area_in_category[:, :, 0] = counts.unit_area
    low, high = interval(counts, [0], "all", np.zeros(units, int))
    true = 40 / (100 + 300 - 40)
    assert np.mean((low <= true) & (true <= high)) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize("groups", [0, 1])
def test_fewer_than_two_groups_have_no_interval(groups: int) -> None:
    counts = Counts.zeros(20, 2, 1, 1)
    counts.pixels[:groups], counts.unit_area[:groups], counts.concept_area[:groups] = 10, 5, 5
    counts.intersection[:groups] = 5
    labels = label_units(counts, [0])
    assert np.all(np.isnan(labels.low) & np.isnan(labels.high) & np.isnan(labels.held_out))
    assert labels.iou.tolist() == [groups, groups]


def test_no_concepts_at_all() -> None:
    counts = Counts.zeros(20, 3, 0, 1)
    counts.pixels[:] = 10
    labels = label_units(counts, np.array([], int))
    assert labels.column.tolist() == [NONE] * 3
    assert labels.iou.tolist() == [0, 0, 0]
    for undefined in (labels.held_out, labels.low, labels.high, labels.ceiling):
        assert np.all(np.isnan(undefined))


@pytest.mark.parametrize(
    ("freedom", "expected"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (9, 2.2622), (19, 2.0930), (30, 2.0423)],
)
def test_student_t_is_that_of_the_tables(freedom: int, expected: float) -> None:
    assert student_t(freedom) == pytest.approx(expected, abs=5e-5)
    assert student_t(freedom, 0.99) > student_t(freedom, 0.95)


def test_student_t_has_closed_forms() -> None:
    assert student_t(1) == pytest.approx(math.tan(0.95 * math.pi / 2), rel=1e-12)
    assert student_t(2) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-12)
