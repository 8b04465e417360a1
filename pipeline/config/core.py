"""The configuration: one strict model; an unknown key or a wrong value is refused with the nearest names.

`config/README.md` and the JSON schema `config/schema.json` are generated from these classes by
`python -m pipeline.config`.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from pipeline.config.recipe import Recipe
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.build import FROM_RUN, NetworkSpec
from pipeline.networks.layer import fits
from pipeline.storage.object_storage import URL

RESERVED = ("networks", "layers", "done", "logs", "similarity", "randomization", "report")
ENDINGS = (".zarr", ".ledger", ".csv", ".json")  # of files that stand beside the folders of networks
UNTRAINED = "-untrained"  # suffix of the control network that stands beside every network
TRUTH = "truth"  # concept source: the label maps that come with a data set
PIXELS = "pixels"  # concept source: colour names of the pixels

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Kept = Literal["full", "pooled", "none"]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Many = Annotated[int, Field(ge=1, le=100_000)]  # of what is done so often: more is a slip, and would never end


class Strict(BaseModel):
    # An infinite number means nothing for any key, and JSON, which ids are made of, has none.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _named_once(lists: Mapping[str, Sequence[Any] | None]) -> None:
    """Raise where a list, by its key, has an entry twice."""
    for key, entries in lists.items():
        for at, entry in enumerate(entries or ()):
            if entry in (entries or ())[:at]:
                raise ValueError(f"{key}: {entry!r} is named twice")


class Dissect(Strict):
    """Settings of the dissection. `method` is a preset; a key given beside it overrides the preset."""

    method: Literal["standard", "pnas2020", "cvpr2017"] = Field(
        "standard", description="preset of the four keys below; the other two are those of the papers' code"
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(None, description="share of positions above t_u")
    positions: Literal["upsampled", "native"] | None = Field(
        None, description="where the threshold is counted: maps upsampled to the label maps' size, or as they are"
    )
    border: Literal["edge", "zeros"] | None = Field(
        None, description="what lies outside a map when it is upsampled: its edge values, or zeros that blend in"
    )
    union: Literal["all", "category"] | None = Field(None, description="pixels in the union: all, or of images with it")
    min_iou: Annotated[float, Field(ge=0, lt=1)] = Field(0.04, description="a unit is a detector above this IoU")
    split: str = Field("validation", description="the images that thresholds and IoU are counted over")

    def resolved(self) -> dict[str, Any]:
        """Every setting with its value, the preset's where none is given."""
        preset = PRESETS[self.method]
        own = self.model_dump()
        return own | {key: value for key, value in preset.items() if own[key] is None}


PRESETS: dict[str, dict[str, Any]] = {
    "standard": {"quantile": 0.01, "positions": "upsampled", "border": "edge", "union": "all"},
    "pnas2020": {"quantile": 0.01, "positions": "upsampled", "border": "zeros", "union": "all"},
    "cvpr2017": {"quantile": 0.005, "positions": "native", "border": "edge", "union": "category"},
}


class Squash(Strict):
    """Every image to one size."""

    squash: tuple[PositiveInt, PositiveInt] = Field(description="height, width; the aspect ratio is not kept")


CONCEPTS = (
    "sources of label maps: `truth` (where it comes with label maps), `pixels` (colour names computed from the "
    "pixels), names of segmenters"
)


class Dataset(Strict):
    """What every kind of data set has."""

    has_truth: ClassVar[bool] = False  # whether it comes with label maps

    shard_images: PositiveInt = Field(64, description="images of one shard, the unit of work")
    max_images: PositiveInt | None = Field(
        None, description="the first so many images of each split, in the order of a hash of their ids; default: all"
    )
    concepts: list[Name] = Field([PIXELS], description=CONCEPTS)
    label_map_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height, width of the label maps, at which units are compared with them; default: the images'"
    )
    dissect: Dissect = Field(Dissect(), description="how units are compared with concepts")


class SceneCounts(Strict):
    """How many scenes are drawn for each split."""

    train: NonNegativeInt = Field(8000, description="images to train on")
    validation: NonNegativeInt = Field(1600, description="images to dissect and to measure accuracy on")


class Scenes(Dataset):
    """The embedded procedural scenes: twelve classes, with label maps of objects, parts, materials and colours."""

    has_truth: ClassVar[bool] = True

    kind: Literal["scenes"] = Field(description="this kind")
    concepts: list[Name] = Field([TRUTH], description=CONCEPTS)
    seed: NonNegativeInt = Field(0, description="other scenes for another seed")
    size: Annotated[int, Field(ge=16, le=1024)] = Field(64, description="height and width in pixels")
    images: SceneCounts = Field(SceneCounts(), description="how many, by split")


