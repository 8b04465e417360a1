"""The section `attack` of the configuration, and the content of an attack's id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Name, Strict, _named_once
from pipeline.config.networks import Numerics, Preprocessing, SpecialTokens
from pipeline.config.section import Chosen, Section
from pipeline.stages.attribute.settings import Class
from pipeline.stages.attribute.settings import narrowed as narrowed
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Method = Literal["pgd", "apgd_ce", "apgd_dlr", "cw_l2", "square"]
Start = Literal["label", "predicted"]
UNTARGETED = "untargeted"
"""The group of attacks towards any other class."""
Whole = Annotated[int, Field(ge=1, le=255)]
Length = Annotated[float, Field(gt=0)]


class Norms(Strict):
    """Bounds of changes."""

    linf: list[Whole] = Field([], description="largest change of a pixel's channel, in 255ths, whole numbers")
    l2: list[Length] = Field([], description="Euclidean length of the change, for pixels from 0 to 1")

    @model_validator(mode="after")
    def _once(self) -> Norms:
        _named_once({"linf": self.linf, "l2": self.l2})
        return self


class Attacks(Chosen):
    """One experiment: images, the classes that they are to become, and the attacks."""

    controls: ClassVar[bool] = True

    split: str | None = Field(None, description="split of the images; default: the dissected one")
    images: PositiveInt | None = Field(
        200, description="the first N images of the source, ordered by a hash of their ids; null: all"
    )
    pairs: Literal["all"] | list[tuple[Class, Class]] = Field(
        [], description="source and target, by name or by the logit's index, or `all` pairs of classes"
    )
    untargeted: bool = Field(False, description="also attack images of all classes towards any other class")
    start: Start = Field(
        "label",
        description="images of a source: those of its `label` that the network recognises, or all that it `predicted` "
        "to be of it, for networks that were not trained on these labels",
    )
    norms: Norms = Field(Norms(), description="bounds of the changes, for all methods but `cw_l2`")
    methods: Annotated[list[Method], Field(min_length=1)] = Field(
        ["pgd", "apgd_ce"],
        description="`pgd`, `apgd_ce` and `apgd_dlr` within bounds, `cw_l2` for the shortest change, `square` (linf) "
        "without gradients",
    )
    steps: Annotated[int, Field(ge=1, le=100_000)] = Field(50, description="steps of an attack")
    restarts: Annotated[int, Field(ge=1, le=64)] = Field(1, description="random starts of `pgd` and `apgd`")
    searches: Annotated[int, Field(ge=1, le=20)] = Field(
        5, description="cw_l2: weights that are tried, of `steps` each"
    )
    queries: Annotated[int, Field(ge=2, le=1_000_000)] = Field(500, description="square: forwards of an image")
    seed: NonNegativeInt = Field(0, description="of random starts, squares and noise")

    @model_validator(mode="after")
    def _something(self) -> Attacks:
        _named_once({"methods": self.methods})
        if not self.pairs and not self.untargeted:
            raise ValueError("pairs: name pairs of classes, `[source, target]`, or set `untargeted: true`")
        bounded = [each for each in self.methods if each != "cw_l2"]
        if bounded and not (self.norms.linf or self.norms.l2):
            raise ValueError(f"norms: {bounded[0]!r} needs bounds, for example `norms: {{linf: [2, 4, 8]}}`")
        if (self.norms.linf or self.norms.l2) and not bounded:
            raise ValueError("norms: `cw_l2` has no bound: leave them out, or add a method")
        if "square" in self.methods and not self.norms.linf:
            raise ValueError("methods: `square` is of linf: give `norms.linf`, or leave it out")
        return self


Experiments = dict[Name, Attacks]


def check(core: Core, section: Experiments) -> None:
    """Raise `ValueError` where an experiment names a network or data set that is not there."""
    for name, asked in section.items():
        Attacks.section(f"attack.{name}", "").check(core, asked)


@dataclass(frozen=True)
class Attack:
    """One attack: a method, and the norm and bound of the change; `cw_l2` has no bound.

    `epsilon` is in 255ths for `linf`, and of pixels from 0 to 1 for `l2`.
    """

    method: Method
    norm: Literal["linf", "l2"]
    epsilon: float | None = None

    @property
    def name(self) -> str:
        """Its name in the results, for example `pgd-linf-4`."""
        return self.method if self.epsilon is None else f"{self.method}-{self.norm}-{self.epsilon:g}"

    @property
    def radius(self) -> float:
        """The bound in 255ths."""
        assert self.epsilon is not None
        return self.epsilon * (255 if self.norm == "l2" else 1)


@dataclass(frozen=True)
class Pair:
    """Classes by index; None: any."""

    source: int | None
    target: int | None

    @property
    def name(self) -> str:
        """Its name in the results: `3-7`, or `untargeted`."""
        return UNTARGETED if self.target is None else f"{self.source}-{self.target}"


class Settings(Record):
    """What is attacked, and how.

    Attributes
    ----------
    images : bound on those of each source. pairs : source and target by index.
    norms, methods : as configured. ranked : whether the stage `ablate` ranks the network's units.
    """

    split: str
    images: int | None
    pairs: list[tuple[int, int]]
    untargeted: bool
    start: Start
    norms: dict[str, list[float]]
    methods: list[Method]
    steps: int
    restarts: int
    searches: int
    queries: int
    seed: int
    ranked: bool
    classes: int
    preprocessing: Preprocessing
    numerics: Numerics
    special_tokens: int | SpecialTokens | None = None
    grid: tuple[int, int] | None = None
    layout: Any = None


def attacks_of(settings: Settings) -> list[Attack]:
    """Return the attacks in the order of the results: by method, norm and bound."""
    found = []
    for method in settings.methods:
        if method == "cw_l2":
            found.append(Attack(method, "l2"))
            continue
        norms: tuple[Literal["linf", "l2"], ...] = ("linf",) if method == "square" else ("linf", "l2")
        found += [Attack(method, norm, each) for norm in norms for each in sorted(settings.norms[norm])]
    return found


def pairs_of(settings: Settings) -> list[Pair]:
    """Return the pairs of classes in the order of the results."""
    return [*(Pair(*each) for each in settings.pairs), *([Pair(None, None)] if settings.untargeted else [])]


SECTION = Section(
    "attack",
    Experiments,
    "small changes that change what networks say, and the units that they move; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)
