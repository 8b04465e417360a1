"""The section `attribute` of the configuration, and the content of an explanation's id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, create_model, model_validator

from pipeline.config.base import Name, PathName, Strict
from pipeline.config.networks import Numerics, Preprocessing, SpecialTokens
from pipeline.config.section import Chosen, Section, Selection
from pipeline.errors import nearest
from pipeline.stages.attribute.options import METHODS, AnyMethod, OfLayer
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Link = Literal["logit", "probability", "log_probability"]
Class = Annotated[int, Field(ge=0)] | str


class _OneTarget(Strict):
    @model_validator(mode="after")
    def _one(self) -> _OneTarget:
        given = [key for key in type(self).model_fields if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("give one of `class`, `top` and `contrast`")
        return self


ClassTarget = create_model(
    "ClassTarget",
    __base__=_OneTarget,
    __doc__="""The scalar that is explained, where it is no predicted or true class.""",
    **{
        "class": (Class | None, Field(None, description="a class, by its name in the data set or the logit's index")),
        "top": (PositiveInt | None, Field(None, description="each of the K most probable classes")),
        "contrast": (
            tuple[Class, Class] | None,
            Field(None, description="the logit of the first class less that of the second"),
        ),
    },  # type: ignore[call-overload]
)


class MeanBaseline(Strict):
    """The mean of the images of a split."""

    mean: str = Field(description="the split, for example `train`")


class FileBaseline(Strict):
    """An image of the user's."""

    file: PathName = Field(description="an image of the size of the data set's")


Baseline = Literal["black", "white", "mean", "blur", "uniform"] | MeanBaseline | FileBaseline


def _named(methods: Any) -> Any:
    """Fill in the method of an entry that is called like one."""
    if not isinstance(methods, Mapping):
        return methods
    return {
        name: {"method": name, **entry} if isinstance(entry, Mapping) else {"method": name} if entry is None else entry
        for name, entry in methods.items()
    }


class Explanations(Chosen):
    """One experiment: images, what is explained of them, and by which methods."""

    controls: ClassVar[bool] = True

    split: str | None = Field(None, description="split of the images; default: the dissected one")
    images: PositiveInt | None = Field(
        None, description="use only the first N images of it, ordered by a hash of their ids; default: all"
    )
    targets: Literal["predicted", "label"] | ClassTarget = Field(  # type: ignore[valid-type]
        "predicted", description="the class that is explained of each image: `predicted`, `label`, or a mapping"
    )
    score: Link = Field("logit", description="what of the class is explained")
    baseline: Baseline = Field(
        "black",
        description="the image without information: `black`, `white`, `mean` (of the images of split `train`), `blur` "
        "or `uniform` noise; or a mapping, `mean: SPLIT` or `file: PATH`",
    )
    keep: list[Literal["channels"]] = Field(
        [], description="what is stored besides the map of each image: its `channels`, where the method has them"
    )
    methods: Annotated[dict[Name, AnyMethod], BeforeValidator(_named), Field(min_length=1)] = Field(
        description="by name; an entry that is called like a method needs no `method`"
    )


Experiments = dict[Name, Explanations]


def check(core: Core, section: Experiments) -> None:
    """Raise `ValueError` where an experiment names a network or data set that is not there."""
    for name, asked in section.items():
        Explanations.section(f"attribute.{name}", "").check(core, asked)
        known = core.with_controls()
        for method, options in asked.methods.items():
            named = list(options.networks or ())
            if isinstance(options, OfLayer) and isinstance(options.layer, dict):
                named += options.layer
            for network in named:
                if network not in known:
                    raise ValueError(
                        f"attribute.{name}.methods.{method}: no network {network!r}{nearest(network, known)}"
                    )


def narrowed(core: Core, section: Experiments, selection: Selection) -> Experiments:
    """Return the experiments with the networks and data sets that stay; none that names others alone."""
    found = {}
    for name, asked in section.items():
        kept = asked.narrowed(selection)
        if all(kept.get(key) != [] for key in ("networks", "datasets")):
            found[name] = asked.model_copy(update=kept)
    return found


class Settings(Record):
    """What is explained of which images, how, and by which methods: name → options, the network's own alone.

    Attributes
    ----------
    images : bound on their number.
    targets : as configured; classes by index.
    baseline : as configured; a file by the digest of its bytes.
    classes : how many the images are labelled with.
    """

    split: str
    images: int | None
    targets: str | dict[str, Any]
    score: Link
    baseline: str | dict[str, str]
    channels: bool
    methods: dict[str, dict[str, Any]]
    classes: int
    preprocessing: Preprocessing
    numerics: Numerics
    special_tokens: int | SpecialTokens | None = None
    grid: tuple[int, int] | None = None
    layout: Any = None


SECTION = Section(
    "attribute",
    Experiments,
    "which pixels made networks say so; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)

__all__ = ["METHODS", "SECTION", "Explanations", "Settings"]