class Split(Strict):
    """Exactly one way to give every image a split."""

    folders: bool = Field(False, description="the first folder names the split: root/<split>/<class>/image")
    csv: str | None = Field(None, description="CSV with columns image,split")
    share: dict[Name, Share] | None = Field(None, description="shares by a hash of the image id")
    all: Name | None = Field(None, description="one split for all images")

    @model_validator(mode="after")
    def one(self) -> "Split":
        given = [self.folders, self.csv is not None, self.share is not None, self.all is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of folders, csv, share, all")
        if self.share is not None and abs(sum(self.share.values()) - 1) > 1e-6:
            raise ValueError(f"the shares add up to {sum(self.share.values())}, not 1")
        return self


class Images(Dataset):
    """What data sets of images have, in files of their own or not."""

    resize: PositiveInt | Squash | None = Field(None, description="length of the short side, or squash, or none")
    crop: PositiveInt | None = Field(None, description="centre crop after the resize")
    max_pixels: PositiveInt = Field(64_000_000, description="a file with more pixels is refused before decoding")


class Files(Images):
    """What data sets of image files have."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="a larger share of refused images stops the stage"
    )


class ImageFolder(Files):
    """Images in one folder a class."""

    kind: Literal["imagefolder"] = Field(description="this kind")
    root: str = Field(description="folder of the images")
    split: Split = Field(Split(all="validation"), description="which split each image belongs to")
    labels: str | None = Field(None, description="CSV with columns image,label, for folders without classes")


class Csv(Files):
    """Images that a table names."""

    kind: Literal["csv"] = Field(description="this kind")
    root: str = Field(description="folder that the paths are below")
    table: str = Field(description="CSV with the columns path, label and split; the last two may be absent")
    split: Split | None = Field(
        None, description="which split each image belongs to; default: the column `split`, without one all `validation`"
    )


class ImageNet(Files):
    """ImageNet of 2012, as torchvision lays it out."""

    kind: Literal["imagenet"] = Field(description="this kind")
    root: str = Field(description="folder with val/, train/ and meta.bin or the archive of the devkit")
    splits: Annotated[list[Literal["train", "validation"]], Field(min_length=1)] = Field(
        ["validation"], description="the splits to take"
    )
    unpack: bool = Field(False, description="let torchvision unpack the archives in `root` where folders are missing")
    verify: bool = Field(True, description="archives must be the published ones, by their md5")


class Places365(Files):
    """Places365, as torchvision lays it out."""

    kind: Literal["places365"] = Field(description="this kind")
    root: str = Field(description="folder with the lists and val_256/, data_256_standard/ and so on")
    splits: Annotated[list[Literal["train", "train-challenge", "validation", "test"]], Field(min_length=1)] = Field(
        ["validation"], description="the splits to take"
    )
    small: bool = Field(True, description="the images of 256 x 256 pixels; false: the large ones")
    download: bool = Field(False, description="let torchvision download to `root` what is missing")
    verify: bool = Field(True, description="the lists must be the published ones, by their md5")


class Cifar10(Images):
    """CIFAR-10, in the batches that torchvision reads."""

    kind: Literal["cifar10"] = Field(description="this kind")
    root: str = Field(description="folder with cifar-10-batches-py/")
    splits: Annotated[list[Literal["train", "test"]], Field(min_length=1)] = Field(
        ["train", "test"], description="the splits to take"
    )
    download: bool = Field(False, description="let torchvision download to `root` what is missing")
    verify: bool = Field(True, description="the batches must be the published ones, by their md5")


class Npz(Images):
    """Images that are an array in a file of numpy."""

    kind: Literal["npz"] = Field(description="this kind")
    file: str | Annotated[dict[Name, str], Field(min_length=1)] = Field(
        description="an npz, with splits in its array `split` if it has one; or one npz for each split"
    )
    x: str = Field("x", description="array of the images, uint8; `{split}` in it becomes the name of the split")
    y: str | None = Field("y", description="array of the labels, whole numbers; null: there are none")
    classes: list[str] | None = Field(None, description="names of the classes; default: their numbers")


class LabelMaps(Strict):
    """The index maps of one category."""

    folder: str = Field(description="folder of the label maps, laid out as that of the images")
    classes: str = Field(description="class list: one name a line, `id name` lines, or a CSV with columns id,name")
    void: list[NonNegativeInt] = Field([], description="values that mean nothing is known")


class Segmentation(Files):
    """Images with index label maps, one folder a category."""

    has_truth: ClassVar[bool] = True

    kind: Literal["segmentation"] = Field(description="this kind")
    concepts: list[Name] = Field([TRUTH], description=CONCEPTS)
    root: str = Field(description="folder of the images")
    split: Split = Field(Split(all="validation"), description="which split each image belongs to")
    label_maps: Annotated[dict[Name, LabelMaps], Field(min_length=1)] = Field(description="by name of the category")
    labels: str | None = Field(None, description="CSV with columns image,label")


AnyDataset = Annotated[
    Scenes | ImageFolder | Segmentation | Csv | ImageNet | Places365 | Cifar10 | Npz, Field(discriminator="kind")
]


class Preprocessing(Strict):
    """x in [0, 1] → (x - mean) / std, for the channels red, green, blue; with one number each, for grey.

    Published weights, timm and transformers state their own mean and std, which then are the default.
    """

    mean: tuple[float, float, float] | tuple[float] = Field((0.485, 0.456, 0.406), description="those of ImageNet")
    std: tuple[Positive, Positive, Positive] | tuple[Positive] = Field(
        (0.229, 0.224, 0.225), description="those of ImageNet"
    )
    per_image: bool = Field(
        False, description="whiten each image by its own mean and deviation instead, as randomization runs do"
    )

    @model_serializer(mode="wrap")
    def _only_what_is_said(self, handler: Any) -> dict[str, Any]:
        """Without `per_image` where it is not used: networks that were made before it keep their ids."""
        found = handler(self)
        if not self.per_image:
            found.pop("per_image", None)  # left out already where defaults are
        return found

    @property
    def channels(self) -> int:
        """1 for a network of grey images, else 3."""
        return len(self.mean)

    @model_validator(mode="after")
    def _one_number_a_channel(self) -> "Preprocessing":
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean has length {len(self.mean)} and std {len(self.std)}: give each three numbers, or one for grey"
            )
        return self


class Numerics(Strict):
    """Fixed per network: another value gives other activations in the last bits."""

    micro_batch: PositiveInt = Field(32, description="images of one forward pass; the last one is padded")
    channels_last: bool = Field(True, description="torch's memory format, the faster one for convolutions")


class Train(Strict):
    """Where and how a network is trained."""

    dataset: Name = Field(description="the data set to train on")
    split: str = Field("train", description="its images to train on")
    fraction: Share = Field(
        1.0, description="of these images, of each class; those of a smaller fraction are among those of a larger one"
    )
    recipe: Recipe = Field(Recipe(), description="how it is trained")


class Ablate(Strict):
    """Which units each class depends on: layers whose units are removed, one at a time and in sets."""

    layers: Literal["last"] | Annotated[list[str], Field(min_length=1)] = Field(
        "last", description="names among the network's `layers`; `last`: the last of them"
    )
    replace: Literal["zero", "mean", "shuffled"] = Field(
        "zero", description="what a removed unit gives: 0, its mean over `rank`, or what it gives for another image"
    )
    rank: str = Field("train", description="the split by whose losses units are ranked for each class")
    judge: str | None = Field(
        None, description="the split that sets of units are judged on; default: the one that is dissected"
    )
    images: PositiveInt | None = Field(None, description="bound on the images of each split; default: all")
    sizes: Annotated[list[PositiveInt], Field(min_length=1)] = Field(
        [1, 2, 3, 4, 5, 20, 64, 128, 256, 512, 1024], description="of the sets; those below the layer's units are used"
    )
    draws: NonNegativeInt = Field(10, description="random sets of each size, as a control")
    datasets: list[Name] | None = Field(None, description="on these data sets; default: all of the network's")

    @field_validator("layers")
    @classmethod
    def _last_is_no_name(cls, layers: Any) -> Any:
        if layers == ["last"]:
            raise ValueError("for the last layer write `layers: last`, without brackets")
        return layers


Calibration = Literal[
    "histogram", "histogram_mass", "histogram_top", "histogram_mass_top", "isotonic", "isotonic_top", "bbq", "bbq_top",
    "temperature", "vector", "matrix", "matrix_odir",
]  # fmt: skip


class Calibrate(Strict):
    """Whether networks know when they are wrong: methods fitted on some images of the dissected split, and judged on
    the others."""

    networks: list[Name] | None = Field(None, description="these networks; default: all")
    datasets: list[Name] | None = Field(None, description="on these data sets; default: all with classes")
    methods: list[Calibration] | None = Field(
        None, description="those that are fitted; default: all, with more than 100 classes without the matrices"
    )
    splits: Many = Field(20, description="random splits of the images: a single one is noise")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="of the images, to fit on")
    bins: Many = Field(15, description="of reliability diagrams, calibration errors and histogram binning")
    penalty: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of `matrix_odir`, on what is off the diagonal and on the bias; default: chosen on a fifth of the "
        "images that are fitted on",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Calibrate":
        _named_once({key: getattr(self, key) for key in ("networks", "datasets", "methods")})
        return self


ProbeFeatures = Literal["class_token", "pooled", "spatial"]


class Probes(Strict):
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


Features = Literal["whole", "class_token", "spatial", "pooled"]


class Comparison(Strict):
    """Networks whose layers are compared, each with itself and with the others."""

    networks: Annotated[list[str], Field(min_length=1)] = Field(
        description="names of networks; with `-untrained` at the end, of their controls"
    )
    dataset: Name | None = Field(None, description="on this data set; default: the one that the networks share")


class DataFraction(Strict):
    """A network that is trained here, compared with copies of itself that are trained on parts of the images."""

    network: Name = Field(description="a network with `weights: train`")
    fractions: Annotated[list[Share], Field(min_length=1)] = Field(
        description="of the images that it is trained on, a copy for each; it itself stands for all of them"
    )
    dataset: Name | None = Field(None, description="compared on this data set; default: the one that it sees")

    @property
    def copies(self) -> dict[str, float]:
        """The fraction of each copy, by its name, the smallest first."""
        return {f"{self.network}-data{each:g}": each for each in sorted(self.fractions) if each < 1}

    @model_validator(mode="after")
    def _distinct(self) -> "DataFraction":
        written = [f"{each:g}" for each in self.fractions]
        if twice := [each for at, each in enumerate(written) if each in written[:at]]:
            raise ValueError(f"fractions: {twice[0]} is there twice")
        if not self.copies:
            raise ValueError("fractions: 1 alone is the network itself: name a smaller one to compare it with")
        return self


class Similarity(Strict):
    """How alike layers are: CKA and its relatives, within networks and between them."""

    compare: dict[Name, Comparison] = Field({}, description="by name")
    data_fraction: dict[Name, DataFraction] = Field(
        {}, description="by name: copies of a network that are trained on parts of its images, compared with it"
    )
    images: Annotated[int, Field(ge=4)] = Field(1024, description="images that go through each network, of `split`")
    minibatch: Annotated[int, Field(ge=4)] = Field(64, description="images of a minibatch")
    epochs: Many = Field(1, description="times that the images are shuffled into minibatches")
    replacement: bool = Field(
        False, description="draw each minibatch on its own from all images; false: cut a shuffled list of them"
    )
    last: Literal["drop", "weigh"] = Field(
        "drop", description="a smaller last minibatch: dropped, or weighted with n (n - 3), as all then are"
    )
    seed: NonNegativeInt = Field(0, description="other minibatches for another seed")
    split: str | None = Field(None, description="the images' split; default: the one that is dissected")
    layers: dict[str, Literal["all", "auto"] | Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="by network: names or patterns, `auto`, or `all` modules; default: the network's `layers`"
    )
    features: Annotated[list[Features], Field(min_length=1)] = Field(
        ["whole"],
        description="of each layer: its `whole` output, its `class_token`, its tokens but class and register tokens "
        "(`spatial`), its mean over the positions (`pooled`)",
    )
    neighbours: PositiveInt = Field(10, description="nearest images that mutual neighbours are counted among")
    procrustes: bool = Field(True, description="orthogonal Procrustes too, the slow one of the measures")

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
    def _fits(self) -> "Similarity":
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


Measure = Literal["receptive_field", "attention", "skips", "localisation"]


class Sight(Strict):
    """How networks look at images: how far their layers and their attention reach, what their skip connections pass on,
    and whether their last layer knows where things are."""

    networks: list[str] | None = Field(
        None, description="these networks; with `-untrained` at the end, their controls; default: all but controls"
    )
    datasets: list[Name] | None = Field(None, description="on these data sets; default: all of the network's")
    measures: Annotated[list[Measure], Field(min_length=1)] = Field(
        list(get_args(Measure)), description="what is measured; default: all"
    )
    images: Annotated[int, Field(ge=4)] = Field(
        256, description="images that go through each network, once and once more without each of its skip connections"
    )
    minibatch: Annotated[int, Field(ge=4)] = Field(64, description="images of a minibatch")
    gradients: PositiveInt = Field(8, description="images of a minibatch whose gradients make receptive fields")
    seed: NonNegativeInt = Field(0, description="other minibatches for another seed")
    split: str | None = Field(None, description="the images' split; default: the one that is dissected")
    layers: dict[str, Literal["all", "auto"] | Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="by network: names or patterns, `auto`, or `all` modules; default: the network's `layers`"
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Sight":
        _named_once({key: getattr(self, key) for key in ("networks", "datasets", "measures")})
        return self


class Network(NetworkSpec):
    """A network: how to build it, its weights, and the layers to look at."""

    weights: str = Field(
        description="a .pt, .pth or .safetensors file, `train`, `random`, published ones: `pretrained` (timm, "
        "transformers), `DEFAULT` or another name (torchvision), or `randomize:<experiment>/<run>`"
    )
    layers: Literal["auto"] | Annotated[list[str], Field(min_length=1)] = Field(
        "auto", description="names of modules, or patterns such as `layer*`; `auto`: the blocks"
    )
    special_tokens: NonNegativeInt | None = Field(None, description="class and register tokens, when not found alone")
    preprocessing: Preprocessing = Field(Preprocessing(), description="what the network expects of pixels")
    numerics: Numerics = Field(Numerics(), description="how it is computed")
    store: Kept | Annotated[dict[str, Kept], Field(min_length=1)] = Field(
        "full",
        description="of a layer: `full`; `none`, counted in two forward passes and not stored; `pooled`, without its "
        "maps and not dissected; or one of these by name or pattern of layers",
    )
    train: Train | None = Field(None, description="with `weights: train`, how")
    datasets: list[Name] | None = Field(None, description="the data sets to dissect it on; default: all")
    group: Name | None = Field(
        None, description="networks of one group, seeds or checkpoints say, are shown together with mean and spread"
    )
    ablate: Ablate | None = Field(None, description="with this section, units are removed; default: none are")

    @model_validator(mode="after")
    def _training_together(self) -> "Network":
        if (self.weights == "train") != (self.train is not None):
            raise ValueError("`weights: train` and a section `train:` go together")
        return self

    def kept(self, layer: str) -> Kept:
        """What is kept of a layer: `full` its maps; else the maximum and mean of each, and its special tokens."""
        if isinstance(self.store, str):
            return self.store
        return next((kept for entry, kept in self.store.items() if fits(layer, entry)), "full")

    @property
    def streams(self) -> bool:
        """Whether a layer may be dissected without being stored, in two forward passes."""
        return "none" in ([self.store] if isinstance(self.store, str) else self.store.values())


Corruption = Literal["true_labels", "corrupted_labels", "random_labels", "shuffled_pixels", "random_pixels", "gaussian"]


class Fitting(Strict):
    """How a run is trained. What a run leaves out its network says, then the experiment, then the paper."""

    epochs: PositiveInt | None = Field(None, description="passes over the images; 100")
    until_fitted: bool | None = Field(
        None, description="end with the first epoch that predicted every training image right; false"
    )
    batch_size: PositiveInt | None = Field(None, description="images of a step; 128")
    learning_rate: Positive | None = Field(None, description="of the first epoch; 0.01")
    decay: Share | None = Field(None, description="factor of the learning rate after each epoch; 0.95")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="of SGD; 0.9")
    weight_decay: NonNegativeFloat | None = Field(None, description="of matrices and filters; 0")
    random_crop: bool | None = Field(
        None, description="a window of each image at random in place of the one in its centre; false"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="share that the network's modules of dropout drop; default: as it is built"
    )


FITTING: dict[str, Any] = {
    "epochs": 100,
    "until_fitted": False,
    "batch_size": 128,
    "learning_rate": 0.01,
    "decay": 0.95,
    "momentum": 0.9,
    "weight_decay": 0.0,
    "random_crop": False,
    "dropout": None,
}


class RunNetwork(NetworkSpec, Fitting):
    """A network that runs train from random weights, and what of `Fitting` holds for all of its runs."""

    @model_validator(mode="after")
    def _from_random_weights(self) -> "RunNetwork":
        for key in ("weights", "local", "download", "seed", "prefix"):
            if getattr(self, key) != NetworkSpec.model_fields[key].default:
                raise ValueError(f"leave out `{key}`: runs begin with random weights, from the run's seed")
        return self


class NoiseRun(Fitting):
    """One training: a network, what it is to fit, and how."""

    network: Name = Field(description="one of the experiment's `networks`")
    corruption: Corruption = Field("true_labels", description="what is done to the training images or labels")
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="with `corrupted_labels`: the probability of each label to be drawn at random"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the first weights, the corruption and the order of the images"
    )

    @model_validator(mode="after")
    def _share_goes_with_corrupted_labels(self) -> "NoiseRun":
        if (self.corruption == "corrupted_labels") != (self.share is not None):
            raise ValueError("`corruption: corrupted_labels` and `share` go together")
        return self


class Randomize(Fitting):
    """How easily networks fit noise: runs on true labels, on corrupted ones, and on images without meaning."""

    dataset: Name = Field(description="the data set")
    split: str = Field("train", description="its images to train on")
    test: str = Field("validation", description="its images to test on, whose labels stay true")
    images: PositiveInt | None = Field(None, description="the first so many of `split`; default: all")
    test_images: PositiveInt | None = Field(None, description="the first so many of `test`; default: all")
    crop: PositiveInt = Field(28, description="height and width of what networks see of an image")
    networks: Annotated[dict[Name, RunNetwork], Field(min_length=1)] = Field(description="by name")
    runs: Annotated[dict[Name, NoiseRun], Field(min_length=1)] = Field(description="by name")
    checkpoint_seconds: NonNegativeFloat = Field(15, description="between two checkpoints of a run")
    together: PositiveInt = Field(4, description="runs side by side on one GPU; on a core there is one")

    @model_validator(mode="after")
    def _known_networks(self) -> "Randomize":
        for name, run in self.runs.items():
            if run.network not in self.networks:
                raise ValueError(f"runs.{name}: no network {run.network!r}{nearest(run.network, self.networks)}")
        if self.split == self.test:
            raise ValueError(f"split and test are both {self.split!r}: runs are to be tested on other images")
        return self

    def fitting(self, name: str) -> dict[str, Any]:
        """Every key of `Fitting` for a run, with the value that holds."""
        run = self.runs[name]
        levels = (run, self.networks[run.network], self)
        return {
            key: next((value for level in levels if (value := getattr(level, key)) is not None), default)
            for key, default in FITTING.items()
        }


class Head(Strict):
    """Which output of a segmentation network gives the classes of a category, and what its channels are called."""

    output: str | None = Field(
        None, description="key of the network's output; default: `out`, `logits`, or the only one"
    )
    channels: tuple[NonNegativeInt, NonNegativeInt] | None = Field(
        None, description="first and last channel of that output, from 0; default: all"
    )
    classes: str = Field(
        description="class list: one name a line, `id name` lines, or a CSV with columns id,name and, if it names the "
        "classes of several categories, category; or `model`: the names in the config.json of a transformers model"
    )
    first: NonNegativeInt = Field(0, description="id, in the class list, of the first channel: 1 for ADE20K's 150")
    void: list[NonNegativeInt] = Field([], description="ids that mean nothing: background, unlabelled")

    @model_validator(mode="after")
    def in_order(self) -> "Head":
        if self.channels is not None and self.channels[0] > self.channels[1]:
            raise ValueError(f"channels: the first, {self.channels[0]}, comes after the last, {self.channels[1]}")
        return self


class Segmenter(NetworkSpec):
    """A segmentation network as a source of concepts; data sets name it in `concepts`."""

    weights: str = Field(
        description="a .pt, .pth or .safetensors file, or published ones: `pretrained` (transformers), `DEFAULT` or "
        "another name (torchvision)"
    )
    preprocessing: Preprocessing = Field(Preprocessing(), description="what the network expects of pixels")
    resize: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="height, width that images are resized to for it (bilinear); default: as they are stored"
    )
    numerics: Numerics = Field(Numerics(micro_batch=8), description="how it is computed")
    categories: Annotated[dict[Name, Head], Field(min_length=1)] = Field(description="by name of the category")

    @model_validator(mode="after")
    def _trained(self) -> "Segmenter":
        if self.weights_file is None and not self.published:
            raise ValueError(f"weights: {self.weights!r}: a segmenter needs those of a trained network, a file say")
        return self


class Controls(Strict):
    """The two controls that stand beside every network: untrained, and label maps permuted over the images."""

    images: PositiveInt | None = Field(None, description="bound on the images of each control; default: all")


class Tls(Strict):
    """Files that prove who a scheduler, its workers and we are. Only their paths are here, and go into no result."""

    ca: str = Field(description="certificate (PEM) of the authority that signed all others")
    certificate: str = Field(description="our own, as a client")
    key: str = Field(description="the private key that goes with it")


Directive = Annotated[str, StringConstraints(pattern=r"^-[^\s][^\r\n]*$")]
Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:@+-]*$")]


class Slurm(Strict):
    """With `kind: slurm`: what each job of the queue is. It holds `processes` workers, or with GPUs one."""

    partition: Word | None = Field(None, description="`sbatch -p`")
    account: Word | None = Field(None, description="`sbatch -A`")
    walltime: Annotated[str, StringConstraints(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$")] = Field(
        "24:00:00", description="`sbatch -t`; what a job had not finished when it ends is given to another"
    )
    processes: PositiveInt = Field(1, description="workers of one job, all on one node")
    interface: Word | None = Field(
        None, description="network that scheduler and workers listen on, `ib0` say; default: that of the host's address"
    )
    directives: list[Directive] = Field([], description="more options of `sbatch`, `--constraint=a100` say")
    wait: PositiveInt = Field(60, description="minutes to wait for the first worker")


def _loopback(address: str) -> bool:
    """Whether host:port is on this machine for certain: no name but `localhost` is looked up."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Cluster(Strict):
    """The workers of a run: processes with one thread each, on this machine or, with the last two kinds, on others."""

    kind: Literal["local", "gpu", "address", "slurm"] = Field(
        "local", description="on the cores, on the visible GPUs, those of a scheduler that runs, or jobs of a queue"
    )
    workers: PositiveInt | None = Field(None, description="default: one a core, or one a GPU; `slurm` has no default")
    memory: Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)? ?[kMGT]i?B$")] | None = Field(
        None, description="that a worker may use, `4 GB` say; default: its share of the machine's"
    )
    dashboard: bool = Field(False, description="that of Dask, on 127.0.0.1:8787")
    gpus: bool = Field(False, description="whether each worker of an `address` or of `slurm` has a GPU")
    address: str | None = Field(None, description="of a scheduler, `tls://host:8786` say")
    tls: Tls | None = Field(None, description="what a `tls://` address takes")
    insecure: bool = Field(
        False, description="allow a `tcp://` address on another host: whoever reaches that port can run code there"
    )
    slurm: Slurm = Field(Slurm(), description="what a job of the queue is")

    @field_validator("address")
    @classmethod
    def _plain(cls, address: str | None) -> str | None:
        # What was found is not said: it may hold a password.
        if address is not None and "@" in address:
            raise ValueError("an address holds no user or password: say who we are with `tls`")
        if address is not None and not re.fullmatch(
            r"(tls|tcp)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", address
        ):
            raise ValueError("expected tls://host:port or tcp://host:port")
        return address

    @model_validator(mode="before")
    @classmethod
    def _taken_out(cls, raw: object) -> object:
        """A profile takes out what a configuration says with null, which Snakemake hands on as a word."""
        if not isinstance(raw, dict):
            return raw
        return {key: value for key, value in raw.items() if value not in (None, "null")}

    @model_validator(mode="after")
    def _agrees(self) -> "Cluster":
        if (self.kind == "address") != (self.address is not None):
            raise ValueError("`kind: address` and `address` go together")
        if self.address is None and (self.tls is not None or self.insecure):
            raise ValueError("`tls` and `insecure` are for `kind: address`; jobs of `slurm` get keys of their own")
        if self.address is not None:
            scheme, _, host = self.address.partition("://")
            if (scheme == "tls") != (self.tls is not None):
                raise ValueError("a `tls://` address and a section `tls` go together")
            if scheme == "tcp" and not _loopback(host) and not self.insecure:
                raise ValueError(
                    "tcp:// to another host: whoever reaches that port can run code there; use tls://, or say "
                    "`insecure: true`"
                )
            if self.dashboard:
                raise ValueError("dashboard: it belongs to the scheduler of the address, which has its own")
        if self.kind in ("address", "slurm") and self.memory is None:
            raise ValueError("memory: say what a worker may use, which cannot be found from here")
        if self.kind == "slurm" and self.workers is None:
            raise ValueError("workers: say how many")
        if self.kind != "slurm" and "slurm" in self.model_fields_set and self.slurm != Slurm():
            raise ValueError("the section `slurm` is for `kind: slurm`")
        if self.gpus and self.kind == "local":
            raise ValueError("gpus: use `kind: gpu`")
        if self.on_gpus and self.slurm.processes > 1:
            raise ValueError("slurm.processes: with GPUs a job holds one worker")
        return self

    @property
    def on_gpus(self) -> bool:
        """Whether workers compute on GPUs; on the cores otherwise, and their numbers differ in the last bits."""
        return self.kind == "gpu" or self.gpus


