"""Small functions whose exact attributions are known, and the laws of explanations on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, scores
from pipeline.stages.attribute.explaining import explain_function
from pipeline.stages.attribute.options import METHODS, OfSplit, Options
from pipeline.stages.attribute.subject import Attribution
from pipeline.stages.audit.axioms import AXIOMS
from pipeline.stages.audit.trials.sums import SUMS
from pipeline.storage.manifest import Files
from pipeline.storage.store import write_whole
from pipeline.workers.resumable import Done

NOTHING = 1e-12
WEIGHTS = (2.0, -3.0)
"""The factors a and b of linearity."""


class Formula(nn.Module):
    """A function of features (input, feature), in plain tensor operations, as a network with one logit.

    `formula` takes the features and, if there is one, a network that it calls.
    """

    def __init__(self, formula: Callable[..., torch.Tensor], network: nn.Module | None = None) -> None:
        super().__init__()
        self.formula, self.network = formula, network
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.formula(x) if self.network is None else self.formula(x, self.network)


def linear(x: torch.Tensor) -> torch.Tensor:
    return 2.0 * x[:, :1] - 3.0 * x[:, 1:2] + 0.5 * x[:, 2:3] + 0.25


def product(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1] * x[:, 1:2] + 2.0 * x[:, 2:3]


def maximum(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(torch.maximum(x[:, :1], x[:, 1:2]), x[:, 2:3])


def minimum(x: torch.Tensor) -> torch.Tensor:
    return x[:, :1] - (x[:, :1] - x[:, 1:2]).relu()


def saturation(x: torch.Tensor) -> torch.Tensor:
    return 1.0 - (1.0 - x).relu()


class Pair(nn.Module):
    """One of the lectures' pair, whose units are linear maps with ReLU: with the 1 in the outer unit, or in an inner.

    Sundararajan et al., "Axiomatic attribution for deep networks" (ICML 2017), figure 7.
    """

    def __init__(self, inner: bool) -> None:
        super().__init__()
        self.first = _affine(torch.eye(2), torch.tensor([-1.0 if inner else 0.0, 0.0]))
        self.last = _affine(torch.tensor([[1.0, -1.0]]), torch.tensor([0.0 if inner else -1.0]))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).relu()).relu()


def spelled(x: torch.Tensor) -> torch.Tensor:
    return x - x.clamp(max=0)


class Small(nn.Module):
    """v ReLU(W x + c) + d, or an equivalent: with a BatchNorm, in halves, or with ReLU spelled out."""

    W = ((1.0, -2.0), (3.0, 1.0), (-1.0, 1.0))
    C = (1.0, -2.0, 0.5)
    V = (2.0, -1.0, 3.0)
    D = 0.25
    MEAN, VARIANCE = (0.5, -1.0, 2.0), (4.0, 0.25, 1.0)

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        w, c = torch.tensor(self.W), torch.tensor(self.C)
        self.first, self.last = _affine(w, c), _affine(torch.tensor([self.V]), torch.tensor([self.D]))
        if how == "halves":
            self.first, self.second = _affine(w[:, :1], c), _affine(w[:, 1:], None)
        if how == "folded":  # a BatchNorm that undoes what was done to the weights
            mean, deviation = torch.tensor(self.MEAN), torch.tensor(self.VARIANCE).sqrt()
            self.first = _affine(w * deviation[:, None], c * deviation + mean)
            self.norm = nn.BatchNorm1d(3, eps=0.0).double()
            self.norm.running_mean, self.norm.running_var = mean.double(), torch.tensor(self.VARIANCE).double()
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.first(x[:, :1]) + self.second(x[:, 1:]) if self.how == "halves" else self.first(x)
        z = self.norm(z) if self.how == "folded" else z
        return self.last(spelled(z) if self.how == "spelled" else z.relu())


def _affine(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


@dataclass(frozen=True)
class Function:
    """A function at an input, with the baseline that it is compared with there."""

    network: nn.Module
    x: tuple[float, ...]
    baseline: tuple[float, ...]
    twins: Mapping[str, nn.Module]

    @property
    def inputs(self) -> torch.Tensor:
        return torch.tensor([self.x], dtype=torch.float64)

    @property
    def reference(self) -> torch.Tensor:
        return torch.tensor([self.baseline], dtype=torch.float64)


FUNCTIONS: Mapping[str, Function] = {
    "linear": Function(Formula(linear), (1.0, 2.0, -4.0), (0.5, -1.0, 2.0), {}),
    "product": Function(Formula(product), (3.0, 4.0, 5.0), (1.0, 1.0, 1.0), {}),
    "maximum": Function(Formula(maximum), (3.0, 5.0, 1.0), (0.0, 0.0, 0.0), {}),
    "minimum": Function(Formula(minimum), (3.0, 1.0), (0.0, 0.0), {}),
    "saturation": Function(Formula(saturation), (2.0,), (0.0,), {}),
    "small network": Function(
        Small(), (2.0, 1.0), (0.0, 0.0), {how: Small(how) for how in ("folded", "halves", "spelled")}
    ),
    "outer": Function(Pair(inner=False), (3.0, 1.0), (0.0, 0.0), {"implementation": Pair(inner=True)}),
    "inner": Function(Pair(inner=True), (3.0, 1.0), (0.0, 0.0), {}),
}
"""By name. `twins` compute the same, each for the law of invariance that it is named after."""
SUM_OF = ("product", "maximum")
"""The two functions of linearity, of as many features."""


@dataclass(frozen=True)
class Case:
    """One method on one function."""

    function: Function
    options: Options

    def explain(
        self,
        network: nn.Module | None = None,
        inputs: torch.Tensor | None = None,
        baseline: torch.Tensor | None = None,
    ) -> Attribution:
        inputs = self.function.inputs if inputs is None else inputs
        baseline = self.function.reference.expand_as(inputs) if baseline is None else baseline
        return explain_function(network or self.function.network, inputs, baseline, self.options)

    def values(self, *changed: torch.Tensor | nn.Module | None) -> torch.Tensor:
        return self.of(self.explain(*changed))  # type: ignore[arg-type]

    @property
    def compares(self) -> bool:
        """Whether the method compares with a baseline, or with references."""
        return METHODS[self.options.kind].baseline or isinstance(self.options, OfSplit)

    def of(self, made: Attribution) -> torch.Tensor:
        """Return what a method says of each feature, (input, feature): magnitudes where it gives no signs."""
        found = made.facts.get("value", made.values)
        assert found is not None
        return (found if METHODS[self.options.kind].signed else found.abs()).double()

    @cached_property
    def plain(self) -> Attribution:
        """The explanation of the input."""
        return self.explain()

    @property
    def own(self) -> torch.Tensor:
        """What the explanation says of each feature, (input, feature)."""
        return self.of(self.plain)

    @property
    def total(self) -> torch.Tensor:
        return self.own.sum(1)

    @property
    def score(self) -> torch.Tensor:
        return self.score_at(self.function.inputs)

    @property
    def baseline_score(self) -> torch.Tensor:
        return self.score_at(self.function.reference)

    def score_at(self, inputs: torch.Tensor) -> torch.Tensor:
        return scores(self.function.network, inputs, Logit(torch.zeros(len(inputs), dtype=torch.int64)))


def sensitivity_a(case: Case) -> torch.Tensor:
    """Return the share of features that get 0, of those whose change to the baseline alone changes the score."""
    plain, missed, counted = case.own, 0, 0
    for feature in range(case.function.inputs.shape[1]):
        other = case.function.inputs.clone()
        other[0, feature] = case.function.reference[0, feature]
        if bool((case.score_at(other) == case.score).all()):
            continue
        counted += 1
        found = case.values(None, None, other) if case.compares else plain
        missed += int(found[0, feature].abs() <= NOTHING)
    return torch.tensor([missed / counted if counted else np.nan])


def sensitivity_b(case: Case) -> torch.Tensor:
    count = case.function.inputs.shape[1]
    longer = Formula(lambda x, network: network(x[:, :count]), case.function.network)
    inputs = torch.cat([case.function.inputs, torch.tensor([[0.75]], dtype=torch.float64)], 1)
    baseline = torch.cat([case.function.reference, torch.tensor([[-0.5]], dtype=torch.float64)], 1)
    found = case.values(longer, inputs, baseline)
    return found[:, count].abs() / found.abs().amax(1).clamp(min=NOTHING)


def missingness(case: Case) -> torch.Tensor | None:
    """Return the largest value of a feature that is as in the baseline."""
    if not case.compares:
        return None
    largest = torch.zeros(1)
    for feature in range(case.function.inputs.shape[1]):
        inputs = case.function.inputs.clone()
        inputs[0, feature] = case.function.reference[0, feature]
        found = case.values(None, inputs).abs()
        largest = torch.maximum(largest, found[:, feature] / found.amax(1).clamp(min=NOTHING))
    return largest


def consistency(case: Case) -> torch.Tensor | None:
    """Return by how much a feature's value falls when it adds more to the score, as a share of what it adds."""
    if not case.compares:
        return None
    rises = (case.function.inputs - case.function.reference)[:, 0]
    more = case.values(Formula(lambda x, network: network(x) + x[:, :1], case.function.network))
    return (-(more - case.own)[:, 0] * rises.sign()).clamp(min=0) / rises.abs()


