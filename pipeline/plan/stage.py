"""What a stage declares of itself, and the draft of a plan that its steps are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.config.core import Core
from pipeline.config.networks import Network
from pipeline.config.section import Section
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
"""What a step is of, which decides its wildcards and its folder: a data set; a network; a network on a data set; that
with the name of an experiment; an experiment with no more than its name; the configuration."""

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
    settings : everything the id is made of, beside the stage's version and the parents.
    parents : the steps that it reads, in the order that the id holds.
    read : ids of what is read of the parents, where it is a part of them; default: their ids.
    """

    key: Key
    settings: Record
    parents: tuple[Step, ...] = ()
    read: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Copy:
    """A network that a stage adds to those of the configuration, and the one that it is a copy of."""

    network: Network
    original: str


@dataclass
class Draft:
    """A plan that is being made: stages read what is known and the steps so far, and ask for their own.

    Attributes
    ----------
    config : as it was given, with published weights resolved.
    summaries : what the listing of each data set says.
    digests : of files, remembered.
    networks : every network, its untrained control, and the copies that stages ask for.
    originals : of a control or a copy, the network that it belongs to.
    stages : all of them, by name: the last one reads the steps of those that have pages.
    """

    config: Core
    summaries: Mapping[str, Summary]
    digests: FileDigests
    networks: dict[str, Network] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    stages: Mapping[str, Stage] = field(default_factory=dict)

    @property
    def scratch(self) -> Path:
        return scratch_of(self.config)

    def step(self, stage: str, dataset: str | None = None, network: str | None = None, experiment: str = "") -> Step:
        """Return the step of a stage for these names; `KeyError` where there is none (yet)."""
        key = Key(dataset, network, experiment or None)
        return next(step for step in self.steps.values() if (step.stage, step.key) == (stage, key))

    def of_stage(self, stage: str) -> list[Step]:
        return [step for step in self.steps.values() if step.stage == stage]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every network on every data set that it is dissected on: data set, network."""
        for name, network in self.networks.items():
            for dataset in self.config.datasets_of(network):
                yield dataset, name

    def require_classes(self, key: str, datasets: Iterable[str] | None) -> None:
        """Refuse a section that needs classes and names a data set without, or has no data set with classes."""
        without = [name for name, summary in self.summaries.items() if not summary.classes]
        named = [name for name in datasets or () if name in without]
        if named or (datasets is None and len(without) == len(self.summaries)):
            raise MicrotomeError(
                f"{key}: the images of data set {(named or without)[0]!r} have no classes that a network could tell or "
                f"be wrong about: give it `labels`, or name others in `{key}.datasets`"
            )


def nothing(*_: Any) -> Iterator[Any]:
    yield from ()


@dataclass(frozen=True)
class Page:
    """A module of the report's pages, with one function `pages(experiment)`, and its place among the others."""

    module: str
    position: int
    here: bool = False
    """Made in the process of the job, which has the workers draw; the others are made on a worker."""


@dataclass(frozen=True)
class Stage:
    """A stage: all that the rest of the project knows of it.

    Attributes
    ----------
    name : of the rule `make_<name>`, of manifests and commands; never changed.
    version : raised when the same settings give other numbers.
    says : the rule's message, with Snakemake's wildcards.
    steps : asks for the stage's steps, for a draft that holds those of the stages before it.
    run : does the work of one step and writes its manifest.
    settings : the model of what its ids are made of, beside version and parents.
    code : files and folders of the code that decides its numbers, as a test records them.
    place : what a step is of. folder : of its results, where that is an experiment or a comparison.
    section : its key of the configuration.
    networks : networks that it adds to a plan.
    requests : of a network on a data set: what it has the inspection find beside the layers.
    questions : what it has inspected beside the networks that are dissected. speeds : what it has timed.
    check : what is wrong with a step, once the inspection has answered: one sentence each.
    sizes : lines of `make plan` on a step.
    cost : what a step takes; None where only an earlier run says.
    pending : shards that a run would do now, of how many; the images are ingested.
    counts : what `pending` counts, in words.
    explains : what a step does, for `make why`.
    made : the files and folders that a step made.
    owned : the folders that one of its manifests, at this path, refers to.
    unreferenced : folders below the results that nothing refers to, given the folders that something does.
    pages : of the report.
    priority : of Snakemake's jobs.
    """

    name: str
    version: int
    says: str
    place: Place
    steps: Callable[[Draft], Iterable[Wanted]]
    run: Callable[[Job], None]
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
    pages: tuple[Page, ...] = ()
    priority: int = 0

    def folder_of(self, key: Key, config: str) -> str:
        """Return the folder of a step's results, relative to the results folder."""
        names = {"dataset": key.dataset, "network": key.network, "experiment": key.experiment}
        return FOLDERS[self.place].format(folder=self.folder, config=config, **names)

    def manifest(self, key: Key, config: str, id: str) -> str:
        """Return the path of a step's manifest, relative to the results folder."""
        return f"{self.folder_of(key, config)}/done/{self.name}.{id}.json"