class Report(Strict):
    """The pages that a run ends in."""

    title: str | None = Field(None, description="default: the experiment's name")
    top_images: PositiveInt = Field(5, description="images of a unit")
    cards: NonNegativeInt = Field(
        1000, description="units of each network that are shown on images, those with the highest IoU first"
    )


class Figures(Strict):
    """The figures of the report, as files for a paper. Each is also there as SVG, which the page shows, and as CSV."""

    width: Literal["one", "two"] | Annotated[float, Field(ge=2, le=20)] = Field(
        "two", description="one or two columns of a journal, 3.5 and 7.1 inches; or inches"
    )
    formats: list[Literal["pdf", "png"]] = Field(["pdf", "png"], description="what is written besides SVG")
    dpi: Annotated[int, Field(ge=50, le=1200)] = Field(300, description="dots per inch of PNG files")

    @property
    def inches(self) -> float:
        return {"one": 3.5, "two": 7.1}.get(self.width, 0) if isinstance(self.width, str) else self.width


class Config(Strict):
    """One experiment."""

    name: Name = Field(description="the report is written to report/<name>")
    results: str = Field("results", description="folder of all results; several experiments may share it")
    stores: str | None = Field(
        None,
        description="`s3://bucket/prefix`: keep the chunk files of stores there (extra `s3`); default: in `results`",
    )
    datasets: Annotated[dict[Name, AnyDataset], Field(min_length=1)] = Field(description="by name")
    networks: Annotated[dict[Name, Network], Field(min_length=1)] = Field(description="by name")
    segmenters: dict[Name, Segmenter] = Field({}, description="by name")
    calibrate: Calibrate | None = Field(None, description="with this section, networks are calibrated; default: none")
    similarity: Similarity | None = Field(None, description="how alike layers of networks are; default: not asked")
    sight: Sight | None = Field(None, description="how networks look at images; default: not asked")
    probes: Probes | None = Field(None, description="with this section, layers are probed; default: none are")
    randomize: dict[Name, Randomize] = Field({}, description="how easily networks fit noise; experiments by name")
    controls: Controls = Field(Controls(), description="what the units are compared with")
    cluster: Cluster = Field(Cluster(), description="the workers")
    report: Report = Field(Report(), description="the pages at the end")
    figures: Figures = Field(Figures(), description="the figures in them")

    @field_validator("stores")
    @classmethod
    def place(cls, value: str | None) -> str | None:
        if value is not None and not URL.fullmatch(value):  # not told: it may hold a secret
            raise ValueError("it is not of the form s3://bucket or s3://bucket/prefix; credentials are no part of it")
        return value

    @model_validator(mode="after")
    def names(self) -> "Config":
        for name in (*self.datasets, *self.networks, self.name):
            if name in RESERVED:
                raise ValueError(f"the name {name!r} is reserved (as are {', '.join(RESERVED)})")
            if name.endswith(ENDINGS):
                raise ValueError(f"the name {name!r} ends as a file of the results folder does ({', '.join(ENDINGS)})")
        for name, network in self.networks.items():
            if name.endswith(UNTRAINED):
                raise ValueError(f"network {name!r}: the suffix {UNTRAINED!r} is for the untrained control")
            ablated = (network.ablate.datasets if network.ablate else None) or []
            wanted = [*(network.datasets or []), *([network.train.dataset] if network.train else []), *ablated]
            for dataset in wanted:
                if dataset not in self.datasets:
                    raise ValueError(f"network {name!r}: no data set {dataset!r}{nearest(dataset, self.datasets)}")
        for section, asked, networks in (
            ("calibrate", self.calibrate, list(self.networks)),
            ("probes", self.probes, self.with_controls()),
            ("sight", self.sight, self.with_controls()),
        ):
            if asked is None:
                continue
            for kind, wished, known in (
                ("network", [*(asked.networks or ()), *(asked.layers if isinstance(asked, Sight) else ())], networks),
                ("data set", asked.datasets, list(self.datasets)),
            ):
                for name in wished or ():
                    if name not in known:
                        raise ValueError(f"{section}: no {kind} {name!r}{nearest(name, known)}")
        return self

    def with_controls(self) -> list[str]:
        """The names of all networks, each followed by that of its untrained control where it has one."""
        found = []
        for name, network in self.networks.items():
            found += [name] if network.weights == "random" else [name, name + UNTRAINED]
        return found

    @model_validator(mode="after")
    def comparisons(self) -> "Config":
        if self.similarity is None:
            return self
        known = [name + ending for name in self.networks for ending in ("", UNTRAINED)]
        for network in self.similarity.layers:
            if network not in known:
                raise ValueError(f"similarity.layers: no network {network!r}{nearest(network, known)}")
        for name, fractions in self.similarity.data_fraction.items():
            self._can_be_copied(f"similarity.data_fraction.{name}", fractions)
            self.dataset_of(name)
        for name, comparison in self.similarity.compare.items():
            where = f"similarity.compare.{name}"
            for network in comparison.networks:
                if network not in known:
                    raise ValueError(f"{where}: no network {network!r}{nearest(network, known)}")
                if network.endswith(UNTRAINED) and self.networks[network.removesuffix(UNTRAINED)].weights == "random":
                    raise ValueError(f"{where}: {network!r}: a random network has no control beside it")
            self.dataset_of(name)
        return self

    def _can_be_copied(self, where: str, asked: DataFraction) -> None:
        """Refuse copies of a network that is not trained here, or of a name that is taken."""
        if asked.network not in self.networks:
            raise ValueError(f"{where}: no network {asked.network!r}{nearest(asked.network, self.networks)}")
        if self.networks[asked.network].train is None:
            weights = self.networks[asked.network].weights
            raise ValueError(
                f"{where}: network {asked.network!r} is not trained here (weights: {weights!r}): only one with "
                f"`weights: train` can be trained on a part of its images"
            )
        for copy in asked.copies:
            if copy in self.networks:
                raise ValueError(f"{where}: its copy would be called {copy!r}, as a network is: give that another name")

    def original(self, network: str) -> str:
        """The network of this configuration that another is the control or a copy of; else itself."""
        return self.similarity.original(network) if self.similarity else network.removesuffix(UNTRAINED)

    @model_validator(mode="after")
    def randomizations(self) -> "Config":
        for name, asked in self.randomize.items():
            if asked.dataset not in self.datasets:
                known = nearest(asked.dataset, self.datasets)
                raise ValueError(f"randomize.{name}: no data set {asked.dataset!r}{known}")
        for name, network in self.networks.items():
            if network.run is not None:
                self._of_a_run(f"network {name!r}", network, *network.run)
        return self

    def _of_a_run(self, who: str, network: Network, experiment: str, run: str) -> None:
        """A network with the weights of a run is that run's network, and sees images as the run did."""
        if experiment not in self.randomize:
            raise ValueError(
                f"{who}: weights: `randomize` has no experiment {experiment!r}{nearest(experiment, self.randomize)}"
            )
        asked = self.randomize[experiment]
        if run not in asked.runs:
            raise ValueError(f"{who}: weights: randomize.{experiment} has no run {run!r}{nearest(run, asked.runs)}")
        own = asked.networks[asked.runs[run].network]
        for key in ("torchvision", "timm", "transformers", "module", "arguments"):
            if getattr(network, key) != getattr(own, key):
                raise ValueError(
                    f"{who}: {key} is {getattr(network, key)!r}, and that of {FROM_RUN}{experiment}/{run} is "
                    f"{getattr(own, key)!r}: describe the run's network"
                )
        if not network.preprocessing.per_image:
            raise ValueError(f"{who}: runs whiten each image by itself: give `preprocessing: {{per_image: true}}`")

    def dataset_of(self, comparison: str) -> str:
        """The data set of a comparison: the one named, or the only one that all of its networks see."""
        assert self.similarity is not None
        section = "compare" if comparison in self.similarity.compare else "data_fraction"
        asked, where = self.similarity.comparisons[comparison], f"similarity.{section}.{comparison}"
        if asked.dataset is not None and asked.dataset not in self.datasets:
            raise ValueError(f"{where}: no data set {asked.dataset!r}{nearest(asked.dataset, self.datasets)}")
        seen = {}
        for name in asked.networks:
            own = self.networks[self.original(name)].datasets
            seen[name] = list(self.datasets) if own is None else own
        shared = [data for data in self.datasets if all(data in each for each in seen.values())]
        said = "; ".join(f"{name}: {', '.join(each) or 'none'}" for name, each in seen.items())
        if asked.dataset is not None and asked.dataset not in shared:
            raise ValueError(f"{where}: not all of its networks see data set {asked.dataset!r} ({said})")
        if not shared:
            raise ValueError(f"{where}: its networks share no data set ({said})")
        if asked.dataset is None and len(shared) > 1:
            raise ValueError(f"{where}: its networks share {', '.join(shared)}: name one as `dataset`")
        return asked.dataset or shared[0]

    @model_validator(mode="after")
    def sources(self) -> "Config":
        for name in self.segmenters:
            if name in (TRUTH, PIXELS):
                raise ValueError(f"segmenter {name!r}: {TRUTH} and {PIXELS} are sources of another kind")
        for name, dataset in self.datasets.items():
            known = [*([TRUTH] if dataset.has_truth else []), PIXELS, *self.segmenters]
            for at, source in enumerate(dataset.concepts):
                if source not in known:
                    raise ValueError(
                        f"datasets.{name}.concepts.{at}: no source {source!r} for data sets of kind {dataset.kind} "
                        f"(there are: {', '.join(known)}){nearest(source, known)}"
                    )
        return self


