"""The laws that an explanation may keep, by name, without torch. `trials/laws.py` measures them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, PositiveInt

from pipeline.config.base import Positive
from pipeline.stages.audit.declared import LEAST, Measure, Test, TestOptions

FUNCTIONS_ROW = "functions"
"""The row of small functions with exact answers: it stands where a network's name would."""


@dataclass(frozen=True)
class Axiom:
    """One law.

    Attributes
    ----------
    title : for readers. says : what it demands.
    explains : how many further explanations of an image its residual takes; `features`: as many as changed pixels.
    exact : whether it holds with a residual of 0 alone.
    """

    title: str
    says: str
    explains: int | Literal["features"] = 0
    exact: bool = False

    def explanations(self, features: int) -> int:
        """Return how many explanations of an image it takes beside the plain one."""
        return features if self.explains == "features" else self.explains


AXIOMS: dict[str, Axiom] = {
    "own_law": Axiom("Own law", "What the method itself promises, as `attribute` measured it on every image."),
    "completeness": Axiom(
        "Completeness", "The map adds up to the score less the baseline's, the experiment's (Sundararajan et al. 2017)."
    ),
    "summation_to_delta": Axiom(
        "Summation to delta",
        "The map adds up to the score less that of the method's own reference (Shrikumar et al. 2017).",
    ),
    "conservation": Axiom(
        "Conservation", "The map, with what biases keep and what is lost, adds up to the score (Bach et al. 2015)."
    ),
    "local_accuracy": Axiom(
        "Local accuracy", "Values of features and the method's constant add up to the score (Lundberg and Lee 2017)."
    ),
    "sensitivity_a": Axiom(
        "Sensitivity (a)",
        "A feature in which input and baseline differ, and which alone changes the score, gets a value other than 0.",
        "features",
    ),
    "sensitivity_b": Axiom("Sensitivity (b)", "An input that the function does not read gets 0.", 1),
    "missingness": Axiom("Missingness", "A feature that is as in the baseline gets 0 (Lundberg and Lee 2017).", 1),
    "consistency": Axiom(
        "Consistency",
        "A function in which a feature adds more, whatever the others are, gives it no less (Lundberg and Lee 2017).",
        1,
    ),
    "linearity": Axiom("Linearity", "The explanation of a f + b g is a times that of f and b times that of g.", 2),
    "folded": Axiom(
        "Invariance: BatchNorm folded", "A network with BatchNorm folded into its convolutions has the same map.", 1
    ),
    "halves": Axiom(
        "Invariance: convolutions in halves",
        "A network whose convolutions are two of half the channels each, added, has the same map.",
        1,
    ),
    "spelled": Axiom(
        "Invariance: ReLU spelled out", "A network that computes ReLU(x) as x - min(x, 0) has the same map.", 1
    ),
    "implementation": Axiom(
        "Invariance: the lectures' pair",
        "ReLU(ReLU(a) - 1 - ReLU(b)) and ReLU(ReLU(a - 1) - ReLU(b)) are one function, and have one explanation.",
    ),
    "batch": Axiom("Independence of the batch", "An image alone has the map that it has among others.", 1),
    "determinism": Axiom("Determinism", "The same image has the same map, bit for bit.", 1, exact=True),
}


class Axioms(TestOptions):
    """Laws of explanations, measured in float64."""

    images: PositiveInt | None = Field(
        LEAST, description="use only the first N of the explained images, ordered by a hash of their ids"
    )
    tolerance: Positive = Field(
        1e-3, description="worst residual with which a law holds; a method with a tolerance of its own has that"
    )
    features: PositiveInt = Field(2, description="pixels of an image that are changed for sensitivity (a)")


def _laws(options: Axioms) -> dict[str, Measure]:
    labels = {"axiom": tuple(AXIOMS)}
    return {
        "residual": Measure("Residual", ("axiom",), labels, "lower"),
        "refused": Measure("Refused", ("axiom",), labels),
    }


def _laws_cost(options: Axioms, own: float, size: tuple[int, int]) -> float:
    return 2 * own * sum(axiom.explanations(options.features) for axiom in AXIOMS.values())  # float64 takes twice


TESTS: dict[str, Test] = {
    "axioms": Test(
        "Axioms",
        "Laws that an explanation may keep, measured on networks and on small functions with exact answers.",
        Axioms,
        _laws,
        _laws_cost,
    ),
}
