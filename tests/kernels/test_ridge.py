"""Ridge classifiers against plain least squares and scikit-learn; sums that merge; what nothing can be fitted on."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import RidgeClassifier

from kernels.ridge import Moments, Ridge, wilson

PENALTIES = (1e-6, 1e-3, 1.0, 10.0)


def drawn(n, features, classes, seed=0, offset=0.0, spread=1.0):
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)])
    centres = rng.standard_normal((classes, features))
    x = offset + spread * (rng.standard_normal((n, features)) + centres[label])
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(label)


def least_squares(x, label, classes, penalty):
    """Scores by `lstsq` on rows that the penalty adds, with features standardised and no penalty on the intercept."""
    x = x.double().numpy()
    n, mean, std = len(x), x.mean(0), x.std(0)
    z = np.divide(x - mean, std, out=np.zeros_like(x), where=std > 0)
    y = np.eye(classes)[label.numpy()]
    rows = np.vstack(
        [
            np.hstack([z, np.ones((n, 1))]),
            np.hstack([math.sqrt(n * penalty) * np.eye(z.shape[1]), np.zeros((z.shape[1], 1))]),
        ]
    )
    targets = np.vstack([y, np.zeros((z.shape[1], classes))])
    solution = np.linalg.lstsq(rows, targets, rcond=None)[0]

    def scores(other):
        other = np.divide(other.double().numpy() - mean, std, out=np.zeros(other.shape), where=std > 0)
        return np.hstack([other, np.ones((len(other), 1))]) @ solution

    return scores


def scores(ridge, x, penalty):
    weight, intercept = ridge.weights(penalty)
    return ((x.double() - ridge.mean) @ weight + intercept).numpy()


@pytest.mark.parametrize(("n", "features"), [(200, 12), (60, 60), (24, 50), (5, 300)])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_scores_are_those_of_least_squares(n, features, penalty):
    x, label = drawn(n, features, 4)
    other, _ = drawn(40, features, 4, seed=1)
    expected = least_squares(x, label, 4, penalty)(other)
    ridge = Ridge.of_images(x, label, 4)
    assert ridge.basis.shape == (features, min(n, features)), "by the dual form where there are fewer images"
    np.testing.assert_allclose(scores(ridge, other, penalty), expected, atol=1e-8 / penalty**0.5)
    np.testing.assert_allclose(
        scores(Ridge.of_moments(Moments.of(x, label, 4)), other, penalty), expected, atol=1e-8 / penalty**0.5
    )


@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
def test_means_a_thousand_times_the_spread(offset):
    x, label = drawn(400, 20, 5, offset=offset)
    moments = Moments.zeros(20, 5)
    for start in range(0, 400, 32):
        moments.update(x[start : start + 32], label[start : start + 32])
    exact = x.double()
    centred = exact - exact.mean(0)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-14)
    np.testing.assert_allclose(moments.scatter, centred.T @ centred, rtol=1e-10, atol=1e-9)
    y = torch.nn.functional.one_hot(label, 5).double()
    np.testing.assert_allclose(moments.cross, centred.T @ (y - y.mean(0)), rtol=1e-10, atol=1e-9)
    assert moments.images == 400 and moments.count.tolist() == np.bincount(label).tolist()
    expected = least_squares(x, label, 5, 1e-3)(x)
    np.testing.assert_allclose(scores(Ridge.of_moments(moments), x, 1e-3), expected, atol=1e-9)


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 60), max_size=4))
@settings(max_examples=30, deadline=None)
def test_any_cut_gives_the_same_sums(seed, cuts):
    x, label = drawn(60, 7, 3, seed=seed, offset=50)
    whole, merged = Moments.of(x, label, 3), Moments.zeros(7, 3)
    bounds = [0, *sorted(cuts), 60]
    parts = [Moments.of(x[a:b], label[a:b], 3) for a, b in itertools.pairwise(bounds)]
    for part in parts[::-1]:
        merged.merge(part)
    for name in ("count", "mean", "scatter", "cross"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [2, 6])
def test_predictions_are_those_of_scikit_learn(classes):
    x, label = drawn(150, 10, classes, offset=3)
    other, other_label = drawn(300, 10, classes, seed=4, offset=3)
    mean, std = x.double().mean(0), x.double().std(0, correction=0)
    ridge = Ridge.of_images(x, label, classes)
    for penalty in PENALTIES:
        theirs = RidgeClassifier(alpha=150 * penalty, solver="svd").fit(((x - mean) / std).numpy(), label.numpy())
        prediction = theirs.predict(((other - mean) / std).numpy())
        right = ridge.right(other, other_label, [penalty])[0].numpy()
        np.testing.assert_array_equal(right, prediction == other_label.numpy())


def test_features_that_never_change_do_not_count():
    x, label = drawn(30, 5, 3)
    # 0.1 + 0.1 + ... / 30 is not 0.1: only differences are exactly zero.
    padded = torch.cat([x, torch.full((30, 1), 0.1), torch.full((30, 1), 1e30)], 1)
    for made in (Ridge.of_images, lambda *a: Ridge.of_moments(Moments.of(*a))):
        ridge = made(padded, label, 3)
        assert ridge.basis[5:].abs().max() == 0
        np.testing.assert_allclose(scores(ridge, padded, 0.1), scores(made(x, label, 3), x, 0.1), atol=1e-12)
    merged = Moments.of(padded[:13], label[:13], 3)
    merged.update(padded[13:], label[13:])
    assert merged.scatter[5:].abs().max() == 0
    nothing = Ridge.of_images(torch.ones(6, 9), torch.tensor([0, 1, 1, 2, 2, 2]), 3)
    assert nothing.right(torch.rand(4, 9), torch.tensor([2, 2, 0, 1]), [1.0]).tolist() == [[True, True, False, False]]


def test_the_penalty_that_is_chosen():
    x, label = drawn(12, 40, 3)
    ridge = Ridge.of_images(x, label, 3)
    other, truth = drawn(500, 40, 3, seed=2)
    counts = ridge.right(other, truth, PENALTIES).sum(1)
    chosen = ridge.choose(other, truth, PENALTIES)
    assert counts[PENALTIES.index(chosen)] == counts.max()
    flat = Ridge.of_images(torch.ones(6, 9), torch.tensor([0, 1, 1, 2, 2, 2]), 3)
    assert flat.choose(torch.ones(4, 9), torch.zeros(4, dtype=torch.int64), PENALTIES) == max(PENALTIES)


def test_no_images():
    empty = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
    assert Moments.of(*empty, 3).images == 0
    with pytest.raises(ValueError, match="no image to fit on"):
        Ridge.of_images(*empty, 3)


def test_wilson():
    # Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I
    for right, images, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        assert wilson(right, images) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20)[1] == 1.0 and np.isnan(wilson(0, 0)).all()