def parse(raw: Mapping[str, Any]) -> Config:
    """Validate a configuration; every error names the key, what was found and the nearest known key.

    The key `only` (a name, or several with commas) keeps just these networks or data sets, and what they need.
    """
    raw = dict(raw)
    only = raw.pop("only", None)
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        lines = [explain(item) for item in error.errors(include_url=False)]
        raise MicrotomeError("the configuration is refused:\n  " + "\n  ".join(lines)) from None
    return select(config, only) if only is not None else config


def load(path: Path) -> Config:
    """Read a YAML file (data only) and validate it."""
    import yaml

    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MicrotomeError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(raw, dict):
        raise MicrotomeError(f"the configuration {path} is not a mapping of keys")
    return parse(raw)


def select(config: Config, only: str | list[str]) -> Config:
    """Keep the named networks and data sets; where only one of the two is named, all of the other kind stay."""
    names = [name.strip() for name in (only.split(",") if isinstance(only, str) else map(str, only))]
    known = [*config.networks, *config.datasets]
    for name in names:
        if name not in known:
            raise MicrotomeError(f"only={name}: no network or data set has this name{nearest(name, known, 5)}")
    networks = {k: v for k, v in config.networks.items() if k in names} or dict(config.networks)
    chosen = [name for name in config.datasets if name in names] or list(config.datasets)
    networks = {
        name: network.model_copy(
            update={"datasets": [d for d in (chosen if network.datasets is None else network.datasets) if d in chosen]}
        )
        for name, network in networks.items()
    }
    # Experiments on these data sets, and those whose weights a network takes: named networks need no others.
    named = any(name in config.networks for name in names)
    needed = {network.run[0] for network in networks.values() if network.run is not None}
    randomize = {
        name: asked
        for name, asked in config.randomize.items()
        if name in needed or (asked.dataset in chosen and not named)
    }
    asked = {
        "networks": networks,
        "similarity": _still_asked(config, networks, set(chosen)),
        "randomize": randomize,
        "sight": _narrowed(config.sight, networks, chosen),
        "calibrate": _narrowed(config.calibrate, networks, chosen),
        "probes": _narrowed(config.probes, networks, chosen),
    }
    return config.model_copy(update=asked)


