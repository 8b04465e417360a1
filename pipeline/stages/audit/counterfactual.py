"""Scenes drawn again without an object: does a map know what the score loses? Options and statistics, without torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field, PositiveInt

from kernels.audit.intervals import mean_interval
from pipeline.data.scenes import KINDS
from pipeline.stages.attribute.settings import targets_of
from pipeline.stages.audit.declared import LEAST, Asked, Measure, Test, TestOptions
from pipeline.stages.audit.results import Outcome

if TYPE_CHECKING:
    from pipeline.stages.audit.cell import Audited

OBJECTS = 32
"""Objects of a scene at most, the length of arrays by object: behind those that it has, they hold NaN."""
OF = ("map", "untrained", "wrong_class")
TRUTHS = ("drop", "shapley")
SUMS = ("signed", "absolute")
CONTROLS = ("random", "edges", "area", "drop", "shapley", "ring", "ig_black", "ig_mean", "ig_empty")
SIZES = {"small": 0.01, "medium": 0.03, "large": 1.0}
"""Share of the image that an object of a size is seen in, at most."""


class Counterfactual(TestOptions):
    """What the score loses without an object, against what a map says of the object."""

    pixels: PositiveInt = Field(6, description="objects seen in fewer pixels do not count")
    objects: Annotated[int, Field(ge=3, le=OBJECTS)] = Field(
        4, description="images with fewer such objects do not count"
    )
    exact: Annotated[int, Field(ge=1, le=12)] = Field(
        8, description="objects of a scene up to which every subset is drawn, for exact Shapley values"
    )
    coalitions: Annotated[int, Field(ge=2 * OBJECTS, le=4096)] = Field(
        512, description="subsets that are drawn of a scene with more objects, in complementary pairs"
    )
    ring: PositiveInt = Field(2, description="width in pixels of the ring around an object whose colour fills its mask")
    steps: PositiveInt = Field(
        32,
        description="of integrated gradients from black, the mean and the empty scene; and at most of a method's own, "
        "for the untrained network and a wrong class",
    )


def _measures(options: Counterfactual) -> dict[str, Measure]:
    objects = {"object": tuple(map(str, range(OBJECTS)))}
    compared = {"of": OF, "truth": TRUTHS, "sum": SUMS}
    dims = tuple(compared)
    return {
        "rank": Measure("Rank correlation with the truth", dims, compared, "higher"),
        "partial": Measure("Rank correlation, visible area partialled out", dims, compared, "higher"),
        "top": Measure("Most important object found", dims, compared, "higher"),
        "outside": Measure("Magnitude outside all objects", better="lower"),
        "against": Measure("Sum below 0 of objects that count against the class", better="higher"),
        "lone_rank": Measure("Rank correlation for the class of a lone object of another kind", better="higher"),
        "lone_top": Measure("Most important object for that class found", better="higher"),
        "lone_negative": Measure(
            "Sum below 0 of that object where it counts against the image's class", better="higher"
        ),
        "own_kind": Measure("The most important object is of the kind that defines the class"),
        "lone_first": Measure("The lone object is the most important one for its class"),
        "kind": Measure("Kind of each object, its place in `pipeline.data.scenes.KINDS`", ("object",), objects),
        "area": Measure("Share of the image in which each object is seen", ("object",), objects),
        "drop": Measure("What the score loses without the object", ("object",), objects),
        "shapley": Measure("Shapley value of the object", ("object",), objects),
        "shapley_error": Measure("Standard error of its Shapley value", ("object",), objects),
        "signed": Measure("Sum of the map over the object", ("object",), objects),
        "absolute": Measure("Sum of the map's magnitude over the object", ("object",), objects),
    }


def _cost(options: Counterfactual, own: float, size: tuple[int, int]) -> float:
    """Two more maps of a method. The controls share what all need: pictures, and their integrated gradients."""
    if own:
        return 2 * own
    return (options.coalitions + 3 * OBJECTS + 9 * options.steps) / len(CONTROLS)


def _check(options: Counterfactual, asked: Asked) -> Iterator[str]:
    if not asked.spec.redrawable:
        yield (
            f"data set {asked.dataset!r} of kind {asked.spec.kind} cannot be drawn again without an object: name data "
            f"sets of kind scenes in the audit's `datasets`"
        )
    if len(targets_of(asked.explained).classes) > 1:
        yield "a contrast of two classes has no wrong class: explain one class in `targets` of the experiment"


@dataclass(frozen=True)
class _Known:
    """What is compared by kind and size: one truth and one sum of the map, of all images."""

    kind: np.ndarray  # (image, object), NaN where an object does not count
    share: np.ndarray  # of the image that it is seen in
    truth: np.ndarray
    values: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        return ~np.isnan(self.truth)

    def first(self) -> np.ndarray:
        """Return the place of the most important object of each image."""
        return np.argmax(np.where(self.counts, self.truth, -np.inf), 1)

    def overrated(self) -> np.ndarray:
        """Return by how much of the order an object stands higher by the map than by the truth, (image, object)."""
        found = np.full(self.truth.shape, np.nan)
        for row, there in enumerate(self.counts):
            if there.sum() > 1:
                places = [_places(each[row, there]) for each in (self.values, self.truth)]
                found[row, there] = (places[0] - places[1]) / (there.sum() - 1)
        return found


def _places(values: np.ndarray) -> np.ndarray:
    """Return the mean place of each value in ascending order, from 0."""
    below = (values[None] < values[:, None]).sum(1)
    return below + ((values[None] == values[:, None]).sum(1) - 1) / 2


def outcomes(cell: Audited, options: Counterfactual) -> Iterator[Outcome]:
    """Yield the numbers of a cell: means over images with intervals, of the whole, by class, by kind and by size."""
    arrays = cell.arrays
    count = int((~np.isnan(arrays["drop"])).any(1).sum())
    if count < LEAST:
        yield Outcome(
            "partial.drop.signed",
            np.nan,
            images=count,
            state="refused",
            note=f"{count} images are predicted right and show {options.objects} objects, expected {LEAST}",
        )
        return
    for name in ("partial", "rank", "top"):
        for at, of in enumerate(OF):
            for truth_at, truth in enumerate(TRUTHS):
                for sum_at, each in enumerate(SUMS):
                    suffix = "" if of == "map" else f".{of}"
                    yield from _mean(f"{name}.{truth}.{each}{suffix}", arrays[name][:, at, truth_at, sum_at])
    for name, values in arrays.items():
        if values.ndim == 1:
            yield from _mean(name, values)
    yield from _by_group(cell, options)


def _by_group(cell: Audited, options: Counterfactual) -> Iterator[Outcome]:
    """Yield numbers by class, kind and size, of the signed sum against the drop."""
    arrays = cell.arrays
    partial_ = arrays["partial"][:, 0, 0, 0]
    for label, name in enumerate(cell.class_names):
        yield from _mean(f"partial.drop.signed.class.{name}", np.where(cell.labels == label, partial_, np.nan))
    known = _Known(arrays["kind"], arrays["area"], arrays["drop"], arrays["signed"])
    top, over, first = arrays["top"][:, 0, 0, 0], known.overrated(), known.first()
    rows = np.arange(len(first))
    for group, member in (*_kinds(known), *_sizes(known)):
        found = np.where(member[rows, first], top, np.nan)
        yield from _mean(f"top.drop.signed.{group}", found)
        yield from _mean(f"overrated.drop.signed.{group}", _row_means(np.where(member, over, np.nan)))


def _kinds(known: _Known) -> Iterator[tuple[str, np.ndarray]]:
    for number, kind in enumerate(KINDS):
        yield f"kind.{kind}", known.counts & (known.kind == number)


def _sizes(known: _Known) -> Iterator[tuple[str, np.ndarray]]:
    low = 0.0
    for size, high in SIZES.items():
        yield f"size.{size}", known.counts & (known.share > low) & (known.share <= high)
        low = high


def _row_means(values: np.ndarray) -> np.ndarray:
    """Return the mean of what is known of each row, NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


def _mean(measure: str, values: np.ndarray) -> Iterator[Outcome]:
    """Yield the mean of what is known with its interval; nothing where nothing is known."""
    value, low, high, count = mean_interval(values)
    if count:
        yield Outcome(measure, value, low, high, count)


TESTS: dict[str, Test] = {
    "counterfactual": Test(
        "Scenes drawn again",
        "Scenes are drawn again without each of their objects: what the score loses is what a map should say of it.",
        Counterfactual,
        _measures,
        _cost,
        controls=CONTROLS,
        control="random",
        forgets=True,
        draws=True,
        check=_check,
    ),
}
REDUCE = {"counterfactual": outcomes}
