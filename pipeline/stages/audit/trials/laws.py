"""The laws of explanations, measured on networks in float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, in_chunks, scores
from pipeline.stages.attribute.options import (
    METHODS,
    IntegratedGradients,
    Method,
    OfSplit,
    Options,
    Segmented,
    link_of,
)
from pipeline.stages.attribute.subject import Attribution
from pipeline.stages.audit.axioms import AXIOMS, Axioms
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.trials.equivalent import VARIANTS, equivalent
from pipeline.stages.audit.trials.sums import SUMS

ROWS = 4  # that the function of sensitivity (b) does not read
FEW = 8  # steps of integrated gradients for laws that do not depend on their number
TOGETHER = 2  # images that go through the network together
NOTHING = 1e-12  # share of a map's largest magnitude that counts as 0 in float64
CHANGES = 1e-9  # share of a score's magnitude that counts as a change of it


@dataclass(frozen=True)
class Case:
    """Images and a network in float64, and one method that explains them.

    `features` is how many pixels sensitivity (a) changes.
    """

    batch: Batch
    features: int

    @property
    def options(self) -> Options:
        return self.batch.options_of_method

    @property
    def kind(self) -> Method:
        return METHODS[self.options.kind]

    @property
    def on_pixels(self) -> bool:
        """Whether the method's values are of the image's pixels: laws of inputs say nothing of those of layers."""
        return self.kind.maps == "image"

    @cached_property
    def network(self) -> nn.Module:
        return self.batch.memo_of_network("float64", lambda: copy.deepcopy(self.batch.network).double())

    @cached_property
    def inputs(self) -> torch.Tensor:
        return self.batch.inputs.double()

    @cached_property
    def baseline(self) -> torch.Tensor:
        return self.batch.baseline.double()

    @cached_property
    def target(self) -> Logit:
        """What the method explains, which may be the probability where the experiment explains the logit."""
        return replace(self.batch.target, link=link_of(self.options, self.batch.target.link))

    @cached_property
    def score(self) -> torch.Tensor:
        return scores(self.network, self.inputs, self.target)

    @cached_property
    def baseline_score(self) -> torch.Tensor:
        return scores(self.network, self.baseline, self.target)

    @cached_property
    def plain(self) -> Attribution:
        """The explanation by the method's own options."""
        return self._explain(None, self.network, self.inputs, self.batch.target, self.baseline)

    @cached_property
    def quick(self) -> Options | None:
        """Options with which laws of differences are measured where the method's own take longer; None: its own.

        A few steps of integrated gradients are as linear, and as blind to the implementation, as many.
        """
        own = self.options
        if isinstance(own, IntegratedGradients) and own.max_steps > FEW:
            few = min(own.steps, FEW)
            return own.model_copy(update={"steps": few, "max_steps": few})
        return None

    @cached_property
    def map(self) -> torch.Tensor:
        """The map that those of changed inputs and networks are compared with."""
        return _map(self.plain if self.quick is None else self.explain())

    @property
    def total(self) -> torch.Tensor:
        """The sum of the values of the plain explanation: of segments, or of the map."""
        values = self.plain.facts.get("value")
        return _map(self.plain).flatten(1).sum(1) if values is None else values.double().nansum(1)

    def explain(
        self,
        network: nn.Module | None = None,
        inputs: torch.Tensor | None = None,
        target: Logit | None = None,
        baseline: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> Attribution:
        """Explain with some of these changed; `rows` are the images that inputs stand for, default all of them."""
        return self._explain(
            self.quick,
            network or self.network,
            self.inputs if inputs is None else inputs,
            self.batch.target if target is None else target,
            self.baseline if baseline is None else baseline,
            segments,
            rows,
        )

    def _explain(
        self,
        options: Options | None,
        network: nn.Module,
        inputs: torch.Tensor,
        target: Logit,
        baseline: torch.Tensor,
        segments: torch.Tensor | None = None,
        rows: np.ndarray | None = None,
    ) -> Attribution:
        at = np.arange(len(inputs)) if rows is None else rows
        return self.batch.attribution(network, inputs, target, at, baseline, segments, options=options)


def axioms(batch: Batch, options: Axioms) -> dict[str, np.ndarray]:
    """Measure how far a method misses each law on each image; see `pipeline.stages.audit.axioms.AXIOMS`.

    Images go through the network a few at a time, always as many, so that no others show in the bits of an image.

    Returns
    -------
    residual : float64 (image, axiom), NaN where a law is not defined for the method, or the method refuses the network
        that it takes.
    refused : 1 where it does, else 0; the first reason is noted.
    """
    parts = [_of_some(Case(batch.picked(rows), options.features)) for rows in in_groups(len(batch.ids))]
    return {name: np.concatenate([each[name] for each in parts])[: len(batch.ids)] for name in ("residual", "refused")}


def in_groups(count: int) -> Iterator[np.ndarray]:
    """Yield the indices of images, `TOGETHER` at a time; the last ones repeat the last image."""
    for start, _ in in_chunks(count, TOGETHER):
        yield np.minimum(np.arange(start, start + TOGETHER), count - 1)


def _of_some(case: Case) -> dict[str, np.ndarray]:
    shape = len(case.batch.ids), len(AXIOMS)
    found = {"residual": np.full(shape, np.nan), "refused": np.zeros(shape)}
    for at, name in enumerate(AXIOMS):
        try:
            values = LAWS[name](case) if name in LAWS else None
        except MicrotomeError as error:
            found["refused"][:, at] = 1
            case.batch.reasons.setdefault(name, str(error))
            continue
        if values is not None:
            found["residual"][:, at] = values.detach().double().cpu().numpy()
    return found


def _map(made: Attribution) -> torch.Tensor:
    if made.map is None:
        raise MicrotomeError("no map")
    return made.map.double()


def _apart(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
    """Return the distance of two maps over the norm of the second, or a scale; 0 where both are 0."""
    distance, norm = (a - b).flatten(1).norm(dim=1), b.flatten(1).norm(dim=1) if scale is None else scale
    return torch.where(distance == 0, 0.0, distance / norm)


def _largest(values: torch.Tensor) -> torch.Tensor:
    return values.abs().flatten(1).amax(1)


def own_law(case: Case) -> torch.Tensor:
    return torch.from_numpy(np.array(case.batch.stored["residual"], np.float64))


def of_inputs(law: Callable[[Any], torch.Tensor | None]) -> Callable[[Case], torch.Tensor | None]:
    """Return a law of sums that says nothing of values of a layer's positions."""
    return lambda case: law(case) if case.on_pixels else None


def sensitivity_a(case: Case) -> torch.Tensor | None:
    """Return the share of changed pixels that get 0, of those whose change alone changes the score."""
    if not case.on_pixels or isinstance(case.options, OfSplit):  # whose references are no image that differs in one
        return None
    count, (height, width) = len(case.inputs), case.batch.size
    places = [np.random.default_rng([seed, 3]).permutation(height * width) for seed in case.batch.seeds]
    missed, counted = torch.zeros(count), torch.zeros(count)
    for number in range(min(case.features, height * width)):
        pixel = torch.tensor([each[number] for each in places])
        rows, y, x = torch.arange(count), pixel // width, pixel % width
        other = case.inputs.clone()
        value = case.baseline[rows, :, y, x]
        same = (value == case.inputs[rows, :, y, x]).all(1, keepdim=True)
        other[rows, :, y, x] = torch.where(same, value + 1.0, value)
        changes = (case.score - scores(case.network, other, case.target)).abs() > CHANGES * case.score.abs()
        found = _map(case.explain(baseline=other)) if case.kind.baseline else case.map
        nothing = found[rows, y, x].abs() <= NOTHING * _largest(found)
        counted += changes.cpu()
        missed += (changes & nothing).cpu()
    return torch.where(counted > 0, missed / counted, torch.nan)


def sensitivity_b(case: Case) -> torch.Tensor | None:
    """Return the largest value of rows that the function does not read, over the map's largest."""
    if not case.on_pixels or isinstance(case.options, OfSplit):  # whose references have no such rows
        return None
    shape = (*case.inputs.shape[:2], ROWS, case.inputs.shape[3])
    noise = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(case.inputs.device)
    longer, baseline = torch.cat([case.inputs, noise], 2), torch.cat([case.baseline, torch.zeros_like(noise)], 2)
    segments = None
    if isinstance(case.options, Segmented):
        own = case.batch.segments(case.options)
        rest = (own.flatten(1).amax(1) + 1)[:, None, None].expand(len(own), ROWS, own.shape[2])
        segments = torch.cat([own, rest], 1)

    def crop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][:, :, :-ROWS], *inputs[1:])

    with _hooked(case.network.register_forward_pre_hook(crop)):
        found = _map(case.explain(inputs=longer, baseline=baseline, segments=segments))
    return _share(found[:, -ROWS:], found)


