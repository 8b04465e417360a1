"""What a stage declares about itself, and the draft plan from which it makes its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.core import Core
from pipeline.config.networks import GeneratorNetwork, Network
from pipeline.config.section import Section
from pipeline.data import kinds
from pipeline.data.kinds import Summary
from pipeline.errors import MicrotomeError
from pipeline.plan.cost import Cost
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.plan.step import Key, Step, scratch_of
from pipeline.storage.identity import FileDigests
from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record

Place = Literal["dataset", "network", "pair", "experiment", "comparison", "report"]
"""The subject of a step, which decides its wildcards and its folder: a data set; a network; a network on a data set; a
named experiment on a network and a data set; a comparison, which has only a name; the configuration.
"""

FOLDERS: dict[Place, str] = {
    "dataset": "{dataset}",
    "network": "networks/{network}",
    "pair": "{dataset}/{network}",
    "experiment": "{dataset}/{network}/{folder}/{experiment}",
    "comparison": "{folder}/{experiment}",
    "report": "report/{config}",
}


@dataclass(frozen=True)
class Wanted:
    """A step that a stage asks for.

    Attributes
    ----------
    settings : all that the id depends on besides the stage's version and the parents.
    parents : the steps that it reads, in the order of its id.
    read : ids of what it reads of the parents, if only a part; default: their ids.
    """

    key: Key
    settings: Record
    parents: tuple[Step, ...] = ()
    read: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Copy:
    """A network that a stage adds to the configured ones, and the original that it copies."""

    network: Network
    original: str


@dataclass
class Draft:
    """A plan in the making: stages read what is known and the steps so far, and add their own.

    Attributes
    ----------
    config : as given, with published weights resolved.
    summaries : what the listing of each data set says.
    digests : the cache of file digests.
    networks : every network, its untrained control, and the copies that stages ask for.
    originals : the network that a control or a copy belongs to.
    stages : all stages by name: the last one reads the steps of those that have pages.
    """

    config: Core
    summaries: Mapping[str, Summary]
    digests: FileDigests
    networks: dict[str, Network] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)

    def step(self, stage: str, dataset: str | None = None, network: str | None = None, experiment: str = "") -> Step:
        """Return a stage's step for these names; `KeyError` if there is none (yet)."""
        key = Key(dataset, network, experiment or None)
        for step in self.steps.values():
            if (step.stage, step.key) == (stage, key):
                return step
        raise KeyError(f"no step {stage} {key} yet: is its stage before this one in the registry?")

    def of_stage(self, stage: str) -> list[Step]:
        return [step for step in self.steps.values() if step.stage == stage]

    def pairs(self, generators: bool = False) -> Iterator[tuple[str, str]]:
        """Yield (data set, network) for every network on every data set that it is dissected on.

        With `generators`, those are among the networks that make the images of a data set.
        """
        for name, network in self.networks.items():
            if isinstance(network, GeneratorNetwork) and not generators:
                continue
            for dataset in self.config.datasets_of(network):
                yield dataset, name

    def class_names(self, dataset: str) -> list[str]:
        """Return the names of all classes that the images of a data set are labelled with, in their order."""
        summary = self.summaries[dataset]
        if len(summary.names) >= summary.classes:
            return summary.names
        return list(kinds.listing(self.config.datasets[dataset], scratch_of(self.config)).classes)

    def chosen(self, declared: Section, classes: bool = False) -> Iterator[tuple[str, str]]:
        """Yield (data set, network) for every pair that a `Chosen` section applies to; none if there is no section.

        With `classes`, yield only those whose images have classes, and refuse a section that names others.
        """
        section = self.config.section(declared.key)
        if section is None:
            return
        if classes:
            self.require_classes(declared.key, section.datasets)
        for dataset, network in self.pairs():
            if section.applies(network, dataset) and (self.summaries[dataset].classes or not classes):
                yield dataset, network

    def require_classes(self, key: str, datasets: Iterable[str] | None) -> None:
        """Refuse a section that needs classes if its data set lacks them, or if no data set has any."""
        without = [name for name, summary in self.summaries.items() if not summary.classes]
        named = [name for name in datasets or () if name in without]
        if named or (datasets is None and len(without) == len(self.summaries)):
            raise MicrotomeError(
                f"{key}: the images of data set {(named or without)[0]!r} have no classes that a network could tell or "
                f"be wrong about: give it `labels`, or name others in `{key}.datasets`"
            )


