"""The section `datasets`: the kinds of data sets, and the settings of the dissection."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import PIXELS, TRUTH, Name, Share, Strict


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

    def resolved(self) -> Dissect:
        """Return the settings with every value filled in, from the preset if none is given."""
        preset = PRESETS[self.method]
        return self.model_copy(update={key: value for key, value in preset.items() if getattr(self, key) is None})


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
    """The keys that every kind of data set has."""

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
    def one(self) -> Split:
        given = [self.folders, self.csv is not None, self.share is not None, self.all is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of folders, csv, share, all")
        if self.share is not None and abs(sum(self.share.values()) - 1) > 1e-6:
            raise ValueError(f"the shares add up to {sum(self.share.values())}, not 1")
        return self


class Images(Dataset):
    """The keys of data sets of images, in files of their own or not."""

    resize: PositiveInt | Squash | None = Field(None, description="length of the short side, or squash, or none")
    crop: PositiveInt | None = Field(None, description="centre crop after the resize")
    max_pixels: PositiveInt = Field(64_000_000, description="a file with more pixels is refused before decoding")


class Files(Images):
    """The keys of data sets of image files."""

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
