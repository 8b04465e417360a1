"""The sections `networks` and `segmenters`: how to build, load, train, store and ablate networks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StrictInt,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.config.base import Kept, Name, PathName, Positive, Share, Strict
from pipeline.config.patterns import fits
from pipeline.config.recipe import Recipe

RANDOM = "random"
TRAINED_HERE = "train"
FROM_RUN = "randomize:"  # prefix of the names of a randomization experiment and one of its runs
PRETRAINED = "pretrained"  # the published weights of a library that does not name them
LIBRARIES = ("torchvision", "timm", "transformers")
_SOURCES = "`torchvision: name`, `timm: name`, `transformers: folder or name` and `module: path.py:function`"
_TORCHVISION_WEIGHTS = re.compile(r"(\w+_Weights\.)?[A-Z][A-Z0-9_]*")


class Described(Protocol):
    """An object with the fields of a `NetworkSpec`."""

    @property
    def torchvision(self) -> str | None: ...
    @property
    def timm(self) -> str | None: ...
    @property
    def transformers(self) -> str | None: ...
    @property
    def module(self) -> str | None: ...
    @property
    def arguments(self) -> dict[str, Any]: ...
    @property
    def files(self) -> list[str] | None: ...
    @property
    def weights(self) -> str: ...
    @property
    def local(self) -> str | None: ...
    @property
    def download(self) -> bool: ...
    @property
    def seed(self) -> int: ...
    @property
    def prefix(self) -> str | None: ...


class NetworkSpec(BaseModel):
    """Everything needed to build one network. Exactly one of the libraries and `module` is given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    torchvision: str | None = Field(None, description="a name that `torchvision.models.get_model` knows")
    timm: str | None = Field(None, description="a name that `timm.create_model` knows (extra `timm`)")
    transformers: PathName | None = Field(
        None, description="a folder with a config.json, or a name on the hub (extra `transformers`)"
    )
    module: PathName | None = Field(None, description="`path.py:function`; the function returns the network")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the builder; for transformers, entries of its config"
    )
    files: Annotated[list[PathName], Field(min_length=1)] | None = Field(
        None, description="with `module`: the files that its code opens or imports; ids hold their digests"
    )
    weights: PathName = Field(
        RANDOM, description="a checkpoint, `random` (the untrained control) or `train` (trained here)"
    )
    local: PathName | None = Field(
        None, description="the published file itself (transformers: folder), if it is not in the library's cache"
    )
    download: bool = Field(False, description="download published weights that are not on this machine")
    seed: int = Field(default=0, ge=0, lt=2**63, description="of the initial weights")
    prefix: str | None = Field(
        None,
        description="prefix of the network's keys in the checkpoint, for example `module.`; keys without it are left "
        "out, which is said",
    )
    within: str | None = Field(
        None,
        min_length=1,
        description="entry of the checkpoint that holds the weights, for example `teacher` or `ema/state_dict`; "
        "default: `state_dict`, `model_state_dict` or `model`, or the only one with tensors by name",
    )
    output: StrictInt | str | None = Field(
        None,
        description="which of several tensors that the network returns are its logits: a name, or a place from 0; "
        "default: the one called `logits`, or the only one of shape (image, class) if it is the first",
    )

    @model_serializer(mode="wrap")
    def _without_unset_later_keys(self, handler: Any) -> dict[str, Any]:
        """Omit `output` and `within` unless set, so that networks made before they existed keep their ids."""
        found = handler(self)
        for key in ("output", "within"):
            if getattr(self, key) is None:
                found.pop(key, None)
        return found

    @model_validator(mode="after")
    def _one_source(self) -> NetworkSpec:
        if sum(value is not None for value in (self.torchvision, self.timm, self.transformers, self.module)) != 1:
            raise ValueError(f"a network needs exactly one of {_SOURCES}")
        if self.module is not None:
            file, colon, function = self.module.rpartition(":")
            if not (colon and file and function.isidentifier()):
                raise ValueError(f"module {self.module!r} is not of the form path.py:function")
        if self.files is not None and self.module is None:
            raise ValueError("`files` goes with `module`: libraries open files of their own")
        return self

    @model_validator(mode="after")
    def _weights_of_the_source(self) -> NetworkSpec:
        if self.weights == PRETRAINED and self.torchvision is not None:
            raise ValueError(
                "published weights of torchvision have names: give `weights: DEFAULT` or one of the others"
            )
        if self.weights == PRETRAINED and self.module is not None:
            raise ValueError("a module has no published weights: give a checkpoint as `weights: path`")
        if self.published and self.prefix is not None:
            raise ValueError("`prefix` is for a checkpoint of your own; published weights have none")
        if self.within is not None and self.weights_file is None:
            raise ValueError("`within` names an entry of a checkpoint of your own: give that as `weights: path`")
        if self.weights.startswith(FROM_RUN) and len(self.run or ()) != 2:
            raise ValueError(f"weights of a run are named `{FROM_RUN}<experiment>/<run>`, found {self.weights!r}")
        if self.local is not None and not self.published and self.transformers is None:
            raise ValueError("`local` goes with published weights: name the file itself as `weights: path`")
        return self

    @classmethod
    def of(cls, described: Described) -> NetworkSpec:
        """Return the part of a larger description, for example a configured network, that builds the network."""
        if type(described) is cls:
            return described
        return cls(**{name: getattr(described, name) for name in cls.model_fields if hasattr(described, name)})

    @property
    def library(self) -> str | None:
        """Return the library that the network comes from, or None for a user's module."""
        return next((name for name in LIBRARIES if getattr(self, name) is not None), None)

    @property
    def architecture(self) -> str:
        """Return the network's name in messages: that in its library, or that of the building function."""
        return self.torchvision or self.timm or self.transformers or self.module_function

    @property
    def published(self) -> bool:
        """Return whether the library publishes the weights by name, as opposed to a file, random or trained weights."""
        if self.torchvision is not None:
            return _TORCHVISION_WEIGHTS.fullmatch(self.weights) is not None
        return self.module is None and self.weights == PRETRAINED

    @property
    def run(self) -> tuple[str, ...] | None:
        """Return the names of the randomization experiment and run of the weights; None for other weights."""
        if not self.weights.startswith(FROM_RUN):
            return None
        return tuple(filter(None, self.weights.removeprefix(FROM_RUN).split("/")))

    @property
    def weights_file(self) -> Path | None:
        """Return the checkpoint, or None if the weights are random, trained here, from a run or published."""
        if self.weights in (RANDOM, TRAINED_HERE) or self.published or self.run is not None:
            return None
        return Path(self.weights)

    @property
    def module_file(self) -> Path | None:
        return Path(self.module.rpartition(":")[0]) if self.module is not None else None

    @property
    def module_function(self) -> str:
        return self.module.rpartition(":")[2] if self.module is not None else ""