def linearity(case: Case) -> torch.Tensor | None:
    """Return how far a f + b g is from the sum, at the first function of `SUM_OF`; None at any other."""
    if case.function is not FUNCTIONS[SUM_OF[0]]:
        return None
    (a, b), other = WEIGHTS, FUNCTIONS[SUM_OF[1]].network
    both = case.values(Formula(lambda x: a * case.function.network(x) + b * other(x)))
    f, g = a * case.own, b * case.values(other)
    return (both - f - g).norm(dim=1) / (f.norm(dim=1) + g.norm(dim=1)).clamp(min=NOTHING)


def invariance(law: str, case: Case) -> torch.Tensor | None:
    twin = case.function.twins.get(law)
    if twin is None:
        return None
    plain = case.own
    return (case.values(twin) - plain).norm(dim=1) / plain.norm(dim=1).clamp(min=NOTHING)


def batch_apart(case: Case) -> torch.Tensor:
    both = torch.cat([case.function.inputs, case.function.inputs / 2 + 0.1])
    plain = case.own
    return (case.values(None, both)[:1] - plain).norm(dim=1) / plain.norm(dim=1).clamp(min=NOTHING)


def determinism(case: Case) -> torch.Tensor:
    return (case.values() - case.own).abs().amax(1)


LAWS: Mapping[str, Callable[[Case], torch.Tensor | None]] = {
    **SUMS,
    "sensitivity_a": sensitivity_a,
    "sensitivity_b": sensitivity_b,
    "missingness": missingness,
    "consistency": consistency,
    "linearity": linearity,
    **{law: partial(invariance, law) for law in ("folded", "halves", "spelled", "implementation")},
    "batch": batch_apart,
    "determinism": determinism,
}


