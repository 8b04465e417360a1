"""Multipliers against the laws that define them, derivatives, and Shapley values by enumeration."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from kernels.attribution.maxima import cross_max, shapley_of_max
from kernels.attribution.secants import (
    derivative,
    of_logsumexp,
    of_relu,
    of_softmax,
    secant,
    sent_through_norm,
    sent_through_softmax,
)


def drawn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FUNCTIONS = {
    "gelu": (F.gelu, "smooth"),
    "silu": (F.silu, "smooth"),
    "exp": (torch.exp, "smooth"),
    "square": (torch.square, "smooth"),
    "hardswish": (F.hardswish, "kinked"),
    "clamp": (lambda u: u.clamp(-0.5, 0.5), "kinked"),
    "leaky": (lambda u: F.leaky_relu(u, 0.2), "kinked"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_secant_is_the_slope_between_both_and_the_derivative_where_they_meet(name):
    function, kind = FUNCTIONS[name]
    u0 = drawn(200)
    for distance in (1.0, 1e-3, 1e-6, 1e-9, 1e-12, 0.0):
        u = u0 + drawn(200, seed=1, scale=distance)
        found = secant(function, u, u0, function(u), function(u0), kind)
        assert (found * (u - u0) - (function(u) - function(u0))).abs().max() < 1e-14
        if distance == 0 or (distance <= 1e-6 and kind == "smooth"):
            assert (found - derivative(function, u0)).abs().max() < max(30 * distance, 1e-9)


def test_one_reference_stands_for_all_images():
    u, u0 = drawn(4, 5), drawn(1, 5, seed=1)
    for found in (
        secant(torch.tanh, u, u0, u.tanh(), u0.tanh(), "smooth"),
        of_relu(u, u0, u.relu(), u0.relu()),
        of_logsumexp(u, u0, 1)[0],
        of_softmax(u, u0, 1)[0],
    ):
        assert found.shape == u.shape


def test_a_rectifier_has_its_gradient_where_nothing_changes():
    u, u0 = torch.tensor([2.0, -1, 0, 3, -3, 1]), torch.tensor([2.0, -1, 0, -1, 1, 1 - 1e-7])
    assert of_relu(u, u0, u.relu(), u0.relu()).tolist() == [1, 0, 0, 0.75, 0.25, 1]


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 30.0, 1e3, 1e5])
def test_softmax_adds_up_at_all_sizes(scale):
    u, u0, sent = drawn(6, 40, scale=scale), drawn(6, 40, seed=1, scale=scale), drawn(6, 40, seed=2)
    found = sent_through_softmax(sent, *of_softmax(u, u0, 1), 1)
    wanted = (sent * (u.softmax(1) - u0.softmax(1))).sum(1)
    assert ((found * (u - u0)).sum(1) - wanted).abs().max() < 1e-13
    inner, high, low = of_logsumexp(u, u0, 1)
    assert ((inner * (u - u0)).sum(1) - (high - low)[:, 0]).abs().max() < 1e-14 * max(scale, 1)
    assert (inner >= 0).all()


def test_softmax_of_shifted_values_and_of_masked_ones():
    u, u0, sent = drawn(2, 5), drawn(2, 5, seed=1), drawn(2, 5, seed=2)
    found = sent_through_softmax(sent, *of_softmax(u, u0, 1), 1)
    shifted = sent_through_softmax(sent, *of_softmax(u, u0 + 3, 1), 1)
    assert ((shifted * (u - u0 - 3)).sum(1) - (found * (u - u0)).sum(1)).abs().max() < 1e-14
    masked = torch.tensor([False, False, True, False, True])
    given, given0 = u.masked_fill(masked, -math.inf), u0.masked_fill(masked, -math.inf)
    found = sent_through_softmax(sent, *of_softmax(given, given0, 1), 1)
    rest = sent_through_softmax(sent[:, ~masked], *of_softmax(u[:, ~masked], u0[:, ~masked], 1), 1)
    assert torch.equal(found[:, masked], torch.zeros(2, 2, dtype=torch.float64))
    assert (found[:, ~masked] - rest).abs().max() < 1e-15


def test_softmax_has_its_gradient_where_nothing_changes():
    u, sent = drawn(3, 7), drawn(3, 7, seed=2)
    given = u.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(given.softmax(1), given, sent)
    assert (sent_through_softmax(sent, *of_softmax(u, u, 1), 1) - wanted).abs().max() < 1e-15


@pytest.mark.parametrize("centred", [True, False])
def test_norms_add_up_and_have_their_gradient_where_nothing_changes(centred):
    def parts(x):
        d = x - x.mean((1, 2), keepdim=True) if centred else x
        return d, ((d * d).mean((1, 2), keepdim=True) + 1e-3).rsqrt()

    x, x0, sent = drawn(3, 4, 5), drawn(3, 4, 5, seed=1), drawn(3, 4, 5, seed=2)
    (d, r), (d0, r0) = parts(x), parts(x0)
    found = sent_through_norm(sent, d + d0, r, r0, (1, 2), centred)
    assert ((found * (x - x0)).sum((1, 2)) - (sent * (d * r - d0 * r0)).sum((1, 2))).abs().max() < 1e-13
    given = x.clone().requires_grad_()
    d, r = parts(given)
    (wanted,) = torch.autograd.grad(d * r, given, sent)
    d, r = parts(x)
    assert (sent_through_norm(sent, 2 * d, r, r, (1, 2), centred) - wanted).abs().max() < 1e-13


def by_enumeration(x, x0):
    """The Shapley values of max, over all orders."""
    count = len(x)
    found = [0.0] * count
    for order in itertools.permutations(range(count)):
        now = list(x0)
        for player in order:
            before = max(now)
            now[player] = x[player]
            found[player] += max(now) - before
    return [each / math.factorial(count) for each in found]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_the_shapley_value_of_a_maximum(count):
    generator = torch.Generator().manual_seed(count)
    x, x0 = (torch.randint(-3, 4, (30, count), generator=generator).double() for _ in range(2))
    found = shapley_of_max(x, x0) * (x - x0)
    wanted = torch.tensor([by_enumeration(a.tolist(), b.tolist()) for a, b in zip(x, x0, strict=True)], dtype=x.dtype)
    assert (found - wanted).abs().max() < 1e-14
    padded = torch.full((30, 2), -math.inf).double()
    assert (
        shapley_of_max(torch.cat([padded, x], 1), torch.cat([padded, x0], 1))[:, 2:] * (x - x0) - wanted
    ).abs().max() < 1e-14


def test_an_input_at_its_reference_has_the_derivative_of_its_shapley_value():
    x, x0 = drawn(60, 4), drawn(60, 4, seed=1)
    x0[:, 1] = x[:, 1]
    step = torch.zeros_like(x)
    step[:, 1] = 1e-6
    assert (shapley_of_max(x + step, x0) - shapley_of_max(x, x0))[:, 1].abs().max() < 1e-4
    assert shapley_of_max(x, x0)[:, 1].max() == 1


def test_a_large_window_is_exact():
    x, x0 = drawn(50, 49), drawn(50, 49, seed=1)
    multipliers = shapley_of_max(x, x0)
    assert ((multipliers * (x - x0)).sum(1) - (x.amax(1) - x0.amax(1))).abs().max() < 1e-14
    assert multipliers.min() >= 0 and multipliers.max() <= 1


def test_the_cross_maximum():
    u, u0 = torch.tensor([[3.0, 1, 5, 5], [1.0, 2, 3, 4]]), torch.tensor([[1.0, 4, 5, 2], [1.0, 2, 3, 4]])
    at, at0 = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1, 2], [1, 3]])
    y, y0 = u.gather(1, at), u0.gather(1, at0)
    place, slope = cross_max(u, u0, y, y0, at, at0)
    # 4 falls to 3 because the second input fell by 3; the others stay, at one that stays.
    assert place.tolist() == [[1, 2], [1, 3]] and slope.tolist() == [[pytest.approx(1 / 3), 1], [1, 1]]
