"""Count detectors: how many units of a layer detect a concept, and how many different concepts they detect."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """One row of `units.csv`; blank numbers are NaN."""

    layer: str
    unit: int
    concept: str
    category: str
    iou: float
    iou_ceiling: float
    iou_held_out: float
    ci_low: float
    ci_high: float
    threshold: float
    activation_rate: float

    @property
    def detector(self) -> bool:
        """Whether the unit kept a label, that is, its IoU exceeds `min_iou`."""
        return bool(self.concept)

    @property
    def share_of_ceiling(self) -> float:
        """IoU / ceiling: 1 is the optimum for a mask of this size. NaN without a ceiling."""
        return self.iou / self.iou_ceiling if self.iou_ceiling > 0 else math.nan


@dataclass(frozen=True)
class LayerCount:
    """Detectors of one layer.

    Attributes
    ----------
    units, detectors, unique : int
        Units measured; units whose IoU with their best concept exceeds `min_iou`; different concepts among those
        ("unique detectors" in Bau et al., Network Dissection, CVPR 2017).
    by_category : dict[str, tuple[int, int]]
        (detectors, unique detectors) of every category that has any, by name.
    """

    layer: str
    units: int
    detectors: int
    unique: int
    by_category: dict[str, tuple[int, int]]

    @property
    def share(self) -> float:
        """Detectors / units; 0 for a layer without units."""
        return self.detectors / self.units if self.units else 0.0


def count_detectors(units: Iterable[Unit], layers: Sequence[str]) -> list[LayerCount]:
    """Count detectors and unique detectors per layer and category, one entry for each of `layers`, in that order.

    A concept counts once per category: two categories may share a name (`glass` as object and as material).
    """
    of_layer: dict[str, list[Unit]] = {name: [] for name in layers}
    for unit in units:
        of_layer[unit.layer].append(unit)
    return [_count(name, rows) for name, rows in of_layer.items()]


def categories(counts: Iterable[LayerCount]) -> list[str]:
    """Return the names of all categories with a detector in one of `counts`, sorted."""
    return sorted({category for count in counts for category in count.by_category})


def _count(layer: str, units: list[Unit]) -> LayerCount:
    detectors: dict[str, int] = {}
    concepts: dict[str, set[str]] = {}
    for unit in units:
        if unit.detector:
            detectors[unit.category] = detectors.get(unit.category, 0) + 1
            concepts.setdefault(unit.category, set()).add(unit.concept)
    return LayerCount(
        layer=layer,
        units=len(units),
        detectors=sum(detectors.values()),
        unique=sum(len(names) for names in concepts.values()),
        by_category={name: (detectors[name], len(concepts[name])) for name in sorted(detectors)},
    )


@dataclass(frozen=True)
class ConceptCount:
    """Detectors of one concept: in all layers, and in the last one."""

    concept: str
    category: str
    units: int
    last: int


def count_concepts(units: Iterable[Unit], last: str) -> list[ConceptCount]:
    """Count detectors per concept, most first; ties by the count in the layer `last`, then by name."""
    found: dict[tuple[str, str], list[int]] = {}
    for unit in units:
        if unit.detector:
            count = found.setdefault((unit.concept, unit.category), [0, 0])
            count[0] += 1
            count[1] += unit.layer == last
    counts = [ConceptCount(*label, *count) for label, count in found.items()]
    return sorted(counts, key=lambda count: (-count.units, -count.last, count.concept, count.category))
