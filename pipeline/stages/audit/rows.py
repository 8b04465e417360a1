"""What becomes of the numbers of each image: the outcomes of a cell, one for each row of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from kernels.audit.intervals import mean_interval
from pipeline.stages.attribute.options import Options, tolerance_of
from pipeline.stages.audit import counterfactual, reduced, removed
from pipeline.stages.audit.axioms import AXIOMS, Axioms
from pipeline.stages.audit.cell import Audited
from pipeline.stages.audit.results import Outcome

Reduce = Callable[[Audited, Any], Iterator[Outcome]]


def outcomes(cell: Audited, options: Any) -> list[Outcome]:
    """Return the outcomes of a cell.

    Where the method refuses the test on all images, each says so; where it does on some, they are of the others, and
    each says of how many.
    """
    if cell.refused and not len(cell.ids):
        return [Outcome(name, np.nan, state="refused", note=cell.refused) for name in cell.measures]
    found = list(REDUCE.get(cell.test, means)(cell, options))
    if not cell.refused:
        return found
    lost = f"{cell.images - len(cell.ids)} of {cell.images} images are refused with their shards: {cell.refused}"
    return [replace(one, note=f"{one.note}; {lost}" if one.note else lost) for one in found]


def means(cell: Audited, options: Any) -> Iterator[Outcome]:
    """Yield the mean of every number that each image has once, with its interval."""
    for name, measure in cell.measures.items():
        if not measure.dims:
            value, low, high, count = mean_interval(cell.arrays[name])
            yield Outcome(name, value, low, high, count, "" if count else "not defined")


def laws(cell: Audited, options: Axioms) -> Iterator[Outcome]:
    """Yield the worst residual of each law over the images, and whether it holds so."""
    residual, refused = cell.arrays["residual"], cell.arrays["refused"]
    for at, (name, axiom) in enumerate(AXIOMS.items()):
        tolerance = bound(name, cell.method, options.tolerance, axiom.exact)
        made = law(name, residual[:, at], bool((refused[:, at] == 1).any()), tolerance)
        yield replace(made, note=cell.reasons.get(name, ""))


def law(name: str, values: np.ndarray, refused: bool, tolerance: float) -> Outcome:
    """Return the outcome of a law from its residual on each image, NaN where it is not defined."""
    known = values[~np.isnan(values)]
    if not known.size:
        return Outcome(name, np.nan, state="refused" if refused else "not defined")
    worst = float(known.max())
    return Outcome(name, worst, images=int(known.size), state="holds" if worst <= tolerance else "fails")


def laws_on_functions(found: Mapping[str, np.ndarray], method: Options, options: Axioms) -> Iterator[Outcome]:
    """Yield the worst residual of each law over small functions, and on which of them it fails or is refused.

    `found` has `residual`, `refused` and `reason` (function, axiom), and the names, `function`.
    """
    for at, (name, axiom) in enumerate(AXIOMS.items()):
        residual, refused = found["residual"][:, at], found["refused"][:, at] == 1
        tolerance = bound(name, method, options.tolerance, axiom.exact)
        made = law(name, residual, bool(refused.any()), tolerance)
        fails = [str(each) for each in found["function"][np.nan_to_num(residual) > tolerance]]
        said = [f"fails on {', '.join(fails)}"] if fails else []
        if refused.any():
            why = dict.fromkeys(map(str, found["reason"][:, at][refused]))
            said.append(f"refused on {', '.join(map(str, found['function'][refused]))}: {'; '.join(why)}")
        yield replace(made, note="; ".join(said))


SUMS = ("own_law", "completeness", "summation_to_delta", "local_accuracy")
"""Laws whose tolerance a method may set itself."""


def bound(axiom: str, method: Options | None, tolerance: float, exact: bool) -> float:
    """Return the residual up to which a law holds."""
    if exact:
        return 0.0
    own = tolerance_of(method) if method is not None and axiom in SUMS else None
    return max(tolerance, own or 0.0)


REDUCE: Mapping[str, Reduce] = {
    "axioms": laws,
    **counterfactual.REDUCE,
    **removed.REDUCE,
    **reduced.REDUCE,
}
"""By test; the others have means."""
