"""Upsampling against torch in float64, and against exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from dissection_oracles import activations, by_torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.dissection.half import code
from kernels.dissection.upsample import axis, upsample


@settings(deadline=None, max_examples=120)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(["normal", "subnormal", "large", "bits"]),
    st.integers(0, 2**32 - 1),
)
def test_powers_of_two_are_exact(h: int, w: int, down: int, right: int, border: str, kind: str, seed: int) -> None:
    maps = activations(seed, (1, 2, h, w), kind)[0]
    size = (h * down, w * right)
    padded = np.pad(maps.astype(float), ((0, 0), (1, 1), (1, 1)), mode="edge" if border == "edge" else "constant")
    units = (padded * 2**24).astype(np.int64)
    (i, fy), (j, fx) = (np.divmod(2 * np.arange(n * s) + 1 + s, 2 * s) for n, s in ((h, down), (w, right)))
    along = units[:, :, j] * (2 * right - fx) + units[:, :, j + 1] * fx
    exact = along[:, i] * (2 * down - fy)[:, None] + along[:, i + 1] * fy[:, None]
    assert np.abs(exact).max() < 2**53
    with np.errstate(under="ignore"):
        expected = (exact / (4 * down * right) / 2**24).astype(np.float16)
    assert np.array_equal(code(upsample(maps, size, border)), code(expected))


@settings(deadline=None, max_examples=100)
@given(
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(["normal", "subnormal", "large"]),
    st.integers(0, 2**32 - 1),
)
def test_any_ratio_is_torchs(
    size_in: tuple[int, int], size: tuple[int, int], border: str, kind: str, seed: int
) -> None:
    maps = activations(seed, (1, 2, *size_in), kind)[0]
    result = upsample(maps, size, border)
    expected = by_torch(maps, size, border)
    limit = np.maximum(np.abs(expected) * 2.0**-11, 2.0**-25) * 1.000001 + np.abs(maps).max().astype(float) * 1e-13
    assert np.all(np.abs(result.astype(float) - expected) <= limit)


@pytest.mark.parametrize(("length_in", "length_out"), [(1, 1), (1, 7), (7, 1), (14, 56), (13, 224), (20, 6), (5, 5)])
def test_cells_own_contiguous_outputs(length_in: int, length_out: int) -> None:
    line = axis(length_in, length_out)
    assert line.start[0] == 0
    assert line.start[-1] == length_out
    for cell in range(length_in + 1):
        assert np.all(line.cell[line.start[cell] : line.start[cell + 1]] == cell)
    assert np.all((line.fraction >= 0) & (line.fraction < 1))
    exact = [Fraction((2 * r + 1) * length_in, 2 * length_out) + Fraction(1, 2) for r in range(length_out)]
    assert np.array_equal(line.fraction, [float(at - int(at)) for at in exact])


def test_any_number_of_leading_axes_and_same_size() -> None:
    maps = activations(3, (2, 3, 4, 5), "normal")
    assert np.array_equal(upsample(maps, (4, 5), "zeros"), maps)
    assert np.array_equal(upsample(maps, (8, 10))[1, 2], upsample(maps[1, 2], (8, 10)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    maps = np.zeros((3, 4, 2, 2), np.float16)
    maps[2, 1, 1, 0] = value
    with pytest.raises(ValueError, match="not finite"):
        upsample(maps, (4, 4))


def test_other_input_is_refused() -> None:
    with pytest.raises(ValueError, match="'mirror' is not known"):
        upsample(np.zeros((2, 2), np.float16), (4, 4), "mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1"):
        upsample(np.zeros((2, 2), np.float16), (0, 4))