Section = TypeVar("Section", Calibrate, Probes, Sight)


def _narrowed(asked: Section | None, networks: Iterable[str], datasets: Iterable[str]) -> Section | None:
    """A section without the networks and data sets that do not stay."""
    if asked is None:
        return None

    def stay(names: Iterable[str]) -> list[str]:
        return [name for name in names if name.removesuffix(UNTRAINED) in networks]

    kept: dict[str, Any] = {}
    if asked.networks is not None:
        kept["networks"] = stay(asked.networks)
    if asked.datasets is not None:
        kept["datasets"] = [name for name in asked.datasets if name in datasets]
    if isinstance(asked, Sight):
        kept["layers"] = {name: asked.layers[name] for name in stay(asked.layers)}
    return asked.model_copy(update=kept)


def _still_asked(config: Config, networks: Mapping[str, Network], datasets: set[str]) -> Similarity | None:
    """The comparisons whose networks and data set are all among those that stay."""
    asked = config.similarity
    if asked is None:
        return None
    stay = {
        name: {"dataset": config.dataset_of(name)}
        for name, comparison in asked.comparisons.items()
        if all(asked.original(each) in networks for each in comparison.networks) and config.dataset_of(name) in datasets
    }
    sections = {
        "compare": {name: one.model_copy(update=stay[name]) for name, one in asked.compare.items() if name in stay},
        "data_fraction": {
            name: one.model_copy(update=stay[name]) for name, one in asked.data_fraction.items() if name in stay
        },
    }
    return asked.model_copy(update=sections) if stay else None


