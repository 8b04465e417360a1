"""Counts and scores of ablation against plain Python over single images."""

import math

import numpy as np
import pytest

from kernels.ablation import KINDS, Predictions, balanced_accuracy, classes_served, random_sets, ranked_sets, ranking

CLASSES, VARIANTS, IMAGES = 5, 4, 40


def drawn(seed=0, classes=CLASSES, absent=()):
    rng = np.random.default_rng(seed)
    label = rng.choice([c for c in range(classes) if c not in absent], IMAGES)
    prediction = rng.integers(0, classes, (IMAGES, VARIANTS))
    above = np.where(prediction == label[:, None], 0, rng.integers(1, 8, prediction.shape))
    return label, prediction, above


def counted(label, prediction, above, classes=CLASSES):
    counts = Predictions.zeros(prediction.shape[1], classes)
    counts.update(label, prediction, above)
    return counts


def test_scores_as_by_hand():
    label, prediction, above = drawn()
    counts = counted(label, prediction, above)
    for v in range(VARIANTS):
        right = [p == t for p, t in zip(prediction[:, v], label, strict=True)]
        assert counts.accuracy[v] == sum(right) / IMAGES
        assert counts.top5_accuracy[v] == sum(a < 5 for a in above[:, v]) / IMAGES
        for c in range(CLASSES):
            pairs = [(t == c, p == c) for t, p in zip(label, prediction[:, v], strict=True)]
            tp, fp = pairs.count((True, True)), pairs.count((False, True))
            fn, tn = pairs.count((True, False)), pairs.count((False, False))
            assert counts.recall[v, c] == tp / (tp + fn)
            assert counts.precision[v, c] == tp / (tp + fp)
            assert math.isclose(counts.balanced_accuracy[v, c], (tp / (tp + fn) + tn / (tn + fp)) / 2)


def test_parts_in_any_order_add_up_to_the_whole():
    label, prediction, above = drawn(1)
    whole = counted(label, prediction, above)
    parts = Predictions.zeros(VARIANTS, CLASSES)
    for rows in np.array_split(np.random.default_rng(0).permutation(IMAGES), 7):
        parts.update(label[rows], prediction[rows], above[rows])
    for name, value in vars(whole).items():
        np.testing.assert_array_equal(getattr(parts, name), value)
        assert value.dtype == np.int64


def test_what_is_not_defined_is_nan():
    label, prediction, above = drawn(2, absent=(3,))
    prediction[prediction == 1] = 0
    counts = counted(label, prediction, above)
    assert np.isnan(counts.recall[:, 3]).all() and np.isnan(counts.balanced_accuracy[:, 3]).all()
    assert np.isnan(counts.precision[:, 1]).all() and not np.isnan(counts.recall[:, 1]).any()
    alone = counted(np.zeros(3, int), np.zeros((3, 1), int), np.zeros((3, 1), int), 1)
    assert np.isnan(alone.balanced_accuracy).all() and alone.accuracy == 1
    assert np.isnan(Predictions.zeros(2, 3).accuracy).all()


def test_balanced_accuracy_of_any_leading_dimensions():
    value = balanced_accuracy(np.full((2, 3, 4), 5), np.full((2, 3, 4), 7), np.full(4, 10), 40)
    assert value.shape == (2, 3, 4)
    np.testing.assert_allclose(value, (5 / 10 + 28 / 30) / 2)


def test_ranking_is_stable_and_knows_what_is_undefined():
    loss = np.array([[0.0, np.nan, 0.1], [0.3, np.nan, 0.1], [-0.2, 0.1, 0.2], [0.3, 0.0, 0.1]])
    assert ranking(loss).tolist() == [[1, 3, 0, 2], [-1] * 4, [2, 0, 1, 3]]


def test_ranked_sets_as_by_hand():
    order = np.array([[1, 3, 0, 2], [-1, -1, -1, -1], [2, 0, 1, 3]])
    sets = ranked_sets(order, [1, 3])
    assert sets.shape == (3, 2, 3, 4)
    for c in (0, 2):
        for s, size in enumerate((1, 3)):
            first, last = set(order[c, :size]), set(order[c, -size:])
            removed = dict(zip(KINDS, (set(np.flatnonzero(each)) for each in sets[:, s, c]), strict=True))
            assert removed == {"remove_most": first, "keep_most": set(range(4)) - first, "remove_least": last}
    assert not sets[:, :, 1].any()


def test_random_sets_are_nested_seeded_and_of_their_size():
    sets = random_sets(20, [1, 5, 12], 10, seed=3)
    assert sets.shape == (10, 2, 3, 20)
    assert (sets[:, 0].sum(-1) == [1, 5, 12]).all()
    np.testing.assert_array_equal(sets[:, 1], ~sets[:, 0])
    assert (sets[:, 0, 0] <= sets[:, 0, 1]).all() and (sets[:, 0, 1] <= sets[:, 0, 2]).all()
    assert len({tuple(np.flatnonzero(one)) for one in sets[:, 0, 2]}) == 10
    np.testing.assert_array_equal(sets, random_sets(20, [1, 5, 12], 10, seed=3))
    assert not np.array_equal(sets, random_sets(20, [1, 5, 12], 10, seed=4))
    assert random_sets(20, [1], 0, seed=0).shape == (0, 2, 1, 20)


def test_classes_served_counts_what_is_lost_only():
    loss = np.array([[0.5, 0.1], [0.2, 0.0], [0.1, np.nan], [0.0, 0.3]])
    loss = np.where(np.isnan(loss), -0.1, loss)
    order = ranking(loss)
    assert classes_served(order, loss, among=2).tolist() == [2, 1, 0, 1]
    assert classes_served(order, loss, among=4).tolist() == [2, 1, 1, 1]
    nothing = np.full((4, 1), np.nan)
    assert classes_served(ranking(nothing), nothing).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("classes", [2, 1000])
def test_labels_and_predictions_of_any_width(classes):
    label, prediction, above = drawn(5, classes)
    counts = counted(label, prediction.astype(np.int16), above.astype(np.int16), classes)
    assert counts.predicted.sum() == IMAGES * VARIANTS and counts.images.sum() == IMAGES
