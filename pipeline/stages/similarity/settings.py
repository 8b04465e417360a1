"""The section `similarity` of the configuration, and what a comparison's id is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import UNTRAINED, Many, Name, Share, Strict, _named_once
from pipeline.config.networks import Network
from pipeline.config.section import Section, Selection
from pipeline.errors import nearest
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Features = Literal["whole", "class_token", "spatial", "pooled"]


class Comparison(Strict):
    """Networks whose layers are compared, each with itself and with the others."""

    networks: Annotated[list[str], Field(min_length=1)] = Field(
        description="names of networks; the suffix `-untrained` names their controls"
    )
    dataset: Name | None = Field(
        None, description="data set of the comparison; default: the one that the networks share"
    )


class DataFraction(Strict):
    """A network that is trained here, compared with copies trained on fractions of its images."""

    network: Name = Field(description="a network with `weights: train`")
    fractions: Annotated[list[Share], Field(min_length=1)] = Field(
        description="of its training images, one copy per fraction; the network itself stands for 1"
    )
    dataset: Name | None = Field(
        None, description="data set of the comparison; default: the network's, if it has only one"
    )

    @property
    def copies(self) -> dict[str, float]:
        """The fraction of each copy, by its name, the smallest first."""
        return {f"{self.network}-data{each:g}": each for each in sorted(self.fractions) if each < 1}

    @model_validator(mode="after")
    def _distinct(self) -> DataFraction:
        written = [f"{each:g}" for each in self.fractions]
        if twice := [each for at, each in enumerate(written) if each in written[:at]]:
            raise ValueError(f"fractions: {twice[0]} is there twice")
        if not self.copies:
            raise ValueError("fractions: 1 alone is the network itself: name a smaller one to compare it with")
        return self


class Similarity(Strict):
    """How similar layers are: CKA and related measures, within networks and between them."""

    compare: dict[Name, Comparison] = Field({}, description="by name")
    data_fraction: dict[Name, DataFraction] = Field(
        {}, description="by name: copies of a network, trained on fractions of its images and compared with it"
    )
    images: Annotated[int, Field(ge=4)] = Field(1024, description="images of `split` that each network sees")
    minibatch: Annotated[int, Field(ge=4)] = Field(64, description="images per minibatch")
    epochs: Many = Field(1, description="number of times that the images are shuffled into minibatches")
    replacement: bool = Field(
        False, description="draw each minibatch independently from all images; false: cut a shuffled list of them"
    )
    last: Literal["drop", "weigh"] = Field(
        "drop",
        description="a smaller last minibatch: dropped, or kept, with every minibatch of n images weighted by n "
        "(n - 3)",
    )
    seed: NonNegativeInt = Field(0, description="another seed gives other minibatches")
    split: str | None = Field(None, description="split of the images; default: the dissected one")
    layers: dict[str, Literal["all", "auto"] | Annotated[list[str], Field(min_length=1)]] = Field(
        {},
        description="by network: names or patterns of layers, `auto`, or `all` modules; default: the network's "
        "`layers`",
    )
    features: Annotated[list[Features], Field(min_length=1)] = Field(
        ["whole"],
        description="of each layer: its `whole` output, its `class_token`, its tokens except class and register "
        "tokens (`spatial`), its mean over positions (`pooled`)",
    )
    neighbours: PositiveInt = Field(10, description="number of nearest images for mutual neighbours")
    procrustes: bool = Field(True, description="also measure orthogonal Procrustes, the slowest measure")

    @property
    def comparisons(self) -> dict[str, Comparison]:
        """Every comparison by its name, those of copies among them: a network stands after its copies."""
        fractions = {
            name: Comparison(networks=[*each.copies, each.network], dataset=each.dataset)
            for name, each in self.data_fraction.items()
        }
        return self.compare | fractions

    def original(self, network: str) -> str:
        """The network that another is the control or a copy of; a network of the configuration itself."""
        copied = (each.network for each in self.data_fraction.values() if network in each.copies)
        return next(copied, network.removesuffix(UNTRAINED))

    @model_validator(mode="after")
    def _fits(self) -> Similarity:
        if not self.compare and not self.data_fraction:
            raise ValueError("give networks to `compare`, or a `data_fraction`")
        if both := [name for name in self.data_fraction if name in self.compare]:
            raise ValueError(f"data_fraction.{both[0]}: `compare` has a comparison of this name")
        if self.neighbours >= self.minibatch:
            raise ValueError(f"neighbours: {self.neighbours} is not below the minibatch of {self.minibatch} images")
        lists: dict[str, Sequence[str]] = {f"compare.{name}": each.networks for name, each in self.compare.items()}
        lists["features"] = self.features
        _named_once(lists)
        return self

    def dataset_of(self, core: Core, comparison: str) -> str:
        """Return the data set of a comparison: the one named, or the only one that all of its networks see.

        Raises `ValueError` where there is none, or several.
        """
        section = "compare" if comparison in self.compare else "data_fraction"
        asked, where = self.comparisons[comparison], f"similarity.{section}.{comparison}"
        if asked.dataset is not None and asked.dataset not in core.datasets:
            raise ValueError(f"{where}: no data set {asked.dataset!r}{nearest(asked.dataset, core.datasets)}")
        seen = {name: core.datasets_of(core.networks[self.original(name)]) for name in asked.networks}
        shared = [data for data in core.datasets if all(data in each for each in seen.values())]
        said = "; ".join(f"{name}: {', '.join(each) or 'none'}" for name, each in seen.items())
        if asked.dataset is not None and asked.dataset not in shared:
            raise ValueError(f"{where}: not all of its networks see data set {asked.dataset!r} ({said})")
        if not shared:
            raise ValueError(f"{where}: its networks share no data set ({said})")
        if asked.dataset is None and len(shared) > 1:
            raise ValueError(f"{where}: its networks share {', '.join(shared)}: name one as `dataset`")
        return asked.dataset or shared[0]

    def trained_on_parts(self, networks: Mapping[str, Network]) -> dict[str, Network]:
        """Return the copies that are trained on parts of the images: nothing but their layers is compared."""
        found = {}
        for asked in self.data_fraction.values():
            spec = networks[asked.network]
            assert spec.train is not None
            for name, fraction in asked.copies.items():
                train = spec.train.model_copy(update={"fraction": fraction * spec.train.fraction})
                found[name] = spec.model_copy(update={"train": train, "ablate": None, "group": None, "datasets": []})
        return found


def check(core: Core, section: Similarity | None) -> None:
    """Raise `ValueError` where a comparison names what is not there or cannot be compared."""
    if section is None:
        return
    known = [name + ending for name in core.networks for ending in ("", UNTRAINED)]
    for network in section.layers:
        if network not in known:
            raise ValueError(f"similarity.layers: no network {network!r}{nearest(network, known)}")
    for name, fractions in section.data_fraction.items():
        _can_be_copied(core, f"similarity.data_fraction.{name}", fractions)
        section.dataset_of(core, name)
    for name, comparison in section.compare.items():
        where = f"similarity.compare.{name}"
        for network in comparison.networks:
            if network not in known:
                raise ValueError(f"{where}: no network {network!r}{nearest(network, known)}")
            if network.endswith(UNTRAINED) and core.networks[network.removesuffix(UNTRAINED)].weights == "random":
                raise ValueError(f"{where}: {network!r}: a random network has no control beside it")
        section.dataset_of(core, name)


def _can_be_copied(core: Core, where: str, asked: DataFraction) -> None:
    """Refuse copies of a network that is not trained here, or of a name that is taken."""
    if asked.network not in core.networks:
        raise ValueError(f"{where}: no network {asked.network!r}{nearest(asked.network, core.networks)}")
    if core.networks[asked.network].train is None:
        weights = core.networks[asked.network].weights
        raise ValueError(
            f"{where}: network {asked.network!r} is not trained here (weights: {weights!r}): only one with "
            f"`weights: train` can be trained on a part of its images"
        )
    for copy in asked.copies:
        if copy in core.networks:
            raise ValueError(f"{where}: its copy would be called {copy!r}, as a network is: give that another name")


def narrowed(core: Core, section: Similarity | None, selection: Selection) -> Similarity | None:
    """Return the comparisons whose networks and data set all stay; None where there are none."""
    if section is None:
        return None
    stay = {
        name: {"dataset": data}
        for name, comparison in section.comparisons.items()
        if all(section.original(each) in selection.networks for each in comparison.networks)
        and (data := section.dataset_of(core, name)) in selection.datasets
    }
    sections = {
        "compare": {name: one.model_copy(update=stay[name]) for name, one in section.compare.items() if name in stay},
        "data_fraction": {
            name: one.model_copy(update=stay[name]) for name, one in section.data_fraction.items() if name in stay
        },
    }
    return section.model_copy(update=sections) if stay else None


class Settings(Record):
    """Networks whose layers are compared, and by what; where they are copies of one, the fraction of each."""

    networks: list[str]
    neighbours: int
    procrustes: bool
    fractions: dict[str, float] | None = None


SECTION = Section(
    "similarity",
    Similarity | None,
    "how similar layers of networks are; default: not measured",
    check=check,
    narrowed=narrowed,
)