def require_layers(layers: Sequence[str], network: str, key: str) -> None:
    """Refuse a section that examines layers for a network that has none."""
    if not layers:
        raise MicrotomeError(
            f"{key}: network {network!r} has `layers: []`, which leaves none to examine: name some under its `layers`, "
            f"or other networks in `{key}`"
        )


def nothing(*_: Any) -> Iterator[Any]:
    yield from ()


@dataclass(frozen=True)
class PageModule:
    """A module of report pages, with one function `pages(experiment)`, and its position among the others."""

    module: str
    position: int
    here: bool = False
    """Whether the job's own process makes it, with drawing on the workers; the others are made on a worker."""


@dataclass(frozen=True)
class Stage:
    """A stage: all that the rest of the project knows about it.

    Attributes
    ----------
    name : its name in the rule `make_<name>`, in manifests and in commands; it never changes.
    version : raised when the same settings give different numbers.
    says : the rule's message, with Snakemake's wildcards.
    steps : asks for the stage's steps; the draft holds those of earlier stages.
    run : does the work of one step and writes its manifest.
    settings : the model of all that its ids depend on, besides version and parents.
    code : files and folders of the code that decides its numbers; a test records them.
    place : the subject of a step. folder : of its results, if the subject is an experiment or a comparison.
    section : its section of the configuration.
    networks : networks that it adds to a plan.
    requests : what the inspection finds, besides the layers, about a network on a data set.
    questions : what it has inspected besides the dissected networks. speeds : what it has timed.
    check : problems of a step, after the inspection: one sentence each.
    sizes : lines about a step in `make plan`.
    cost : the cost of a step; None if only an earlier run tells.
    pending : (shards that a run would compute now, all shards), once the images are ingested.
    counts : what `pending` counts, in words.
    explains : what a step does, for `make why`.
    made : the files and folders that a step made.
    owned : the folders that one of its manifests, at this path, refers to.
    unreferenced : folders below the results folder that nothing refers to, given the folders in use.
    pages : its pages of the report.
    priority : of its jobs in Snakemake.
    """

    name: str
    version: int
    says: str
    place: Place
    steps: Callable[[Draft], Iterable[Wanted]]
    run: Callable[[Job[Any]], None]
    settings: type[Record]
    code: tuple[str, ...] = ()
    folder: str = ""
    section: Section | None = None
    networks: Callable[[Draft], Mapping[str, Copy]] | None = None
    requests: Callable[[Job], Mapping[str, Any]] | None = None
    questions: Callable[[Job], Iterable[Question]] = nothing
    speeds: Callable[[Job], Iterable[Question]] = nothing
    check: Callable[[Job], Iterable[str]] = nothing
    sizes: Callable[[Job], Iterable[str]] = nothing
    cost: Callable[[Job, bool], Cost] | None = None
    pending: Callable[[Job], tuple[int, int]] | None = None
    counts: str = ""
    explains: str | Callable[[Step], str] = "recomputed"
    made: Callable[[Job], Iterable[Path]] = nothing
    owned: Callable[[Manifest, Path], set[Path]] | None = None
    unreferenced: Callable[[Path, set[Path]], Iterable[Path]] = nothing
    pages: tuple[PageModule, ...] = ()
    priority: int = 0

    def folder_of(self, key: Key, config: str) -> str:
        """Return the folder of a step's results, relative to the results folder."""
        names = {"dataset": key.dataset, "network": key.network, "experiment": key.experiment}
        return FOLDERS[self.place].format(folder=self.folder, config=config, **names)

    def manifest(self, key: Key, config: str, id: str) -> str:
        """Return the path of a step's manifest, relative to the results folder."""
        return f"{self.folder_of(key, config)}/done/{self.name}.{id}.json"
