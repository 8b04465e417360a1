"""The plan of a run as data: the wanted steps, their ids, and the manifests that prove them finished.

The main process computes it from the configuration alone (without torch, without opening a store) and saves it as one
JSON file. Every job reads that file, so ids are computed once.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config.core import Core
from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.storage import SCRATCH
from pipeline.storage.manifest import Manifest
from pipeline.storage.redact import without_home


@dataclass(frozen=True)
class Key:
    """The subject of a step: a data set, a network and an experiment's name, as far as its stage has them.

    An experiment is an entry of the stage's section: a comparison of networks, or runs on one data set.
    """

    dataset: str | None = None
    network: str | None = None
    experiment: str | None = None

    def __str__(self) -> str:
        return " ".join(part for part in (self.dataset, self.network, self.experiment) if part)


@dataclass(frozen=True)
class Step:
    """One job of the workflow: a stage for one key.

    `settings` is all that the id depends on, by name; `parents` are the manifests (relative to the results folder)
    whose outputs it reads.
    """

    stage: str
    id: str
    manifest: str
    key: Key = Key()
    parents: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dataset(self) -> str | None:
        return self.key.dataset

    @property
    def network(self) -> str | None:
        return self.key.network

    @property
    def experiment(self) -> str | None:
        return self.key.experiment

    @property
    def name(self) -> str:
        return f"{self.stage} {self.key}".rstrip()


@dataclass(frozen=True)
class Plan:
    """The configuration and its steps, parents before children.

    Attributes
    ----------
    steps : by manifest path.
    networks : every configured network, its untrained control, and the copies that stages ask for.
    originals : the configured network that a control or a copy belongs to.
    splits : images by data set and split.
    classes : how many the images are labelled with, by data set; 0: no image has a label.
    described : lines on what is read from the data sets. notices : lines on what a user may have meant otherwise.
    arguments : snakemake's arguments besides a target: configuration files and overrides. No id contains them.
    """

    config: Core
    steps: dict[str, Step]
    networks: Mapping[str, Network] = field(default_factory=dict)
    originals: Mapping[str, str] = field(default_factory=dict)
    splits: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)
    described: tuple[str, ...] = field(default=(), compare=False)  # the jobs of a run need neither
    notices: tuple[str, ...] = field(default=(), compare=False)
    cache: Path | None = field(default=None, compare=False)  # in place of the folder of disposable files: of a dry run

    @property
    def results(self) -> Path:
        return Path(self.config.results)

    @property
    def scratch(self) -> Path:
        """Folder for disposable files: caches, pool addresses, plans."""
        return self.cache or scratch_of(self.config)

    def original(self, network: str) -> str:
        """Return the configured network that a control or a copy belongs to; otherwise the network itself."""
        return self.originals.get(network, network)

    def step(
        self, stage: str, dataset: str | None = None, network: str | None = None, experiment: str | None = None
    ) -> Step:
        """Return the one step of a stage with these names; an experiment implies its data set."""
        for step in self.of_stage(stage):
            # The folder of an experiment on one network of a data set has all three names.
            data = None if experiment is not None and network is None else step.dataset
            if (data, step.network, step.experiment) == (dataset, network, experiment):
                return step
        said = " ".join(filter(None, (dataset, network, experiment)))
        raise MicrotomeError(f"the configuration has no step {stage} {said}".rstrip())

    def of_stage(self, stage: str) -> Iterator[Step]:
        return (step for step in self.steps.values() if step.stage == stage)

    def wanted(
        self,
        stage: str,
        id: str,
        dataset: str | None = None,
        network: str | None = None,
        experiment: str | None = None,
    ) -> Step:
        """Return the step if its id matches; refuse a job for any other id."""
        step = self.step(stage, dataset, network, experiment)
        if step.id != id:
            raise MicrotomeError(f"{step.name}: the configuration makes {step.id}, not {id}; ask for it by its word")
        return step

    def manifest(self, step: Step) -> Manifest:
        return Manifest.read(self.results / step.manifest)

    def parent(self, step: Step, stage: str) -> Step:
        """Return the parent of a step that belongs to this stage."""
        for path in step.parents:
            if self.steps[path].stage == stage:
                return self.steps[path]
        raise KeyError(f"{step.name} has no parent of stage {stage}")

    def command(self, target: str) -> str:
        """Return the command that makes a target of this configuration."""
        # A shell expands `~` only if it is not quoted.
        given = (without_home(argument) for argument in self.arguments)
        quoted = ("~/" + shlex.quote(each[2:]) if each.startswith("~/") else shlex.quote(each) for each in given)
        return " ".join(["snakemake", shlex.quote(target), *quoted])


def scratch_of(config: Core) -> Path:
    return Path(config.results) / SCRATCH
