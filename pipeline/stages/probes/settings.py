"""The section `probes`, and what the id of the probes of a network is made of."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Many, Name, _named_once
from pipeline.config.section import Chosen
from pipeline.storage.record import Record

ProbeFeatures = Literal["class_token", "pooled", "spatial"]


class Probes(Chosen):
    """Linear probes: how well a linear classifier reads the classes off each layer."""

    networks: list[str] | None = Field(
        None,
        description="only these networks; the suffix `-untrained` names their controls; default: all except controls",
    )
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all with classes")
    features: Annotated[list[ProbeFeatures], Field(min_length=1)] = Field(
        ["class_token", "pooled", "spatial"],
        description="what is read of a layer, if it has it: its `class_token`, its mean over positions "
        "(`pooled`), single positions (`spatial`)",
    )
    grid: PositiveInt = Field(2, description="single positions per side, evenly spread, each with its own probe")
    shots: list[PositiveInt] = Field(
        [1, 5, 10], description="images of each class to fit on, besides a fit on all images"
    )
    draws: Many = Field(10, description="random picks of these images, whose results are averaged")
    fit: str = Field("train", description="split to fit on")
    choose: str | None = Field(
        None, description="split that chooses the penalty; default: a `share` of `fit`, left out of the fit"
    )
    test: str | None = Field(
        None, description="split to judge on; default: the dissected one. If it is `fit`, a `share` of it"
    )
    share: Annotated[float, Field(gt=0, lt=0.5)] = Field(
        0.2, description="share of the images of a split that serves two purposes"
    )
    images: PositiveInt | None = Field(None, description="maximum number of images of each split; default: all")
    penalties: Annotated[list[Annotated[float, Field(ge=1e-9)]], Field(min_length=1)] = Field(
        [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0],
        description="candidates for the penalty, per image, with standardised features",
    )
    seed: NonNegativeInt = Field(0, description="of the shares and the random picks")

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


SECTION = Probes.section("probes", "how layers are probed; default: no probes")
