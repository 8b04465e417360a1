"""The input of every report page: the results folder, the finished steps, and how to draw."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from pipeline.config.base import UNTRAINED
from pipeline.config.report import Figures, Report
from pipeline.plan import inspected
from pipeline.plan.job import Job
from pipeline.workers.tasks import run_in_order

Result = TypeVar("Result")


@dataclass(frozen=True)
class Made:
    """One finished step, read from its manifest: `result` holds the small facts that the stage left for others.

    `notices` are what the inspection of its network on its data set found, for the step that extracts.
    """

    stage: str
    dataset: str | None = None
    network: str | None = None
    id: str = ""
    seconds: float | None = None
    result: Mapping[str, Any] = field(default_factory=dict)
    experiment: str | None = None
    notices: tuple[str, ...] = ()

    @staticmethod
    def of(job: Job) -> Made:
        """Return a finished job, read from its manifest."""
        manifest, key = job.read(), job.key
        seconds = manifest.provenance.get("seconds")
        return Made(
            stage=job.stage.name,
            dataset=key.dataset,
            network=key.network,
            id=job.id,
            seconds=seconds,
            result=manifest.result,
            experiment=key.experiment,
            notices=tuple(inspected.notices(job)),
        )


@dataclass(frozen=True)
class DissectedPair:
    """A network and its untrained control, by their names in the results folder; None without that control.

    The other control, label maps permuted over the images, is shown if `units-permuted.csv` stands beside `units.csv`;
    `permuted_images` is the number of its images, if known.
    """

    dataset: str
    network: str
    control: str | None = None
    permuted_images: int | None = None


def file_names(pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Return `<dataset>-<network>` for pairs of names, with a number if two coincide."""
    names: dict[tuple[str, str], str] = {}
    for pair in pairs:
        plain = "-".join(pair)
        alike = sum("-".join(other) == plain for other in names)
        names[pair] = f"{plain}-{alike + 1}" if alike else plain
    return names


@dataclass(frozen=True)
class Experiment:
    """The facts of one configuration.

    Attributes
    ----------
    results : the results folder, read-only.
    out : the report's own folder, into which pages write.
    made : the finished steps of the plan, parents before children.
    configuration : the configuration as JSON, without default values.
    versions : what computed the results: revision, Python, packages.
    command : the command that regenerates this report.
    workers : a `distributed.Client`; None: everything is computed in this process.
    accuracies : how often networks are right, by (data set, network); an untrained control may be among them.
    """

    results: Path
    out: Path
    title: str
    made: tuple[Made, ...]
    configuration: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    command: str = "snakemake report"
    report: Report = field(default_factory=Report)
    figures: Figures = field(default_factory=Figures)
    workers: Any = None
    accuracies: Mapping[tuple[str, str], Any] = field(default_factory=dict)

    def of_stage(self, stage: str) -> list[Made]:
        """Return the steps of a stage, in configuration order; none if the configuration lacks it."""
        return [made for made in self.made if made.stage == stage]

    @property
    def dissected(self) -> list[DissectedPair]:
        """Return the dissected networks, each with its untrained control if there is one."""
        dissected = {(made.dataset, made.network): made for made in self.of_stage("dissect")}
        found = []
        for (dataset, network), made in dissected.items():
            assert dataset is not None and network is not None
            if not network.endswith(UNTRAINED):
                control = network + UNTRAINED if (dataset, network + UNTRAINED) in dissected else None
                found.append(DissectedPair(dataset, network, control, made.result.get("control_images")))
        return found

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """Return (data set, network) of the dissected networks, then of those that only went through `extract`."""
        found = dict.fromkeys((one.dataset, one.network) for one in self.dissected)
        for made in self.of_stage("extract"):
            if made.dataset is not None and made.network is not None and not made.network.endswith(UNTRAINED):
                found.setdefault((made.dataset, made.network))
        return list(found)

    def once(self, read: Callable[[Experiment], Result]) -> Result:
        """Return what a function reads for this experiment; the result is cached for all pages."""
        if read not in self._read:
            self._read[read] = read(self)
        return self._read[read]

    @cached_property
    def _read(self) -> dict[Callable[[Experiment], Any], Any]:
        return {}

    def name(self, dataset: str, network: str) -> str:
        """Return a network's name in file names: `<dataset>-<network>`, with a number if two coincide."""
        return self._names[dataset, network]

    @cached_property
    def _names(self) -> dict[tuple[str, str], str]:
        return file_names(self.pairs)

    def label(self, dataset: str, network: str) -> str:
        """Return a network's name for readers: with its data set only if there are several."""
        several = len({of for of, _ in self.pairs}) > 1
        return f"{network} on {dataset}" if several else network

    def page_of(self, dataset: str, network: str) -> str:
        """Return the file of a network's page."""
        return f"network-{self.name(dataset, network)}.html"

    def link_to(self, dataset: str, network: str, layer: str, unit: int) -> str:
        """Return the address of a unit in its network's browser."""
        return f"{self.page_of(dataset, network)}#unit={quote(layer, safe='')}/{unit}"

    def map(self, function: Callable[..., Result], tasks: Iterable[tuple], label: str) -> Iterator[Result]:
        """Yield `function(*task)` for every task, on the workers if there are any, in the order of the tasks."""
        if self.workers is None:
            return (function(*task) for task in tasks)
        return iter(run_in_order(self.workers, function, tasks, label))
