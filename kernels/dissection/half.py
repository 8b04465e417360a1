"""Treat float16 as integers: one monotone code per value, and comparisons after rounding that need no rounding.

A float16 has 65,536 bit patterns, so an integer histogram over codes is an exact distribution. For a float64 `v`,
`half(v) > t` is one comparison with a float64 cut, found once per threshold. The code of a value is 32768 + sign *
magnitude bits: it increases with the value, and -0 and +0, which compare equal, share code 32768.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

ZERO = 32768  # the code of -0 and +0
INFINITY = ZERO + 0x7C00  # the code of +inf; -inf has ZERO - 0x7C00; NaN lies outside
LOWEST = ZERO - 0x7BFF  # the code of -65504, the lowest finite value
HIGHEST = ZERO + 0x7BFF  # the code of 65504


def code(values: ArrayLike) -> NDArray[np.uint16]:
    """Return the codes of float16 values of any shape; a NaN has a code beyond the infinities."""
    bits = np.asarray(values, np.float16).view(np.uint16).astype(np.int32)
    magnitude = bits & 0x7FFF
    return np.asarray(np.where(bits >= 0x8000, ZERO - magnitude, ZERO + magnitude), np.uint16)


def value(codes: ArrayLike) -> NDArray[np.float16]:
    """Return the float16 values of codes of any shape: the inverse of `code`, with +0 for zero."""
    key = np.asarray(codes).astype(np.int32) - ZERO
    return np.asarray(np.where(key < 0, 0x8000 - key, key), np.uint16).view(np.float16)


def cut(threshold: ArrayLike) -> NDArray[np.float64]:
    """Return the float64 `c` such that `half(v) > threshold` if and only if `v > c`, for every float64 `v`; any shape.

    The midpoint lies between the threshold and the next float16. Round-to-nearest-even sends the midpoint itself to the
    neighbour with the even mantissa. If that is the upper neighbour, the midpoint passes too, and the cut is the
    float64 just below it. Values from 65520 up round to infinity. Raises ValueError for a NaN.
    """
    below = code(threshold).astype(np.int32)
    if np.any(np.isnan(np.asarray(threshold, np.float16))):
        raise ValueError("a threshold is NaN; expected float16 numbers")
    above = np.minimum(below + 1, INFINITY)
    middle = (_extended(below) + _extended(above)) / 2
    passes = (above - ZERO) % 2 == 0
    cuts = np.where(passes, np.nextafter(middle, -np.inf), middle)
    return np.where(below == INFINITY, np.inf, cuts)


def _extended(codes: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return values as float64 with 65536 in place of infinity; rounding to float16 acts as if it were there."""
    return np.clip(value(codes).astype(np.float64), -65536.0, 65536.0)
