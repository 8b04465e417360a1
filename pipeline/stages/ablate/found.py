"""What the report reads of an ablation: one layer's losses, its ranked units, and what sets of them do."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernels.ablation import SERVED
from pipeline.stages.ablate.results import AblatedLayer, group_of
from pipeline.stages.ablate.settings import Measure
from pipeline.stages.dissect.found import Unit
from pipeline.storage.read_back import open_store

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ablation:
    """One ablated layer of a network. Losses are of balanced accuracy, on the split that ranks and the one that judges.

    Attributes
    ----------
    units : the dissection of each unit, by number.
    order : (class, unit), most important first; -1 for a class that could not be ranked.
    rank_loss, judge_loss : (unit, class). accuracy_loss : (unit), on the split that judges.
    set_loss : (kind, size, class); random_loss : (draw, random kind, size, class); both may have no sizes.
    recognised : (class), whether any image of the class is, with all units, on the split that ranks.
    measure : how losses were measured. notes : what a reader has to know.
    """

    dataset: str
    network: str
    layer: str
    classes: list[str]
    units: list[Unit]
    order: NDArray[np.int64]
    rank_loss: Floats
    judge_loss: Floats
    accuracy_loss: Floats
    served: NDArray[np.int64]
    sizes: list[int]
    kinds: list[str]
    set_loss: Floats
    random_loss: Floats
    balanced_accuracy: Floats
    accuracy: float
    recognised: NDArray[np.bool_]
    measure: Measure
    notes: list[str]

    def top(self, c: int) -> list[int]:
        """Return the units that a class depends on most: at most four, and only those whose loss is above 0."""
        best = [unit for unit in self.order[c, :SERVED].tolist() if unit >= 0]
        return [unit for unit in best if self.rank_loss[unit, c] > 0]

    @cached_property
    def by_dependence(self) -> list[int]:
        """Classes that could be ranked, the one that loses most by a single unit first."""
        ranked = [c for c in range(len(self.classes)) if self.order[c, 0] >= 0]
        return sorted(ranked, key=lambda c: -self.rank_loss[self.order[c, 0], c])

    @cached_property
    def without_units(self) -> list[str]:
        """Classes that have something to lose, and lose nothing by any single unit, on the split that ranks."""
        return [self.classes[c] for c in self.by_dependence if not self.top(c) and self.recognised[c]]

    @cached_property
    def never_recognised(self) -> list[str]:
        """Classes of which no image is recognised with all units: what they depend on cannot be told."""
        return [self.classes[c] for c in self.by_dependence if not self.recognised[c]]

    def served_groups(self) -> list[tuple[int, int, float]]:
        """Return (classes served, units, their mean IoU) for each number of classes that occurs."""
        iou = np.array([unit.iou for unit in self.units])
        return [
            (int(n), int((self.served == n).sum()), float(np.nanmean(iou[self.served == n])))
            for n in np.unique(self.served)
            if not np.isnan(iou[self.served == n]).all()
        ]


def read_ablation(results: Path, dataset: str, network: str, layer: str, units: list[Unit]) -> Ablation:
    """Read the group of a layer, verified; `units` are those of all layers."""
    group = open_store(results / dataset / network / "ablation.zarr" / group_of(layer))

    def array(name: str) -> Any:
        return np.asarray(group[name][:])

    measure, facts = Measure.read(group.attrs), AblatedLayer.read(group.attrs)
    splits = array("split").tolist()
    rank, judge = splits.index(measure.rank), splits.index(measure.judge)
    loss, own = array("balanced_accuracy_loss"), [unit for unit in units if unit.layer == layer]
    has_sets, has_draws = facts.sets > 0, facts.sets > 0 and measure.draws > 0
    classes = array("class").tolist()
    return Ablation(
        dataset,
        network,
        layer,
        classes,
        sorted(own, key=lambda unit: unit.unit),
        array("order"),
        loss[rank],
        loss[judge],
        array("accuracy_loss")[judge],
        array("classes_served"),
        array("size").tolist() if has_sets else [],
        array("kind").tolist() if has_sets else [],
        array("set_loss") if has_sets else np.empty((0, 0, len(classes))),
        array("random_loss") if has_draws else np.empty((0, 2, 0, len(classes))),
        array("balanced_accuracy")[judge],
        float(array("accuracy")[judge]),
        array("recall")[rank] > 0,
        measure,
        facts.notes,
    )
