"""The trials of an experiment: what is done to which units, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kernels.intervention.choice import alike
from pipeline.stages.intervene.settings import Settings

NOTHING, WITHOUT, REMOVED, RANDOM, PATCHED, INSERTED = "nothing", "without", "removed", "random", "patched", "inserted"
"""The generator as it is; its own picture of the composition without the concept; units removed; random units removed;
units at the values that they have without the concept, the ceiling of any removal; units at a high value."""


@dataclass(frozen=True)
class Trial:
    """One change of a layer's output, the same for every image.

    Attributes
    ----------
    what : as above. rank, replace, k, draw, at : which units, what they give, how many, which random set, where.
    units, values : each unit's new value; none where the values are those of another picture.
    """

    what: str
    rank: str = ""
    replace: str = ""
    k: int = 0
    draw: int = -1
    at: str = ""
    units: tuple[int, ...] = ()
    values: tuple[float, ...] = ()


def trials_of(
    settings: Settings,
    orders: Mapping[str, np.ndarray],
    means: np.ndarray,
    quantiles: np.ndarray,
    counterfactual: bool,
) -> list[Trial]:
    """Return all trials, the unchanged generator first.

    Parameters
    ----------
    orders : units by falling rank, for each ranking. means, quantiles : (unit,) on the train half.
    counterfactual : whether the generator can be asked for its picture without the concept.
    """
    found = [Trial(NOTHING)] + ([Trial(WITHOUT)] if counterfactual else [])

    def removed(what: str, units: np.ndarray, replace: str, **names: object) -> Trial:
        values = means[units] if replace == "mean" else np.zeros(len(units))
        return Trial(what, replace=replace, k=len(units), units=_ints(units), values=_floats(values), **names)  # type: ignore[arg-type]

    for rank, order in orders.items():
        for k in settings.units:
            best = order[:k]
            found += [removed(REMOVED, best, replace, rank=rank) for replace in settings.replace]
            if counterfactual:
                found.append(Trial(PATCHED, rank, k=k, units=_ints(best)))
    first = next(iter(orders.values()))
    for k in settings.units:
        if 2 * k <= len(means):
            for draw in range(settings.draws):
                random = np.random.default_rng([settings.seed, k, draw])
                found.append(removed(RANDOM, alike(first[:k], means, random), settings.replace[0], draw=draw))
    if settings.insert is not None:
        for k in settings.units:
            best = first[:k]
            at, rank = settings.insert.at, next(iter(orders))
            values = _floats(quantiles[best])
            found.append(Trial(INSERTED, rank, k=k, at=at, units=_ints(best), values=values))
    return found


def _ints(values: np.ndarray | Sequence[int]) -> tuple[int, ...]:
    return tuple(int(each) for each in values)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(each) for each in values)
