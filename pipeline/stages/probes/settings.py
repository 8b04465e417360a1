"""The section `probes`, and what the id of the probes of a network is made of."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Many, Name, _named_once
from pipeline.config.section import Chosen
from pipeline.storage.record import Record

ProbeFeatures = Literal["class_token", "pooled", "spatial"]


class Probes(Chosen):
    """Linear probes: how well the classes can be read off each layer by a linear classifier."""

    networks: list[str] | None = Field(
        None, description="these networks, with `-untrained` at the end their controls; default: all but controls"
    )
    datasets: list[Name] | None = Field(None, description="on these data sets; default: all with classes")
    features: Annotated[list[ProbeFeatures], Field(min_length=1)] = Field(
        ["class_token", "pooled", "spatial"],
        description="what is read of a layer: its `class_token`, its mean over the positions (`pooled`), single "
        "positions (`spatial`); those that it has",
    )
    grid: PositiveInt = Field(2, description="single positions a side, evenly spread, each with a probe of its own")
    shots: list[PositiveInt] = Field([1, 5, 10], description="images of each class to fit on, beside all there are")
    draws: Many = Field(10, description="random picks of these images, which are averaged over")
    fit: str = Field("train", description="the split to fit on")
    choose: str | None = Field(
        None, description="the split that chooses the penalty; default: a `share` of `fit`, which is not fitted on"
    )
    test: str | None = Field(
        None, description="the split to judge on; default: the one that is dissected. If it is `fit`, a `share` of it"
    )
    share: Annotated[float, Field(gt=0, lt=0.5)] = Field(0.2, description="of the images of a split with two purposes")
    images: PositiveInt | None = Field(None, description="bound on the images of each split; default: all")
    penalties: Annotated[list[Annotated[float, Field(ge=1e-9)]], Field(min_length=1)] = Field(
        [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0],
        description="that one is chosen of, for each image and standardised features",
    )
    seed: NonNegativeInt = Field(0, description="of the shares and of the picks")

    @model_validator(mode="after")
    def _apart(self) -> "Probes":
        keys = ("networks", "datasets", "features", "shots", "penalties")
        _named_once({key: getattr(self, key) for key in keys})
        if self.choose is not None and self.choose in (self.fit, self.test):
            purpose = "fitted" if self.choose == self.fit else "judged"
            raise ValueError(
                f"choose: split {self.choose!r} is {purpose} on: name another, or leave it out for a share of `fit`"
            )
        return self


class Fitting(Record):
    """On which images probes are fitted, and how.

    Attributes
    ----------
    fit, choose, test : the splits to fit on, to choose the penalty on (None: on a share of `fit`), and to judge on.
    share : of the images of a split with two purposes. images : bound on those of each split; None: all.
    draws : random picks of few images. penalties : to choose from, in order. seed : of shares and picks.
    """

    fit: str
    choose: str | None
    test: str
    share: float
    images: int | None
    draws: int
    penalties: list[float]
    seed: int

    @property
    def splits(self) -> set[str]:
        """The splits whose images are fitted on, choose or judge."""
        return {self.fit, self.test} | ({self.choose} if self.choose is not None else set())


class Probing(Fitting):
    """That, with what is read of each layer, and of how many images of each class, in order."""

    features: list[ProbeFeatures]
    grid: int
    shots: list[int]

    @property
    def fitting(self) -> Fitting:
        return Fitting(**{name: getattr(self, name) for name in Fitting.model_fields})


class Settings(Record):
    """How layers are probed, and how many classes the images are labelled with."""

    probes: Probing
    classes: int


SECTION = Probes.section("probes", "with this section, layers are probed; default: none are")
