"""Compare networks: the members of a group, and a network before and after its weights were replaced."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.report.experiment import Experiment
from pipeline.stages.dissect.counting import LayerCount, count_detectors
from pipeline.stages.dissect.found import Network, Unit, networks, read_layer_paths, read_units
from pipeline.stages.extract import replaced as earlier


@dataclass(frozen=True)
class Group:
    """Networks of one group on one data set, dissected at the same layers."""

    name: str
    dataset: str
    members: list[Network]

    @property
    def layers(self) -> list[str]:
        return self.members[0].trained.layer_names

    def share(self, layer: int) -> list[float]:
        """Return the share of the layer's units that are detectors, for each member."""
        return [member.counts["trained"][layer].share for member in self.members]

    def spread(self, layer: int) -> tuple[float, float]:
        """Return mean and standard deviation (of the sample; NaN for a single member) of `share`."""
        values = self.share(layer)
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


@dataclass(frozen=True)
class Before:
    """A network under earlier weights: their sha256, its accuracy (NaN: unknown), and its detectors."""

    weights: str
    accuracy: float
    counts: list[LayerCount]
    units: list[Unit]

    @property
    def detectors(self) -> int:
        return sum(count.detectors for count in self.counts)


@dataclass(frozen=True)
class Replaced:
    """A network and its earlier weights, newest first. `now` is the network under the present weights."""

    network: Network
    now: Before
    before: list[Before]

    @property
    def relabelled(self) -> list[tuple[Unit, Unit]]:
        """Return units whose concept changed with the weights, as (before, now), in layers that both networks have."""
        known = {(unit.layer, unit.unit): unit for unit in self.before[0].units}
        pairs = ((known.get((unit.layer, unit.unit)), unit) for unit in self.now.units)
        return [(old, new) for old, new in pairs if old is not None and old.concept != new.concept]


def groups(experiment: Experiment) -> list[Group]:
    """Return the configured groups with at least two members on a data set; their layers must be the same."""
    of = {name: spec["group"] for name, spec in experiment.configuration.get("networks", {}).items() if "group" in spec}
    found: dict[tuple[str, str, tuple[str, ...]], list[Network]] = {}
    for network in networks(experiment):
        name = of.get(network.trained.network)
        if name is not None:
            found.setdefault((name, network.trained.dataset, tuple(network.trained.layer_names)), []).append(network)
    return [Group(name, data, members) for (name, data, _), members in found.items() if len(members) > 1]


def replaced(experiment: Experiment) -> Iterator[Replaced]:
    """Yield the networks with kept results of earlier weights."""
    for network in networks(experiment):
        folder = experiment.results / network.trained.dataset / network.trained.network
        before = [_before(home, facts) for home, facts in earlier.kept(folder)]
        if before:
            model = network.trained.model
            now = Before(
                str(model.get("weights_sha256", "")),
                _measured_now(experiment, network),
                network.counts["trained"],
                network.trained.units,
            )
            yield Replaced(network, now, before)


def _before(home: Path, facts: dict) -> Before:
    layers = list(read_layer_paths(home / "layers.json"))
    units = read_units(home / "units.csv", layers)
    accuracy = facts.get("accuracy")
    return Before(
        facts["weights_sha256"], math.nan if accuracy is None else accuracy, count_detectors(units, layers), units
    )


def _measured_now(experiment: Experiment, network: Network) -> float:
    """Return the accuracy by the logits, as for the earlier weights: over the same images."""
    from pipeline.data.images import Images
    from pipeline.storage.manifest import latest

    folder = experiment.results / network.trained.dataset
    ingest = latest(folder / "done", "ingest")
    if ingest is None:
        return math.nan
    images = Images.from_manifest(folder / "images.zarr", ingest)
    accuracy = earlier.measured(folder / network.trained.network / "logits.zarr", images)["accuracy"]
    return math.nan if accuracy is None else accuracy


def changes(
    layers: Sequence[LayerCount], before: Sequence[LayerCount]
) -> list[tuple[str, LayerCount | None, LayerCount]]:
    """Return each present layer with the earlier layer of this name; None if there was none."""
    known = {count.layer: count for count in before}
    return [(count.layer, known.get(count.layer), count) for count in layers]
