"""The section `visualize` of the configuration, and the content of a visualisation's id."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Name, Strict, _named_once
from pipeline.config.networks import Numerics, Preprocessing, SpecialTokens
from pipeline.config.section import Chosen, Section
from pipeline.errors import nearest
from pipeline.stages.attribute.settings import Class
from pipeline.stages.attribute.settings import narrowed as narrowed
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Rule = Literal["deconvnet", "guided_backprop", "gradient", "deconvnet_unswitched", "guided_backprop_unswitched"]
UNSWITCHED = "_unswitched"
"""Suffix of the rules whose max pooling sends back without its switches."""
Prior = Literal["l2", "tv", "gaussian"]
BUILT_IN = ("l2", "tv", "gaussian", "maco")
"""The experts that are no networks."""
OF_LATENT = "latent-"
"""Prefix of the ways of generators."""
UnitNumber = Annotated[int, Field(ge=0)]


class Projections(Strict):
    """Projections of the images on which a unit responds most, back to their pixels."""

    images: Annotated[int, Field(ge=1, le=100)] = Field(9, description="images of each unit, highest activation first")
    methods: Annotated[list[Rule], Field(min_length=1)] = Field(
        ["deconvnet", "guided_backprop", "gradient"],
        description="what ReLUs send back; with `_unswitched`, max pooling spreads it evenly over its windows",
    )
    units: PositiveInt | None = Field(None, description="only for the first N units of each layer; default: for all")

    @model_validator(mode="after")
    def _once(self) -> Projections:
        _named_once({"methods": self.methods})
        return self


class Maximise(Strict):
    """Images that are made to excite a unit or a class."""

    steps: Annotated[int, Field(ge=1, le=100_000)] = Field(256, description="steps of gradient ascent")
    expert: list[Name] = Field(
        ["l2", "tv"],
        description="what a likely image is: `l2`, `tv` (total variation), `gaussian` (of the data set) and names of "
        "the section `experts` are added up for one picture; `maco`, whose magnitude spectrum is that of the data set, "
        "makes one of its own",
    )
    restarts: Annotated[int, Field(ge=1, le=64)] = Field(
        2, description="starts from different noise; the best is shown"
    )
    l2: NonNegativeFloat = Field(0.1, description="weight of the mean squared input, against the score over its scale")
    tv: NonNegativeFloat = Field(0.5, description="weight of the squared differences of neighbours, per input")
    gaussian: NonNegativeFloat = Field(
        0.1, description="weight of the log-density of the data set's Gaussian, per input"
    )
    rate: Annotated[float, Field(gt=0, le=1)] = Field(
        0.02, description="first step of a pixel at most, as a share of the range from black to white"
    )
    shift: Annotated[float, Field(ge=0, le=0.5)] = Field(0.05, description="random shift, at most this share of a side")
    turn: Annotated[float, Field(ge=0, le=180)] = Field(5.0, description="random rotation, degrees at most")
    zoom: Annotated[float, Field(ge=1, le=4)] = Field(1.1, description="random scale, factor at most")
    crop: Annotated[float, Field(gt=0, le=1)] = Field(0.6, description="maco: smallest random crop, share of a side")
    noise: NonNegativeFloat = Field(0.02, description="maco: deviation of added noise, share of the range")
    phase_rate: Annotated[float, Field(gt=0, le=3)] = Field(0.3, description="maco: first step of a phase, in radians")
    bounded: bool = Field(True, description="keep pixels between black and white")
    generators: list[Name] = Field(
        [], description="of the section `generators`: for each, the picture among the images that it can make"
    )
    latent: NonNegativeFloat = Field(0.05, description="weight of the mean squared latent of a generator")
    latent_rate: Annotated[float, Field(gt=0, le=10)] = Field(0.1, description="first step of a latent at most")
    keep: list[Literal["float"]] = Field([], description="also store pictures as floating-point inputs")
    seed: NonNegativeInt = Field(0, description="of starts and of what is drawn")

    @model_validator(mode="after")
    def _once(self) -> Maximise:
        _named_once({"expert": self.expert, "keep": self.keep, "generators": self.generators})
        return self

    @property
    def priors(self) -> dict[Prior, float]:
        """The weight of each prior that is added up, in a fixed order."""
        found: dict[Prior, float] = {}
        for name in ("l2", "tv", "gaussian"):
            if name in self.expert:
                found[name] = getattr(self, name)
        return found

    @property
    def networks(self) -> list[str]:
        """The experts that are networks, of the section `experts`, in a fixed order."""
        return sorted(name for name in self.expert if name not in BUILT_IN)

    @property
    def ways(self) -> list[str]:
        """The pictures that each unit gets: `pixels`, `maco`, and one of each generator."""
        pixels = self.priors or self.networks or not (self.expert or self.generators)
        plain = (["pixels"] if pixels else []) + (["maco"] if "maco" in self.expert else [])
        return [*plain, *(f"{OF_LATENT}{name}" for name in self.generators)]


class Visualization(Chosen):
    """One experiment: units and classes of networks, and the pictures that are made of them."""

    controls: ClassVar[bool] = True

    split: str | None = Field(None, description="split of the images; default: the dissected one")
    units: dict[str, Literal["best", "all"] | Annotated[list[UnitNumber], Field(min_length=1)]] = Field(
        {},
        description="by layer, one of the network's `layers`: `best` (the detectors, highest IoU first), `all`, or a "
        "list of numbers",
    )
    most: PositiveInt = Field(16, description="of `best`, at most so many units of a layer")
    classes: Literal["all"] | list[Class] = Field(
        [], description="classes by name or by the logit's index, or `all`: models of the class, S_c and log P_c"
    )
    projections: Projections | None = Field(None, description="projections of the images that excite a unit most")
    maximise: Maximise | None = Field(None, description="images made to excite a unit or a class")
    first_layers: bool = Field(True, description="the filters of the convolutions that read the image itself")

    @model_validator(mode="after")
    def _something(self) -> Visualization:
        for layer, units in self.units.items():
            if isinstance(units, list):
                _named_once({f"units.{layer}": units})
        if isinstance(self.classes, list):
            _named_once({"classes": self.classes})
        if self.projections is not None and not self.units:
            raise ValueError("projections: are of units: name some in `units`, by layer")
        if self.maximise is not None and not self.units and not self.classes:
            raise ValueError("maximise: name `units` by layer, or `classes`")
        if self.classes and self.maximise is None:
            raise ValueError("classes: models of classes are maximised: add `maximise: {}`")
        if self.units and self.maximise is None and self.projections is None:
            raise ValueError("units: say what is made of them: `projections: {}` or `maximise: {}`")
        if not (self.units or self.classes or self.first_layers):
            raise ValueError("nothing is asked for: name `units` or `classes`, or set `first_layers: true`")
        return self


Visualizations = dict[Name, Visualization]


def check(core: Core, section: Visualizations) -> None:
    """Raise `ValueError` where an experiment names a network or data set that is not there."""
    if taken := [name for name in (*BUILT_IN, "score") if name in core.experts]:
        raise ValueError(f"experts.{taken[0]}: {taken[0]!r} is the name of another term: choose a different one")
    for name, asked in section.items():
        Visualization.section(f"visualize.{name}", "").check(core, asked)
        for generator in asked.maximise.generators if asked.maximise is not None else ():
            if generator not in core.generators:
                near = nearest(generator, core.generators)
                raise ValueError(f"visualize.{name}.maximise.generators: no generator {generator!r}{near}")
        for expert in asked.maximise.networks if asked.maximise is not None else ():
            if expert not in core.experts:
                near = nearest(expert, [*BUILT_IN, *core.experts])
                raise ValueError(f"visualize.{name}.maximise.expert: no expert {expert!r}{near}")


class Settings(Record):
    """What is drawn of a network, and how.

    Attributes
    ----------
    units : as configured, by layer. most : bound on `best`.
    classes : by index; None: all.
    projections, maximise : as configured.
    generators, experts : by name, what ids hold of those that are named.
    """

    split: str
    units: dict[str, Literal["best", "all"] | list[int]]
    most: int
    classes: list[int] | None
    projections: Projections | None
    maximise: Maximise | None
    first_layers: bool
    generators: dict[str, Any]
    experts: dict[str, Any] = Field({})
    preprocessing: Preprocessing
    numerics: Numerics
    special_tokens: int | SpecialTokens | None = None
    grid: tuple[int, int] | None = None
    layout: Any = None


SECTION = Section(
    "visualize",
    Visualizations,
    "what units and classes want to see; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)
