"""The section `attribute` of the configuration, and the content of an explanation's id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, PositiveInt, TypeAdapter, create_model, model_validator

from pipeline.config.base import UNTRAINED, Name, PathName, Strict
from pipeline.config.networks import Numerics, Preprocessing, SpecialTokens
from pipeline.config.section import Chosen, Section, Selection
from pipeline.errors import nearest
from pipeline.networks.fitness import Link
from pipeline.stages.attribute.options import METHODS, AnyMethod, Lrp, OfLayer, Options, Segmented
from pipeline.stages.attribute.results import method_of
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Class = Annotated[int, Field(ge=0)] | str


class _OneOf(Strict):
    """A mapping with one of its keys."""

    @model_validator(mode="after")
    def _one(self) -> _OneOf:
        keys = list(type(self).model_fields)
        if sum(getattr(self, key) is not None for key in keys) != 1:
            raise ValueError(f"give one of {', '.join(f'`{key}`' for key in keys)}")
        return self


ClassTarget = create_model(
    "ClassTarget",
    __base__=_OneOf,
    __doc__="""A target other than the predicted or true class.""",
    **{
        "class": (Class | None, Field(None, description="a class, by its name in the data set or the logit's index")),
        "top": (PositiveInt | None, Field(None, description="each of the K most probable classes")),
        "contrast": (
            tuple[Class, Class] | None,
            Field(None, description="the logit of the first class less that of the second"),
        ),
    },  # type: ignore[call-overload]
)


class BaselineImage(_OneOf):
    """A baseline that is an image."""

    mean: str | None = Field(None, description="the mean of the images of this split")
    file: PathName | None = Field(None, description="an image file of the size of the data set's images")


Baseline = Literal["black", "white", "mean", "blur", "uniform"] | BaselineImage


def _named(methods: Any) -> Any:
    """Fill in the method of an entry that is called like one."""
    if not isinstance(methods, Mapping):
        return methods
    for name, entry in methods.items():
        if name in METHODS and isinstance(entry, Mapping) and entry.get("method", name) != name:
            raise ValueError(f"{name}: its method is {entry['method']!r}, and it is called like another: rename it")
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
        "predicted", description="the class to explain for each image: `predicted`, `label`, or a mapping"
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
        description="by name; an entry named after a method needs no `method`"
    )


Experiments = dict[Name, Explanations]


def check(core: Core, section: Experiments) -> None:
    """Raise `ValueError` where an experiment names a network or data set that is not there."""
    for name, asked in section.items():
        Explanations.section(f"attribute.{name}", "").check(core, asked)
        known = core.with_controls()
        for method, options in asked.methods.items():
            where = f"attribute.{name}.methods.{method}"
            if method.startswith("segments-"):
                raise ValueError(f"{where}: names of stores of segments begin so: rename it")
            most = options.segments.most() if isinstance(options, Segmented) else None
            if isinstance(options, Segmented) and most is not None and (why := options.why_not(most)):
                raise ValueError(f"{where}.{why}")
            if method_of(method) != method:
                raise ValueError(f"{where}: is called like the relevance of units of {method_of(method)!r}: rename it")
            named = list(options.networks or ())
            if isinstance(options, Lrp) and isinstance(options.layers, dict):
                named += options.layers
            if isinstance(options, OfLayer) and isinstance(options.layer, dict):
                named += options.layer
            for network in named:
                if network not in known:
                    raise ValueError(
                        f"attribute.{name}.methods.{method}: no network {network!r}{nearest(network, known)}"
                    )
            among = {each for each in known if any(asked.applies(each, dataset) for dataset in core.datasets)}
            among |= {each.removesuffix(UNTRAINED) for each in among}
            if not among & set(options.networks if options.networks is not None else among):
                raise ValueError(f"attribute.{name}.methods.{method}: none of its networks is one of the experiment")
            if isinstance(options, OfLayer) and isinstance(options.layer, dict) and not among & set(options.layer):
                raise ValueError(f"attribute.{name}.methods.{method}.layer: names no network of the experiment")


def narrowed(core: Core, section: Experiments, selection: Selection) -> Experiments:
    """Return the experiments with the networks and data sets that stay; none that names others alone."""
    found = {}
    for name, asked in section.items():
        kept = asked.narrowed(selection)
        if all(kept.get(key) != [] for key in ("networks", "datasets")):
            found[name] = asked.model_copy(update=kept)
    return found


@dataclass(frozen=True)
class Targets:
    """What is explained of each image.

    Attributes
    ----------
    kind : `predicted`, `label`, `class`, `top` or `contrast`. classes : of `class` and `contrast`, by logit.
    ranks : classes of each image. link : what of a class is explained.
    """

    kind: str
    classes: tuple[int, ...]
    ranks: int
    link: Link


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


def methods_of(settings: Settings) -> dict[str, Options]:
    """Return the options of each method by name."""
    read = TypeAdapter(AnyMethod)
    return {name: read.validate_python(told) for name, told in settings.methods.items()}


def targets_of(settings: Settings) -> Targets:
    """Return what is explained of each image."""
    targets = settings.targets
    if isinstance(targets, str):
        return Targets(targets, (), 1, settings.score)
    ((kind, value),) = targets.items()
    if kind == "top":
        return Targets(kind, (), int(value), settings.score)
    return Targets(kind, tuple(value) if isinstance(value, (list, tuple)) else (value,), 1, settings.score)


SECTION = Section(
    "attribute",
    Experiments,
    "which pixels made networks say so; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)
