"""The test `ablation`: does the relevance of units predict what removing them does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt

from kernels.audit.intervals import resampled
from kernels.audit.units import agreement, chance, holm, overlap, shares, spread
from pipeline.config.networks import Ablate
from pipeline.errors import MicrotomeError, nearest
from pipeline.stages.ablate.found import read_ablation
from pipeline.stages.ablate.results import Ablated
from pipeline.stages.attribute.options import METHODS, Method
from pipeline.stages.audit.declared import Asked, Measure, Test, TestOptions
from pipeline.stages.audit.results import Outcome, Shares
from pipeline.stages.dissect.found import read_dissection

if TYPE_CHECKING:
    from pipeline.plan.job import Job
    from pipeline.stages.audit.cell import Audited

KINDS = ("grad_cam", "hires_cam", "layer_cam", "gradient_x_input", "integrated_gradients", "deeplift", "lrp")
"""Methods that say something of the units of a layer, too."""
SURE = 0.05
"""Corrected probability below which a class's correlation is not taken for chance."""
DRAWS = 200  # of images, for an interval: each correlates all classes anew
NONE = "no concept"


class Ablation(TestOptions):
    """Relevance of units against what removing them does."""

    layers: list[str] | None = Field(None, description="only these layers; default: all whose units were removed")
    top: PositiveInt = Field(5, description="units whose overlap is counted")


@dataclass(frozen=True)
class Layer:
    """What removing the units of a layer does: losses of balanced accuracy (unit, class) on the split that judges.

    `other` are those on the split that ranks, `concepts` the labels of the units.
    """

    units: int
    loss: np.ndarray
    other: np.ndarray
    concepts: list[str]


def measures(options: Ablation) -> dict[str, Measure]:
    return {}


def shaped(options: Ablation, job: Job[Any]) -> dict[str, Measure]:
    """Return the relevance of the units of each layer, (image, unit)."""
    found = {}
    for layer, units in _ablated(options, job).items():
        dim = f"unit of {layer}"
        found[f"relevance.{layer}"] = Measure(
            f"Relevance of the units of {layer}", (dim,), {dim: tuple(map(str, range(units)))}
        )
    return found


def _ablated(options: Ablation, job: Job[Any]) -> dict[str, int]:
    """Return the number of units of each layer whose units were removed."""
    ablate = job.beside("ablate")
    assert ablate is not None
    there = {each.layer: each.units for each in Ablated.of(ablate.read()).layers}
    for layer in options.layers or ():
        if layer not in there:
            raise MicrotomeError(
                f"{job.network} on {job.dataset}: the units of layer {layer!r} were not removed"
                f"{nearest(layer, there)}: name it in the network's `ablate.layers`"
            )
    return {layer: units for layer, units in there.items() if options.layers is None or layer in options.layers}


def prepare(options: Ablation, job: Job[Any], read: Any) -> dict[str, Layer]:
    """Return what removing the units of each layer does."""
    units = read_dissection(job.results, job.dataset, job.network).units
    found = {}
    for layer, count in _ablated(options, job).items():
        ablation = read_ablation(job.results, job.dataset, job.network, layer, units)
        labels = [each.concept or NONE for each in ablation.units]
        found[layer] = Layer(count, ablation.judge_loss, ablation.rank_loss, labels)
    return found


def defined(options: Ablation, method: Method) -> str:
    kind = next(name for name, each in METHODS.items() if each is method)
    return "" if kind in KINDS else "it says nothing of the units of a layer"


def check(options: Ablation, asked: Asked) -> Iterator[str]:
    """Yield what the configuration lacks: layers that no unit is removed from, and methods with relevance of units."""
    spec = asked.draft.networks[asked.network].ablate
    named = spec.layers if isinstance(spec, Ablate) and spec.layers != "last" else []
    for layer in options.layers or ():
        if named and layer not in named:
            yield f".layers: no unit of {layer!r} is removed from {asked.network!r}{nearest(layer, named)}"
    kinds = [told["method"] for told in asked.explained.methods.values()]
    if not any(kind in KINDS and (kind != "lrp" or told.get("layers")) for kind, told in _told(asked)):
        yield (
            f": no method of the experiment has relevance of units of {asked.network!r} ({', '.join(kinds)}): add one "
            f"of {', '.join(KINDS)}, `lrp` with `layers`"
        )
    if asked.explained.score != "logit":
        yield f": the relevance of units is that of logits, and the experiment's `score` is {asked.explained.score!r}"