def _share(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    largest = _largest(whole)
    return torch.where(largest > 0, _largest(part) / largest, 0.0)


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def missingness(case: Case) -> torch.Tensor | None:
    """Return the largest value of pixels that are as in the baseline, over the map's largest."""
    if not (case.on_pixels and case.kind.baseline):
        return None
    height, width = case.batch.size
    absent = (torch.arange(height) < height // 2)[None, :, None].expand(len(case.inputs), height, width)
    if isinstance(case.options, Segmented):  # whose features are segments
        absent = case.batch.segments(case.options) % 2 == 0
    absent = absent.to(case.inputs.device)
    found = _map(case.explain(inputs=torch.where(absent[:, None], case.baseline, case.inputs)))
    return _share(torch.where(absent, found, 0.0), found)


def consistency(case: Case) -> torch.Tensor | None:
    """Return by how much a block's value falls when the block adds more to the score, as a share of what it adds."""
    if not (case.on_pixels and case.kind.baseline) or isinstance(case.options, Segmented):
        return None
    height, width = case.batch.size
    block = (slice(None), slice(None), slice(height // 4, 3 * height // 4), slice(width // 4, 3 * width // 4))
    rises = (case.inputs[block] - case.baseline[block]).mean((1, 2, 3))

    def adds(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
        if not isinstance(output, torch.Tensor):
            raise MicrotomeError("the network gives no tensor")
        return output + inputs[0][block].mean((1, 2, 3))[:, None]

    with _hooked(case.network.register_forward_hook(adds)):
        more = _map(case.explain())
    inside = (slice(None), *block[2:])
    grows = (more[inside].flatten(1).sum(1) - case.map[inside].flatten(1).sum(1)) * rises.sign()
    return torch.where(rises != 0, (-grows).clamp(min=0) / rises.abs(), 0.0)


def linearity(case: Case) -> torch.Tensor | None:
    """Return how far the explanation of one class less another is from the difference of theirs."""
    target = case.batch.target
    logits = case.batch.logits
    if target.against is not None or logits.shape[1] < 2 or target.link == "log_probability":
        return None
    classes = target.classes.to(logits.device)
    others = logits.scatter(1, classes[:, None], -torch.inf).argmax(1).to(target.classes.device)
    f, g = case.map, _map(case.explain(target=replace(target, classes=others)))
    both = _map(case.explain(target=replace(target, against=others)))
    return _apart(both, f - g, f.flatten(1).norm(dim=1) + g.flatten(1).norm(dim=1))


def invariance(variant: str) -> Callable[[Case], torch.Tensor | None]:
    """Return the law that an equivalent network has the same map."""

    def measured(case: Case) -> torch.Tensor | None:
        kept = case.options.layer_name() is not None and case.batch.shared.work.layer_of(case.batch.method)
        spared = kept.name if kept else ""
        other = case.batch.memo_of_network(
            (variant, spared), lambda: equivalent(case.network, VARIANTS[variant], case.inputs, spared)
        )
        return None if other is None else _apart(_map(case.explain(network=other)), case.map)

    return measured


def batch_apart(case: Case) -> torch.Tensor:
    """Return how far the map of an image alone is from that among the others."""
    alone = [
        _map(
            case.explain(
                inputs=case.inputs[at : at + 1],
                target=case.batch.target.at(torch.tensor([at])),
                baseline=case.baseline[at : at + 1],
                rows=np.array([at]),
            )
        )
        for at in range(len(case.inputs))
    ]
    return _apart(torch.cat(alone), case.map)


def determinism(case: Case) -> torch.Tensor:
    """Return the largest difference to the same explanation, computed again."""
    return _largest(_map(case.explain()) - case.map)


LAWS: Mapping[str, Callable[[Case], torch.Tensor | None]] = {
    "own_law": own_law,
    **{name: of_inputs(law) for name, law in SUMS.items()},
    "sensitivity_a": sensitivity_a,
    "sensitivity_b": sensitivity_b,
    "missingness": missingness,
    "consistency": consistency,
    "linearity": linearity,
    **{name: invariance(name) for name in VARIANTS},
    "batch": batch_apart,
    "determinism": determinism,
}
"""The residual of each law on each image, float (image,); None where it is not defined for the method."""
