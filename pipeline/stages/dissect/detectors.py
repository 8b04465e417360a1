"""One dissected network as the report shows it: its units and those of its controls, counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Comparison
from pipeline.stages.dissect.counting import ConceptCount, LayerCount, categories, count_concepts, count_detectors
from pipeline.stages.dissect.found import Dissection, Unit, read_dissection, read_units
from pipeline.storage.manifest import recorded


@dataclass(frozen=True)
class Network:
    """A network beside its controls. `runs` holds the units of each run: `trained`, `untrained`, `permuted`."""

    trained: Dissection
    untrained: Dissection | None
    runs: dict[str, list[Unit]]
    permuted_images: int | None

    @cached_property
    def counts(self) -> dict[str, list[LayerCount]]:
        """Detectors of every layer, by run."""
        return {run: count_detectors(units, self.trained.layer_names) for run, units in self.runs.items()}

    @cached_property
    def category_names(self) -> dict[str, str]:
        """Short names of the categories with a detector in any run, in the order of their colours."""
        return short_names(categories(count for run in self.counts.values() for count in run))

    @cached_property
    def concepts(self) -> list[ConceptCount]:
        """Detectors per concept."""
        return count_concepts(self.trained.units, self.trained.layers[-1].name)

    @property
    def last(self) -> dict[str, LayerCount]:
        """The count of the last layer, by run."""
        return {run: counts[-1] for run, counts in self.counts.items()}

    @property
    def detectors(self) -> int:
        """Detectors of the trained network in all layers."""
        return sum(count.detectors for count in self.counts["trained"])

    @property
    def settings(self) -> dict[str, Any]:
        """Attributes that all layers' IoU stores share."""
        first, *others = [layer.settings for layer in self.trained.layers]
        return {
            key: first[key]
            for key in sorted(first)
            if all(other.get(key) == first[key] for other in others) and key != "coordinates"
        }

    def iou(self) -> dict[str, dict[str, list[float]]]:
        """IoU of every unit, by run and layer."""
        found: dict[str, dict[str, list[float]]] = {}
        for run, units in self.runs.items():
            found[run] = {layer: [] for layer in self.trained.layer_names}
            for unit in units:
                found[run][unit.layer].append(unit.iou)
        return found


def read_network(results: Path, comparison: Comparison) -> Network:
    """Read one network and its controls."""
    trained = read_dissection(results, comparison.dataset, comparison.network)
    runs = {"trained": trained.units}
    untrained = None
    if comparison.control is not None:
        untrained = read_dissection(results, comparison.dataset, comparison.control)
        _same_layers(trained, untrained)
        runs["untrained"] = untrained.units
    permuted = results / comparison.dataset / comparison.network / "units-permuted.csv"
    if permuted.exists() or recorded(permuted):
        runs["permuted"] = read_units(permuted, trained.layer_names)
    return Network(trained, untrained, runs, comparison.permuted_images)


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Categories without their source (`truth/object` -> `object`) where that leaves no two alike."""
    tails = [name.partition("/")[2] or name for name in names]
    return dict(zip(names, tails if len(set(tails)) == len(tails) else names, strict=True))


def _same_layers(trained: Dissection, untrained: Dissection) -> None:
    if trained.layer_names != untrained.layer_names:
        raise MicrotomeError(
            f"{untrained.network} was cut at {', '.join(untrained.layer_names)}, but {trained.network} at "
            f"{', '.join(trained.layer_names)}; a control needs the same layers: dissect both with one configuration"
        )
