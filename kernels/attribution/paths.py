"""Integrate a gradient along the straight line from a baseline to an input."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np

Rule = Literal["gauss_legendre", "right"]


@cache
def nodes(steps: int, rule: Rule = "gauss_legendre") -> tuple[np.ndarray, np.ndarray]:
    """Compute positions on the line from 0 (baseline) to 1 (input) and their weights, both float64 (step,).

    The weights add to 1. `gauss_legendre` is exact for polynomials up to degree 2 steps - 1. `right` is the Riemann sum
    of Sundararajan et al., "Axiomatic attribution for deep networks" (ICML 2017), eq. 3: t = k / steps, k = 1..steps.

    Raises
    ------
    ValueError
        With fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"{steps} steps, expected at least 1")
    if rule == "right":
        return np.arange(1, steps + 1) / steps, np.full(steps, 1 / steps)
    position, weight = np.polynomial.legendre.leggauss(steps)
    return (position + 1) / 2, weight / 2
