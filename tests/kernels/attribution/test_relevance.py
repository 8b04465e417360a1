"""Shares of a unit's relevance: worked examples, and what is booked."""

import pytest
import torch

from kernels.attribution.relevance import Rule, by_sign, parts, stabilised


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def shared(rule, a, w, bias, relevance):
    """R of each input, that of the bias, and the leak, of one image: entry by entry."""
    a, w, r = double(a), double(w), double(relevance)
    b = None if bias is None else double(bias)
    z = a * w
    p, n = z.clamp(min=0).sum(1), z.clamp(max=0).sum(1)
    y = p + n if b is None else p + n + b
    shares = by_sign(rule, p, n, b, y, r / y)
    down = torch.zeros_like(r) if shares.negative is None else shares.negative
    inputs = torch.where(z > 0, z * shares.positive[:, None], z * down[:, None]).sum(0)
    kept = torch.zeros(1) if shares.bias is None else shares.bias
    lost = torch.zeros(1) if shares.leak is None else shares.leak
    return inputs, float(kept.sum()), float(lost.sum())


A, W, B, R = [1, 2, 3], [[1, -1, 2], [-2, 1, 1]], [1, -1], [5, 3]
LAYER = [
    (1.0, None, [0.7142857142857143, 1.2, 6.085714285714285], 0),
    (1.0, B, [0.625, 1.2, 5.55], 0.625),
    (2.0, None, [-1.5714285714285714, -2.6, 12.17142857142857], 0),
    (2.0, B, [-0.75, -2.6, 11.1], 0.25),
    (1.5, None, [-0.42857142857142855, -0.7, 9.128571428571428], 0),
    (1.5, B, [-0.0625, -0.7, 8.325], 0.4375),
]


@pytest.mark.parametrize(("alpha", "bias", "wanted", "kept"), LAYER)
def test_alpha_beta_of_a_layer(alpha, bias, wanted, kept):
    found, of_bias, lost = shared(Rule(alpha=alpha), A, W, bias, R)
    torch.testing.assert_close(found, double(wanted), atol=1e-14, rtol=0)
    assert of_bias == pytest.approx(kept, abs=1e-14) and lost == pytest.approx(0, abs=1e-14)
    assert float(found.sum()) + of_bias == pytest.approx(8, abs=1e-13)


def test_a_missing_sign_is_lost_and_booked():
    found, _, lost = shared(Rule(alpha=2.0), [-1, 2, -3], W, None, R)
    torch.testing.assert_close(found, double([2.4444444444444446, 1.8888888888888888, -6.333333333333333]))
    assert lost == pytest.approx(8 + 2, abs=1e-13)
    found, _, lost = shared(Rule(alpha=2.0), [1, 1], [[1, 2]], None, [4])
    torch.testing.assert_close(found, double([2.6666666666666665, 5.333333333333333]))
    assert lost == pytest.approx(4 - 8, abs=1e-13)


def test_contributions_count_by_their_own_sign():
    found, _, lost = shared(Rule(alpha=2.0), [-1, 2, 3], [[1, -1, 2], [-2, 1, -1]], None, R)
    torch.testing.assert_close(found, double([1.3333333333333333, -0.3333333333333333, 7]), atol=1e-14, rtol=0)
    assert lost == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("bias", [None, B, [-20, 30]])
def test_gamma_favours_the_sign_of_the_unit(bias):
    found, kept, lost = shared(Rule("gamma", gamma=0.5), A, W, bias, R)
    z = double(A) * double(W)
    b = double([0, 0] if bias is None else bias)
    wanted, of_bias = torch.zeros(3, dtype=torch.float64), 0.0
    for unit in range(2):
        sign = (z[unit].sum() + b[unit]).sign()
        with_more = torch.where(z[unit] * sign > 0, 1.5 * z[unit], z[unit])
        more = 1.5 * b[unit] if b[unit] * sign > 0 else b[unit]
        share = R[unit] / (with_more.sum() + more)
        wanted += with_more * share
        of_bias += float(more * share)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    assert kept == pytest.approx(of_bias, abs=1e-13) and lost == 0
    assert float(found.sum()) + kept == pytest.approx(8, abs=1e-12)


def test_epsilon_dampens_and_books_what_it_takes():
    y, c, bias = double([4, -2, 0]), double([1, 3, 5]), double([1, 1, 1])
    shares = stabilised(0.5, bias, y, c)
    torch.testing.assert_close(shares.positive, double([4 / 4.5, 3 * -2 / -2.5, 0]))
    torch.testing.assert_close(shares.leak, c * y - shares.positive * y)
    torch.testing.assert_close(shares.bias, shares.positive)
    assert stabilised(0.0, None, y, c).positive is c


def test_sums_that_are_rounding_are_zero():
    z, total = double([-1, -1, 1, 3]), double([1 + 1e-16, 1 + 1e-3, 1, 5])
    p, n = parts(z, total)
    assert p.tolist() == pytest.approx([0, 5e-4, 1, 4]) and p[0] == 0
    assert n.tolist() == pytest.approx([-1, -1.0005, 0, -1]) and n[2] == 0