def on_functions(options: Options) -> dict[str, np.ndarray]:
    """Measure how far a method misses each law on each small function, in float64.

    Returns
    -------
    residual : float64 (function, axiom), NaN where a law is not defined.
    refused : 1 where the method refuses the function, else 0. reason : why, text.
    """
    shape = len(FUNCTIONS), len(AXIOMS)
    found = {"residual": np.full(shape, np.nan), "refused": np.zeros(shape), "reason": np.full(shape, "", object)}
    kind = METHODS[options.kind]
    if kind.maps != "image" or "layer" in kind.needs or options.kind == "occlusion":
        return found  # their values are of positions, which such functions do not have
    for row, function in enumerate(FUNCTIONS.values()):
        case = Case(function, options)
        for column, name in enumerate(AXIOMS):
            if name not in LAWS:
                continue
            try:
                value = LAWS[name](case)
            except MicrotomeError as error:
                found["refused"][row, column], found["reason"][row, column] = 1, str(error)
                continue
            if value is not None:
                found["residual"][row, column] = float(value[0])
    return found


def audit_functions(stores: Mapping[str, Path], methods: Mapping[str, Options], names: Sequence[str]) -> Done:
    """Measure methods on small functions, and write the store of each. Runs on a worker."""
    files: dict[str, Files] = {}
    for name in names:
        found = on_functions(methods[name])
        arrays: dict[str, tuple[tuple[str, ...], np.ndarray]] = {
            key: (("function", "axiom"), values) for key, values in found.items()
        }
        arrays["function"] = (("function",), np.array(list(FUNCTIONS), object))
        arrays["axiom"] = (("axiom",), np.array(list(AXIOMS), object))
        files[name] = write_whole(stores[name], arrays, {"method": name, "settings": methods[name].model_dump()})
    return Done(ALL, files)


ALL = "all"
"""The one part of a store that is written at a time."""