class Preprocessing(Strict):
    """x in [0, 1] → (x - mean) / std, per channel: three numbers for red, green and blue, or one for grey.

    Published weights, timm and transformers state their own mean and std, which are then the default.
    """

    mean: tuple[float, float, float] | tuple[float] = Field((0.485, 0.456, 0.406), description="those of ImageNet")
    std: tuple[Positive, Positive, Positive] | tuple[Positive] = Field(
        (0.229, 0.224, 0.225), description="those of ImageNet"
    )
    per_image: bool = Field(
        False, description="instead whiten each image by its own mean and deviation, as randomization runs do"
    )

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: Any) -> dict[str, Any]:
        """Omit `per_image` unless it is used, so that networks made before it existed keep their ids."""
        found = handler(self)
        if not self.per_image:
            found.pop("per_image", None)  # already absent if defaults are excluded
        return found

    @property
    def channels(self) -> int:
        """Return 1 for a network of grey images, else 3."""
        return len(self.mean)

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> Preprocessing:
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has length {len(self.mean)} and std {len(self.std)}: give each three numbers, or one for grey"
            )
        for key, numbers in (("mean", self.mean), ("std", self.std)):
            if max(numbers) > 1:
                raise ValueError(
                    f"{key} has {max(numbers):g}, but pixels lie between 0 and 1 when (x - mean) / std is computed: of "
                    "numbers between 0 and 255, give number / 255; for a network that takes pixels of 0 to 255 give "
                    f"std {1 / 255:.6f}, and mean / 255"
                )
        return self


