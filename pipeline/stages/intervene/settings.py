"""The section `intervene`, and the content of the ids of interventions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Name, Strict, _named_once
from pipeline.config.core import Core
from pipeline.config.datasets import Generated
from pipeline.config.section import Section, Selection
from pipeline.errors import nearest
from pipeline.storage.record import Record


class Insert(Strict):
    """Units that are set to a high value, where the concept may not be."""

    quantile: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.99, description="the value: this quantile of the unit over positions of the train half"
    )
    at: Literal["grid", "everywhere"] = Field(
        "grid", description="`grid`: at every fourth position of every fourth row; or everywhere"
    )


class Intervention(Strict):
    """One experiment: units of a generator's layer that are ranked for a concept, and removed or inserted."""

    generator: Name = Field(description="of the section `generators`; a data set holds its images")
    layer: str = Field(description="one of the generator's `layers`")
    concept: str = Field(description="`<source>/<category>: <name>`, for example `truth/object: tree`")
    units: Annotated[list[PositiveInt], Field(min_length=1)] = Field(description="how many of the best units")
    replace: Annotated[list[Literal["zero", "mean"]], Field(min_length=1)] = Field(
        ["zero"], description="what removed units give: 0, or their mean over the train half"
    )
    rank: Annotated[list[Literal["iou", "effect"]], Field(min_length=1)] = Field(
        ["iou", "effect"],
        description="on the train half: by IoU with the concept, or by what removal of the unit alone changes inside "
        "the concept's region, less outside",
    )
    insert: Insert | None = Field(None, description="also insert the best units; default: not")
    images: PositiveInt | None = Field(
        None, description="images of the test half that show the concept, at most; default: all"
    )
    rank_images: PositiveInt = Field(32, description="images of the train half for the causal effect, at most")
    draws: NonNegativeInt = Field(3, description="random sets of the same number and mean activation, for each number")
    pictures: Annotated[int, Field(ge=0, le=16)] = Field(6, description="images of which all pictures are kept")
    seed: NonNegativeInt = Field(0, description="of the random sets")
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all of its images")

    @model_validator(mode="after")
    def _once(self) -> Intervention:
        _named_once({"units": self.units, "replace": self.replace, "rank": self.rank, "datasets": self.datasets})
        if ": " not in self.concept:
            raise ValueError(f"concept: {self.concept!r} is not of the form `<source>/<category>: <name>`")
        return self


Interventions = dict[Name, Intervention]


def of_generator(core: Core, generator: str) -> list[str]:
    """Return the data sets that hold a generator's images."""
    return [name for name, each in core.datasets.items() if isinstance(each, Generated) and each.generator == generator]


def check(core: Core, section: Interventions) -> None:
    """Raise `ValueError` where an experiment names a generator or a data set that is not there."""
    for name, asked in section.items():
        where, known = f"intervene.{name}", of_generator(core, asked.generator)
        if asked.generator not in core.generators:
            near = nearest(asked.generator, core.generators)
            raise ValueError(f"{where}.generator: no generator {asked.generator!r}{near}")
        if not known:
            raise ValueError(
                f"{where}.generator: no data set holds images of {asked.generator!r}: add one of `kind: generated`"
            )
        for dataset in asked.datasets or ():
            if dataset not in known:
                raise ValueError(
                    f"{where}.datasets: {dataset!r} holds no images of generator {asked.generator!r}"
                    f"{nearest(dataset, known)}"
                )


def narrowed(core: Core, section: Interventions, selection: Selection) -> Interventions:
    """Return the experiments of which a data set is kept."""
    kept = {}
    for name, asked in section.items():
        left = [each for each in of_generator(core, asked.generator) if each in selection.datasets]
        if asked.datasets is not None:
            left = [each for each in left if each in asked.datasets]
        if left:
            kept[name] = asked if asked.datasets is None else asked.model_copy(update={"datasets": left})
    return kept


class Settings(Record):
    """What is done to which units, and what counts.

    Attributes
    ----------
    category, concept : of the label maps.
    output : what the generator gives for black and for white. latent : its kind.
    """

    split: str
    layer: str
    category: str
    concept: str
    units: list[int]
    replace: list[str]
    rank: list[str]
    insert: Insert | None
    images: int | None
    rank_images: int
    draws: int
    pictures: int
    seed: int
    output: tuple[float, float]
    latent: str


SECTION = Section(
    "intervene",
    Interventions,
    "units of generators that are removed or inserted; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)