def _told(asked: Asked) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return ((told["method"], told) for told in asked.explained.methods.values())


def cost(options: Ablation, own: float, size: tuple[int, int]) -> float:
    return max(own, 1.0)


def outcomes(cell: Audited, options: Ablation) -> Iterator[Outcome]:
    """Yield how well relevance predicts loss: the mean over classes, and each class.

    A class's images are those that are explained by it and, where they have labels, are of it.
    """
    layers: Mapping[str, Layer] = cell.given
    probable: dict[tuple[str, int], float] = {}
    single: dict[tuple[str, int], Outcome] = {}
    for layer, known in layers.items():
        relevance = cell.arrays[f"relevance.{layer}"]
        if np.isnan(relevance).all():
            yield Outcome(f"rank.{layer}", np.nan, state="not defined", note="no relevance of its units is stored")
            continue
        images = members(cell)
        loss = known.loss

        def mean(rows: np.ndarray, relevance: np.ndarray = relevance, loss: np.ndarray = loss) -> float:
            own = agreement(relevance, loss, [rows[each] for each in members(cell, rows)])
            return float(np.nanmean(own)) if not np.isnan(own).all() else np.nan

        value, low, high = resampled(mean, len(relevance), draws=DRAWS)
        count = sum(map(len, images))
        yield Outcome(f"rank.{layer}", value, low, high, count)
        tops = [overlap(relevance[rows].mean(0), loss[:, c], options.top) for c, rows in enumerate(images) if len(rows)]
        share = float(np.nanmean(tops)) if tops and not np.isnan(tops).all() else np.nan
        yield Outcome(f"top{options.top}.{layer}", share, images=count)
        correlations = agreement(relevance, loss, images)
        for c, rows in enumerate(images):
            if not len(rows):
                continue
            ends = spread(relevance[rows], loss[:, c], DRAWS)
            probable[layer, c] = chance(float(correlations[c]), known.units)
            name = f"rank.{layer}.{cell.class_names[c]}"
            single[layer, c] = Outcome(name, float(correlations[c]), *ends, len(rows))
    corrected = dict(zip(probable, holm(np.array(list(probable.values()))), strict=True))
    for layer in layers:
        own_layer = {c: p for (name, c), p in corrected.items() if name == layer}
        if own_layer:
            sure = sum(p < SURE for p in own_layer.values())
            yield Outcome(f"sure.{layer}", sure / len(own_layer), images=len(own_layer), note="classes, corrected")
        for c, p in own_layer.items():
            one = single[layer, c]
            yield Outcome(one.measure, one.value, one.low, one.high, one.images, note=f"corrected p = {p:.2g}")


def members(cell: Audited, rows: np.ndarray | None = None) -> list[np.ndarray]:
    """Return the images of each class: places among `rows`, or among all."""
    rows = np.arange(len(cell.explained)) if rows is None else rows
    explained, labels = cell.explained[rows], cell.labels[rows]
    good = (labels < 0) | (labels == explained)
    return [np.flatnonzero(good & (explained == c)) for c in range(len(cell.class_names))]


def concepts_of(cell: Audited) -> Iterator[Shares]:
    """Yield, by layer and class, the shares of the relevance and of the losses by concept."""
    layers: Mapping[str, Layer] = cell.given
    for layer, known in layers.items():
        relevance = cell.arrays[f"relevance.{layer}"]
        for c, rows in enumerate(members(cell)):
            if len(rows) and not np.isnan(relevance[rows]).any():
                named = cell.dataset, cell.network, cell.name.told, layer, cell.class_names[c]
                of_loss = shares(known.loss[:, c], known.concepts)
                yield Shares(*named, shares(relevance[rows].mean(0), known.concepts), of_loss)


TESTS: dict[str, Test] = {
    "ablation": Test(
        "Relevance against ablation",
        "Rank correlation, over the units of a layer, of their relevance for a class and what the class loses without.",
        Ablation,
        measures,
        cost,
        shaped=shaped,
        controls=("random", "activation", "other_split"),
        control="random",
        copies={"other_split": "ablate"},
        parents=("dissect", "ablate"),
        defined=defined,
        check=check,
        prepare=prepare,
    )
}
REDUCE = {"ablation": outcomes}