class Numerics(Strict):
    """Fixed per network: other values change the last bits of activations."""

    micro_batch: PositiveInt = Field(32, description="images per forward pass; the last one is padded")
    channels_last: bool = Field(True, description="torch's memory format that is faster for convolutions")


class Train(Strict):
    """Where and how a network is trained."""

    dataset: Name = Field(description="the data set to train on")
    split: str = Field("train", description="its split to train on")
    fraction: Share = Field(
        1.0, description="fraction of these images, per class; a larger fraction contains a smaller one"
    )
    recipe: Recipe = Field(Recipe(), description="training settings")


class SpecialTokens(Strict):
    """Where the class and register tokens stand: before and after the tokens of the patches."""

    first: NonNegativeInt = Field(0, description="how many come before the patches")
    last: NonNegativeInt = Field(0, description="how many come after the patches")


class Reading(Strict):
    """What the configuration says of how outputs are read as units at positions; the rest is found."""

    special_tokens: NonNegativeInt | SpecialTokens | None = Field(
        None,
        description="class and register tokens, if detection fails: their number, or `{first: 1, last: 4}`, how many "
        "stand before and after the patches",
    )
    grid: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[y, x]: patches along each side of the image, where tokens alone do not tell"
    )
    layout: Annotated[dict[str, Literal["map", "channels_last", "tokens"]], Field(min_length=1)] | None = Field(
        None,
        description="by name or pattern of layers, where it cannot be found: `map` (unit, y, x), `channels_last` "
        "(y, x, unit) or `tokens` (token, unit)",
    )

    @property
    def special(self) -> int | None:
        """Return the number of special tokens, if it is told."""
        told = self.special_tokens
        return told.first + told.last if isinstance(told, SpecialTokens) else told

    @property
    def settings(self) -> dict[str, Any]:
        """Return the part of a stage's settings that it is: keys that came later only where they are set."""
        later = {name: getattr(self, name) for name in ("grid", "layout") if getattr(self, name) is not None}
        return {"special_tokens": self.special_tokens, **later}

    def layout_of(self, layer: str) -> Literal["map", "channels_last", "tokens"] | None:
        return next((layout for entry, layout in (self.layout or {}).items() if fits(layer, entry)), None)


class Ablate(Strict):
    """Which units each class depends on: units of these layers are removed, one at a time and in sets."""

    layers: Literal["last"] | Annotated[list[str], Field(min_length=1)] = Field(
        "last", description="some of the network's `layers`, by name; `last`: the last of them"
    )
    replace: Literal["zero", "mean", "shuffled"] = Field(
        "zero", description="output of a removed unit: 0, its mean over `rank`, or its output for another image"
    )
    rank: str = Field("train", description="split whose losses rank the units for each class")
    judge: str | None = Field(None, description="split on which sets of units are judged; default: the dissected one")
    images: PositiveInt | None = Field(None, description="maximum number of images of each split; default: all")
    sizes: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        [1, 2, 3, 4, 5, 20, 64, 128, 256, 512, 1024],
        description="of the sets; a layer uses those below its number of units",
    )
    draws: NonNegativeInt = Field(10, description="random sets per size, as a control")
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all of the network's")

    @field_validator("layers")
    @classmethod
    def _last_is_no_name(cls, layers: Any) -> Any:
        if layers == ["last"]:
            raise ValueError("for the last layer write `layers: last`, without brackets")
        return layers


