"""The laws of what the values of an explanation add up to, on networks and on small functions alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from pipeline.networks.gradients import relative
from pipeline.stages.attribute.options import METHODS, Options, Segmented
from pipeline.stages.attribute.subject import Attribution


class Summed(Protocol):
    """Inputs, a method, its explanation, and the scores of inputs and baselines, (input,)."""

    @property
    def options(self) -> Options: ...

    @property
    def plain(self) -> Attribution: ...

    @property
    def total(self) -> torch.Tensor:
        """The sum of the explanation's values."""

    @property
    def score(self) -> torch.Tensor: ...

    @property
    def baseline_score(self) -> torch.Tensor: ...


def completeness(case: Summed) -> torch.Tensor:
    return _to_delta(case, case.baseline_score)


def _to_delta(case: Summed, reference: torch.Tensor) -> torch.Tensor:
    difference = case.score - reference
    return relative(case.total - difference, difference, case.score)


def _reference(case: Summed) -> torch.Tensor | None:
    """Return the score of the method's own reference; None for a method without."""
    if "phi0" in case.plain.facts:
        return case.plain.facts["phi0"].double()
    return case.baseline_score if METHODS[case.options.kind].baseline else None


def summation_to_delta(case: Summed) -> torch.Tensor | None:
    reference = _reference(case)
    return None if reference is None else _to_delta(case, reference)


def conservation(case: Summed) -> torch.Tensor:
    kept = [case.plain.facts[name].double() for name in ("bias", "leak") if name in case.plain.facts]
    return relative(sum(kept, case.total) - case.score, case.score)


def local_accuracy(case: Summed) -> torch.Tensor | None:
    own = case.plain.facts.get("intercept") if isinstance(case.options, Segmented) else None
    constant = own.double() if own is not None else _reference(case)
    return None if constant is None else relative(constant + case.total - case.score, case.score)


SUMS: Mapping[str, Callable[[Summed], torch.Tensor | None]] = {
    "completeness": completeness,
    "summation_to_delta": summation_to_delta,
    "conservation": conservation,
    "local_accuracy": local_accuracy,
}
"""The residual of each law, float64 (input,); None where it is not defined for the method."""
