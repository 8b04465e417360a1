"""The two-layer network that gives any labels, against the matrix of the theorem's proof."""

import time

import numpy as np
import pytest

from kernels.expressivity import evaluate, interpolate, kinks, smallest_eigenvalue, weights_of


def sample(n, d, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, d)), draw.integers(0, 10, n).astype(float)


def network(found, inputs):
    """sum_j w_j max(<a, z> - b_j, 0), as the paper writes it."""
    return np.maximum((inputs @ found.direction)[:, None] - found.bias[None], 0) @ found.weight


@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (40, 2), (700, 3072)])
def test_every_label_is_given_by_2n_plus_d_weights(n, d):
    inputs, labels = sample(n, d)
    found = interpolate(inputs, labels)
    assert found.weights == 2 * n + d
    np.testing.assert_allclose(network(found, inputs), labels, atol=1e-6)
    np.testing.assert_allclose(found(inputs), labels, atol=1e-9)
    others = np.random.default_rng(5).standard_normal((50, d))
    np.testing.assert_allclose(found(others), network(found, others), atol=1e-6)


def test_the_weights_are_those_of_the_triangular_system():
    inputs, labels = sample(30, 5)
    x = np.sort(inputs @ np.ones(5))
    bias = kinks(x)
    matrix = np.maximum(x[:, None] - bias[None], 0)
    assert (bias < x).all() and (bias[1:] > x[:-1]).all()
    np.testing.assert_allclose(weights_of(x, labels, bias), np.linalg.solve(matrix, labels), rtol=1e-6)


def test_fifty_thousand_in_less_than_a_second():
    inputs, labels = sample(50_000, 64)
    began = time.process_time()
    found = interpolate(inputs, labels)
    assert time.process_time() - began < 1
    assert np.abs(found(inputs) - labels).max() < 1e-6
    # The network as it is written, in more digits, on some of them.
    some = slice(0, None, 500)
    x = (inputs @ found.direction)[some].astype(np.longdouble)
    exact = (np.maximum(x[:, None] - found.bias, 0) * found.weight).sum(1)
    assert np.abs(exact - labels[some]).max() < 1e-6


def test_lemma_the_smallest_eigenvalue_is_the_smallest_distance():
    x = np.sort(np.random.default_rng(1).standard_normal(60))
    for bias in (kinks(x), np.concatenate([[x[0] - 1], (x[1:] + x[:-1]) / 2])):
        matrix = np.maximum(x[:, None] - bias[None], 0)
        assert (np.triu(matrix, 1) == 0).all()
        eigenvalues = np.linalg.eigvals(matrix[::-1, ::-1].T)  # in another order: found, not read off
        # Of a matrix that is far from normal: to the digits that the solver has.
        assert smallest_eigenvalue(x, bias) == pytest.approx(np.abs(eigenvalues).min(), rel=1e-6)


def test_kinks_half_way_give_larger_weights():
    inputs, labels = sample(3000, 8)
    x = np.sort(inputs[:, 0])
    half = np.concatenate([[x[0] - 1], (x[1:] + x[:-1]) / 2])
    near = kinks(x)
    assert np.abs(weights_of(x, labels, half)).sum() > 1.5 * np.abs(weights_of(x, labels, near)).sum()


def test_of_several_directions_the_best_conditioned():
    inputs, labels = sample(2000, 6)

    def closest(directions, seed):
        return np.diff(np.sort(inputs @ interpolate(inputs, labels, directions, seed).direction)).min()

    assert np.mean([closest(30, seed) for seed in range(8)]) > 2 * np.mean([closest(1, seed) for seed in range(8)])


def test_inputs_that_occur_twice():
    inputs, labels = sample(20, 3)
    again = np.concatenate([inputs, inputs[4:5]])
    found = interpolate(again, np.concatenate([labels, labels[4:5]]))
    assert found.weights == 2 * 20 + 3
    np.testing.assert_allclose(found(again)[:20], labels, atol=1e-9)
    with pytest.raises(ValueError, match=r"inputs 4 and 20 are equal and have the labels .* no function gives both"):
        interpolate(again, np.concatenate([labels, labels[4:5] + 1]))


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0), r"expected inputs \(n, d\)"),
        (np.zeros((3, 2)), np.zeros(2), r"found \(3, 2\) and \(2,\)"),
        (np.array([[np.nan], [1.0]]), np.zeros(2), r"finite"),
        (np.array([[1e300], [np.nextafter(1e300, 2e300)], [5e-324], [0.0]]), np.zeros(4), r"differ too little"),
    ],
)
def test_what_is_refused(inputs, labels, message):
    with pytest.raises(ValueError, match=message):
        interpolate(inputs, labels)


def test_evaluation_by_prefix_sums():
    draw = np.random.default_rng(2)
    bias, weight, x = np.sort(draw.standard_normal(50)), draw.standard_normal(50), draw.standard_normal(80) * 3
    np.testing.assert_allclose(evaluate(x, bias, weight), np.maximum(x[:, None] - bias, 0) @ weight, atol=1e-12)