class Network(Reading, NetworkSpec):
    """A network: how to build it, its weights, and the layers to examine."""

    weights: PathName = Field(
        description="a checkpoint of torch or safetensors; `train`; `random`; published weights: `pretrained` (timm, "
        "transformers), `DEFAULT` or another name (torchvision); or `randomize:<experiment>/<run>`"
    )
    layers: Literal["auto"] | list[str] = Field(
        "auto",
        description="names of modules, or patterns such as `layer*`; `auto`: the blocks; `[]`: none, so not dissected",
    )
    preprocessing: Preprocessing = Field(Preprocessing(), description="normalisation that the network expects")
    numerics: Numerics = Field(Numerics(), description="batch size and memory format of its forward passes")
    store: Kept | Annotated[dict[str, Kept], Field(min_length=1)] = Field(
        "full",
        description="of a layer: `full`; `none`: streamed, counted in two forward passes without being stored; "
        "`pooled`: without its maps, so not dissected; or one of these by name or pattern of layers",
    )
    train: Train | None = Field(None, description="with `weights: train`: how it is trained")
    datasets: list[Name] | None = Field(None, description="data sets on which it is dissected; default: all")
    group: Name | None = Field(
        None,
        description="networks of one group, for example seeds or checkpoints, are shown together with mean and spread",
    )
    ablate: Ablate | None = Field(None, description="which units are removed; default: no ablation")

    @model_validator(mode="after")
    def _training_together(self) -> Network:
        if (self.weights == "train") != (self.train is not None):
            raise ValueError("`weights: train` and a section `train:` go together")
        return self

    @property
    def reading(self) -> Reading:
        return Reading(**{name: getattr(self, name) for name in Reading.model_fields})

    def kept(self, layer: str) -> Kept:
        """Return what is stored of a layer: `full`, its maps; else the maximum and mean of each, and special tokens."""
        if isinstance(self.store, str):
            return self.store
        return next((kept for entry, kept in self.store.items() if fits(layer, entry)), "full")

    @property
    def has_maps(self) -> bool:
        """Return whether a layer may have maps, as far as the configuration tells: without any it is not dissected."""
        if isinstance(self.store, str) or not self.layers:
            return bool(self.layers) and self.store != "pooled"
        named = self.layers != "auto" and not any(set(name) & set("*?[") for name in self.layers)
        return not (named and all(self.kept(name) == "pooled" for name in self.layers))

    @property
    def streams(self) -> bool:
        """Return whether layers may be streamed: dissected in two forward passes, without being stored."""
        return "none" in ([self.store] if isinstance(self.store, str) else self.store.values())


class Head(Strict):
    """Which output of a segmentation network gives the classes of a category, and what its channels are called."""

    output: str | None = Field(
        None, description="key of the network's output; default: `out`, `logits`, or the only one"
    )
    channels: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="first and last channel of that output, from 0; default: all"
    )
    classes: PathName = Field(
        description="class list: one name per line, `id name` lines, or a CSV with columns id,name and, if it "
        "covers several categories, category; or `model`: the names in the config.json of a "
        "transformers model"
    )
    first: NonNegativeInt = Field(0, description="id, in the class list, of the first channel: 1 for ADE20K's 150")
    void: list[NonNegativeInt] = Field([], description="void ids, for example background, unlabelled")

    @model_validator(mode="after")
    def in_order(self) -> Head:
        if self.channels is not None and self.channels[0] > self.channels[1]:
            raise ValueError(f"channels: the first, {self.channels[0]}, comes after the last, {self.channels[1]}")
        return self


class Segmenter(NetworkSpec):
    """A segmentation network as a source of concepts; data sets refer to it in `concepts`."""

    weights: PathName = Field(
        description="a checkpoint of torch or safetensors, or published weights: `pretrained` (transformers), "
        "`DEFAULT` or another name (torchvision)"
    )
    preprocessing: Preprocessing = Field(Preprocessing(), description="normalisation that the network expects")
    resize: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height, width to which its input images are resized (bilinear); default: as stored"
    )
    numerics: Numerics = Field(
        Numerics(micro_batch=8), description="batch size and memory format of its forward passes"
    )
    categories: Annotated[dict[Name, Head], Field(min_length=1)] = Field(description="by name of category")

    @model_validator(mode="after")
    def _trained(self) -> Segmenter:
        if self.weights_file is None and not self.published:
            raise ValueError(f"weights: {self.weights!r}: a segmenter needs trained weights, for example a file")
        if self.output is not None:
            raise ValueError("output: name the outputs of a segmenter under `categories`, as `output` of each")
        return self


class Latent(Strict):
    """What a generator makes images of."""

    kind: Literal["normal", "uniform", "scenes"] = Field(
        "normal",
        description="how it is drawn: standard `normal`, `uniform` from -1 to 1, or compositions of the embedded "
        "`scenes`",
    )
    shape: Annotated[list[PositiveInt], Field(min_length=1, max_length=4)] = Field(
        description="of one image's latent, without the batch"
    )


