"""The configuration without the stages' sections: one strict model.

It refuses unknown keys and wrong values, and names the nearest ones. `pipeline.run.experiment` adds the sections.
`python -m pipeline.config` generates `config/README.md` and `config/schema.json` from these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt, field_validator, model_validator

from pipeline.config.base import ENDINGS, PIXELS, RESERVED, TRUTH, UNTRAINED, Name, PathName, Strict
from pipeline.config.cluster import Cluster
from pipeline.config.datasets import AnyDataset, Generated
from pipeline.config.networks import Expert, Generator, GeneratorNetwork, Network, Segmenter
from pipeline.config.report import Figures, Report
from pipeline.config.section import Section
from pipeline.errors import nearest
from pipeline.storage.object_storage import URL
from pipeline.storage.redact import home


class Controls(Strict):
    """The two controls of every network: an untrained copy, and label maps permuted over the images."""

    images: PositiveInt | None = Field(None, description="maximum number of images of each control; default: all")


class Core(Strict):
    """One experiment."""

    sections: ClassVar[tuple[Section, ...]] = ()
    """The sections that the model has in addition to the keys below."""
    reserved: ClassVar[tuple[str, ...]] = RESERVED
    """The names of folders that no data set, network or experiment may have."""

    name: Name = Field(description="name of the experiment; its report is written to report/<name>")
    results: PathName = Field("results", description="folder of all results; several experiments may share it")
    stores: str | None = Field(
        None,
        description="`s3://bucket/prefix`: keep the chunk files of stores there (extra `s3`); default: in `results`",
    )
    datasets: Annotated[dict[Name, AnyDataset], Field(min_length=1)] = Field(description="by name")
    networks: dict[Name, Network] = Field(description="by name; may be empty where generators are dissected")
    segmenters: dict[Name, Segmenter] = Field({}, description="by name")
    generators: dict[Name, Generator] = Field({}, description="by name")
    experts: dict[Name, Expert] = Field({}, description="by name")
    controls: Controls = Field(Controls(), description="the controls of every network")
    cluster: Cluster = Field(Cluster(), description="the workers")
    report: Report = Field(Report(), description="the pages at the end of a run")
    figures: Figures = Field(Figures(), description="the figures of the report")

    def section(self, key: str) -> Any:
        """Return the section of a stage by its key, or its default if the configuration has none."""
        return getattr(self, key)

    def with_controls(self) -> list[str]:
        """List the names of all networks, each followed by its untrained control if it has one."""
        found = []
        for name, network in self.networks.items():
            found += [name] if network.weights == "random" else [name, name + UNTRAINED]
        return found

    def datasets_of(self, network: Network) -> list[str]:
        """List the data sets that a network is dissected on."""
        return network.datasets if network.datasets is not None else list(self.datasets)

    def generating(self) -> dict[str, GeneratorNetwork]:
        """Return the generators that make a data set's images, by name, as networks dissected on those data sets."""
        named: dict[str, list[str]] = {}
        for name, dataset in self.datasets.items():
            if isinstance(dataset, Generated):
                named.setdefault(dataset.generator, []).append(name)
        return {name: GeneratorNetwork.on(self.generators[name], datasets) for name, datasets in named.items()}

    def dissects(self, network: Network, dataset: str) -> bool:
        """Return whether a network is dissected on a data set: it has layers with maps, the data set has concepts."""
        return network.has_maps and bool(self.datasets[dataset].concepts)

    @field_validator("results")
    @classmethod
    def a_folder_of_its_own(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("give the folder of all results")
        if found := sorted(set(value) & set("{}")):
            raise ValueError(f"{' and '.join(found)} in a path is a placeholder for Snakemake: name another folder")
        if (path := Path(value).resolve()) in (Path(path.anchor), home()):
            raise ValueError(f"{path} holds more than results: name a folder of its own")
        return value

    @field_validator("stores")
    @classmethod
    def _place(cls, value: str | None) -> str | None:
        if value is not None and not URL.fullmatch(value):  # do not repeat it: it may hold a secret
            raise ValueError("it is not of the form s3://bucket or s3://bucket/prefix; it must not contain credentials")
        return value

    @model_validator(mode="after")
    def _names(self) -> Core:
        for name in (*self.datasets, *self.networks, self.name):
            if name in self.reserved:
                raise ValueError(f"the name {name!r} is reserved (as are {', '.join(self.reserved)})")
            if name.endswith(ENDINGS):
                raise ValueError(f"the name {name!r} ends like a file of the results folder ({', '.join(ENDINGS)})")
        for name, network in self.networks.items():
            if name.endswith(UNTRAINED):
                raise ValueError(f"network {name!r}: the suffix {UNTRAINED!r} is for the untrained control")
            ablated = (network.ablate.datasets if network.ablate else None) or []
            wanted = [*(network.datasets or []), *([network.train.dataset] if network.train else []), *ablated]
            for dataset in wanted:
                if dataset not in self.datasets:
                    raise ValueError(f"network {name!r}: no data set {dataset!r}{nearest(dataset, self.datasets)}")
        return self

    @model_validator(mode="after")
    def _generated(self) -> Core:
        if not self.networks and not any(isinstance(each, Generated) for each in self.datasets.values()):
            raise ValueError("networks: name at least one, or a data set of `kind: generated`")
        for name, dataset in self.datasets.items():
            if not isinstance(dataset, Generated):
                continue
            where, generator = f"datasets.{name}", dataset.generator
            if generator not in self.generators:
                raise ValueError(f"{where}.generator: no generator {generator!r}{nearest(generator, self.generators)}")
            if generator in self.networks or generator in self.reserved or generator.endswith((UNTRAINED, *ENDINGS)):
                raise ValueError(
                    f"{where}.generator: its results go to a folder of its own name, and {generator!r} is taken by a "
                    f"network or is a reserved name: call the generator otherwise"
                )
            if self.generators[generator].latent.kind == "scenes" and dataset.size[0] != dataset.size[1]:
                raise ValueError(f"{where}.size: scenes are square, found {dataset.size[0]} x {dataset.size[1]}")
        return self

    @model_validator(mode="after")
    def _sections(self) -> Core:
        for section in self.sections:
            section.check(self, self.section(section.key))
        return self

    @model_validator(mode="after")
    def _sources(self) -> Core:
        for name in self.segmenters:
            if name in (TRUTH, PIXELS):
                raise ValueError(f"segmenter {name!r}: {TRUTH} and {PIXELS} are sources of another kind")
        for name, dataset in self.datasets.items():
            composed = isinstance(dataset, Generated) and self.generators[dataset.generator].latent.kind == "scenes"
            known = [*([TRUTH] if dataset.has_truth or composed else []), PIXELS, *self.segmenters]
            for at, source in enumerate(dataset.concepts):
                if source not in known:
                    raise ValueError(
                        f"datasets.{name}.concepts.{at}: no source {source!r} for data sets of kind {dataset.kind} "
                        f"(there are: {', '.join(known)}){nearest(source, known)}"
                    )
        return self
