"""Receptive fields: closed forms, and what is undefined."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.locality.receptive_field import centre, extent


def binomial(k, d):
    """The field of d uniform k x k convolutions, which is that of one axis times that of the other."""
    line = np.ones(1)
    for _ in range(d):
        line = np.convolve(line, np.ones(k) / k)
    return np.outer(line, line)


@pytest.mark.parametrize(("k", "d"), [(3, 1), (3, 10), (5, 4), (2, 7)])
def test_uniform_convolutions(k, d):
    found = extent(binomial(k, d))
    assert found.deviation == pytest.approx([math.sqrt(d * (k**2 - 1) / 12)] * 2, rel=1e-12)


def test_a_gaussian_reaches_two_and_a_half_deviations():
    """exp(-r^2 / 2 s^2) = 1 - 0.9545 at r = s sqrt(-2 log 0.0455)."""
    y, x = np.mgrid[-200:201, -200:201]
    found = extent(np.exp(-(y**2 + x**2) / (2 * 30.0**2)))
    assert found.radius == pytest.approx(30 * math.sqrt(-2 * math.log(1 - 0.9545)), rel=1e-3)
    assert found.area == pytest.approx(math.pi * found.radius**2, rel=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=30, deadline=None)
def test_brute_force(height, width, seed):
    field = np.random.default_rng(seed).random((height, width)) ** 4
    found = extent(field)
    counted = sum(value > (1 - 0.9545) * field.max() for value in field.ravel())
    assert found.area == counted
    total = mean = square = 0.0
    for y in range(height):
        for x in range(width):
            total, mean, square = total + field[y, x], mean + y * field[y, x], square + y * y * field[y, x]
    assert found.deviation[0] == pytest.approx(math.sqrt(max(square / total - (mean / total) ** 2, 0)), abs=1e-7)
    scaled = extent(field * 1e-30)
    assert scaled.area == found.area and scaled.deviation == pytest.approx(found.deviation)


def test_nothing_at_all():
    found = extent(np.zeros((4, 4)))
    assert math.isnan(found.area) and math.isnan(found.radius) and all(map(math.isnan, found.deviation))


def test_centre():
    assert centre((7, 5)) == (3, 2)
    assert centre((8, 4)) == (4, 2), "the lower right of the four in the middle"
    assert centre((1, 2)) == (0, 1)
