"""The function of each test. A new test is a file beside this one, a line here, and its options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pipeline.stages.audit.trials.laws import axioms

FUNCTIONS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {
    "axioms": axioms,
}
"""Of tests that see a shard of images at a time: (batch, options) to the arrays of its measures, (image, ...)."""

OF_NETWORKS: Mapping[str, Callable[..., dict[str, np.ndarray]]] = {}
"""Of tests that see a network at a time."""


def function_of(test: str) -> Callable[[Any, Any], dict[str, np.ndarray]]:
    return FUNCTIONS[test]
