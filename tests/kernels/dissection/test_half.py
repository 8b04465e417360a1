"""float16 codes: every bit pattern, and cuts against numpy's own rounding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dissection import half, loops

EVERY = np.arange(65536, dtype=np.uint16).view(np.float16)
NUMBERS = EVERY[~np.isnan(EVERY)]


def test_codes_order_every_float16() -> None:
    ordered = np.sort(NUMBERS)
    codes = half.code(ordered).astype(int)
    assert np.array_equal(
        np.diff(codes) > 0, np.diff(np.nan_to_num(ordered.astype(float), posinf=1e6, neginf=-1e6)) > 0
    )
    assert np.array_equal(half.value(half.code(NUMBERS)), NUMBERS)
    assert half.code(np.float16(-0.0)) == half.code(np.float16(0.0)) == half.ZERO
    assert half.code(np.float16(65504)) == half.HIGHEST
    assert half.code(np.float16(-65504)) == half.LOWEST
    nans = half.code(EVERY[np.isnan(EVERY)]).astype(int)
    assert np.all((nans > half.INFINITY) | (nans < 2 * half.ZERO - half.INFINITY))


def test_rounding_in_the_loops_is_that_of_numpy() -> None:
    finite = NUMBERS[np.isfinite(NUMBERS)].astype(float)
    ordered = np.unique(finite)
    middles = (ordered[1:] + ordered[:-1]) / 2
    probes = np.concatenate([finite, middles, np.nextafter(middles, np.inf), np.nextafter(middles, -np.inf)])
    probes = np.concatenate([probes, [65519.999, 65520, 1e300, -65520, -1e9, 1e-300, 5e-324, -5e-324]])
    with np.errstate(over="ignore", under="ignore"):
        expected = half.code(probes.astype(np.float16))
    assert np.array_equal([loops.code_of(probe) for probe in probes[::37]], expected[::37])
    assert np.array_equal([loops.code_of(probe) for probe in probes[-8:]], expected[-8:])
    bits = NUMBERS[np.isfinite(NUMBERS)].view(np.int16)[::37]
    assert np.array_equal([loops.number_of(pattern) for pattern in bits], bits.view(np.float16).astype(float))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(NUMBERS), st.floats(allow_nan=False, width=64), st.integers(-2, 2))
def test_a_cut_decides_as_rounding_does(threshold: np.float16, number: float, steps: int) -> None:
    cut = half.cut(threshold)
    near = cut
    for _ in range(abs(steps)):
        near = np.nextafter(near, np.inf if steps > 0 else -np.inf)
    with np.errstate(over="ignore", under="ignore"):
        for probe in (number, float(near), float(threshold)):
            assert (np.float64(probe).astype(np.float16) > threshold) == (probe > cut)


def test_cuts_of_every_threshold_are_exact() -> None:
    cut = half.cut(NUMBERS)
    with np.errstate(over="ignore", under="ignore"):
        assert not np.any(cut.astype(np.float16) > NUMBERS)
        below_infinity = ~np.isposinf(NUMBERS)
        beyond = np.nextafter(cut, np.inf)[below_infinity]
        assert np.all(beyond.astype(np.float16) > NUMBERS[below_infinity])


def test_a_cut_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        half.cut(np.float16(np.nan))


def test_loops_run_where_no_folder_can_hold_them_compiled(monkeypatch) -> None:
    """In a checkout that cannot be written, for a user without a home."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    double = loops._compiled(lambda number: 2 * number)
    assert double(21) == 42