def explain(item: Any) -> str:
    """One error of pydantic's, with the key that it is about and what to do."""
    location = [str(part) for part in item["loc"]]
    where = ".".join(location) or "the top level"
    if item["type"] == "extra_forbidden":
        own = _keys_at(location)
        hint = nearest(location[-1], own)
        if not hint:
            hint = nearest(location[-1], known_keys()) if location[-1] in known_keys() else f"; there are: {_list(own)}"
        return f"{where}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{where}: missing"
    if item["type"] == "union_tag_invalid":
        key, tag, tags = (item["ctx"][part] for part in ("discriminator", "tag", "expected_tags"))
        known = tags.replace("'", "").split(", ")
        return f"{where}.{key.strip(chr(39))}: {tag!r} is not one of {', '.join(known)}{nearest(tag, known)}"
    found = "" if item["type"] == "value_error" else f" (found {item['input']!r})"
    if item["type"] in ("model_type", "dict_type"):
        return f"{where}: Input should be a section of keys{found}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{found}"


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _keys_at(location: Sequence[str]) -> set[str]:
    """The keys of the section that a location is in; names that the user gave are passed over."""
    sections: list[type[BaseModel]] = [Config]
    for part in location[:-1]:
        fields = (section.model_fields[part] for section in sections if part in section.model_fields)
        sections = [model for field in fields for model in _models(field.annotation)] or sections
    return {key for section in sections for key in section.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections in a type: of a dictionary's values, of each choice of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def known_keys() -> set[str]:
    """Every key of every section."""
    sections: list[type[BaseModel]] = [Strict, NetworkSpec]
    keys: set[str] = set()
    while sections:
        section = sections.pop()
        keys |= set(section.model_fields)
        sections += section.__subclasses__()
    return keys | set(Recipe.model_fields)