class Beside(Strict):
    """A network of a Python file with trained weights, which is used beside those that are examined."""

    what: ClassVar[str]

    module: PathName = Field(description="`path.py:function`; the function returns the network")
    weights: PathName = Field(description="a checkpoint of torch or safetensors")
    arguments: dict[str, Any] = Field({}, description="keyword arguments of the builder")
    files: Annotated[list[PathName], Field(min_length=1)] | None = Field(
        None, description="the files that its code opens or imports; ids hold their digests"
    )
    prefix: str | None = Field(None, description="prefix of the network's keys in the checkpoint")
    within: str | None = Field(None, min_length=1, description="entry of the checkpoint that holds the weights")

    @model_validator(mode="after")
    def _builds(self) -> Beside:
        if self.weights in (RANDOM, TRAINED_HERE) or self.spec.weights_file is None:
            raise ValueError(f"weights: {self.weights!r}: {self.what} needs trained weights, as a file")
        return self

    @property
    def spec(self) -> NetworkSpec:
        """Return what builds the network."""
        return NetworkSpec(**{name: getattr(self, name) for name in _BUILDS})


class Generator(Beside):
    """A network that makes images: pictures of units may be sought among those that it can make."""

    what: ClassVar[str] = "a generator"

    latent: Latent = Field(description="what it makes images of")
    output: tuple[float, float] = Field((0.0, 1.0), description="what it gives for black and for white, often [-1, 1]")
    layers: Literal["auto"] | list[str] = Field(
        "auto", description="layers to dissect on data sets of its images, as for a network"
    )
    store: Kept | Annotated[dict[str, Kept], Field(min_length=1)] = Field(
        "full", description="what is stored of a layer, as for a network"
    )
    numerics: Numerics = Field(
        Numerics(channels_last=False), description="batch size and memory format when its layers are recorded"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Generator:
        if self.output[0] >= self.output[1]:
            raise ValueError(f"output: black, {self.output[0]:g}, has to lie below white, {self.output[1]:g}")
        return self


class Expert(Beside):
    """A network that knows what likely images are: log p(x), or what is left of an image without its noise."""

    what: ClassVar[str] = "an expert"

    kind: Literal["density", "denoiser"] = Field(
        description="`density`: it gives log p(x) of each image up to a constant, (image,); `denoiser`: the image "
        "without its noise, whose difference from the image over `noise` squared is the gradient of log p(x)"
    )
    weight: NonNegativeFloat = Field(0.1, description="weight of log p(x), per input")
    input: tuple[float, float] = Field((0.0, 1.0), description="what it takes for black and for white, often [-1, 1]")
    noise: Positive | None = Field(
        None,
        description="of a denoiser: the deviation of the noise that it was trained to take away, as a share of the "
        "range from black to white",
    )

    @model_validator(mode="after")
    def _kinds(self) -> Expert:
        if self.input[0] >= self.input[1]:
            raise ValueError(f"input: black, {self.input[0]:g}, has to lie below white, {self.input[1]:g}")
        if self.kind == "denoiser" and self.noise is None:
            raise ValueError("noise: give the deviation of the noise that the denoiser was trained to take away")
        if self.kind == "density" and self.noise is not None:
            raise ValueError("noise: is of a denoiser; a density has none: leave it out")
        return self


_BUILDS = ("module", "weights", "arguments", "files", "prefix", "within")


class GeneratorNetwork(Network):
    """A generator as a network of the plan: it reads the latents of a data set's images in place of their pixels."""

    latent: Latent

    @classmethod
    def on(cls, generator: Generator, datasets: list[str]) -> GeneratorNetwork:
        """Return a generator as the network that is dissected on the data sets of its images."""
        keys = (*_BUILDS, "latent", "layers", "store", "numerics")
        return cls(**{name: getattr(generator, name) for name in keys}, datasets=datasets)


def planned(described: Any) -> Network:
    """Return a network of a plan from its JSON: a generator has a latent."""
    kind = GeneratorNetwork if "latent" in described else Network
    return kind.model_validate(described)
