"""The tests that the configuration may name, without torch.

`trials/registry.py` has the function of each, `rows.py` what becomes of its numbers.
"""

from __future__ import annotations

from pipeline.stages.audit import axioms, counterfactual, faithful, located, removed, sanity
from pipeline.stages.audit.declared import Test

TESTS: dict[str, Test] = {
    **axioms.TESTS,
    **counterfactual.TESTS,
    **removed.TESTS,
    **faithful.TESTS,
    **sanity.TESTS,
    **located.TESTS,
}
"""By name, in the order in which they are measured and shown."""
