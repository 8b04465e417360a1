"""The section `datasets`: the kinds of data sets, and the settings of the dissection."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import PIXELS, TRUTH, Name, PathName, Share, Strict


class Dissect(Strict):
    """Settings of the dissection. `method` is a preset; other keys override it."""

    method: Literal["standard", "pnas2020", "cvpr2017"] = Field(
        "standard", description="preset of the four keys below; `pnas2020` and `cvpr2017` are those of the papers' code"
    )
    quantile: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of positions above a unit's threshold"
    )
    positions: Literal["upsampled", "native"] | None = Field(
        None,
        description="where thresholds are counted: on maps upsampled to the size of the label maps, or on maps as "
        "they are",
    )
    border: Literal["edge", "zeros"] | None = Field(
        None, description="values outside a map when it is upsampled: its edge values, or zeros that blend in"
    )
    union: Literal["all", "category"] | None = Field(
        None,
        description="pixels in the union: of all images, or only of images in which the concept's category is labelled",
    )
    min_iou: Annotated[float, Field(ge=0, lt=1)] = Field(0.04, description="a unit is a detector above this IoU")
    split: str = Field("validation", description="split of the images that thresholds and IoU are computed on")

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
    """Resize every image to one size."""

    squash: tuple[PositiveInt, PositiveInt] = Field(description="height, width; the aspect ratio is not kept")


CONCEPTS = (
    "sources of label maps: `truth` (the data set's own), `pixels` (colour names computed from "
    "the pixels), names of segmenters"
)


class Dataset(Strict):
    """The keys that every kind of data set has."""

    has_truth: ClassVar[bool] = False  # whether it comes with label maps
    redrawable: ClassVar[bool] = False  # whether images can be drawn again without some of their objects

    shard_images: PositiveInt = Field(64, description="images per shard, the unit of work")
    max_images: PositiveInt | None = Field(
        None, description="use only the first N images of each split, ordered by a hash of their ids; default: all"
    )
    concepts: list[Name] = Field([PIXELS], description=CONCEPTS)
    label_map_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None,
        description="height, width of the label maps, the size at which units are compared with them; default: "
        "the images'",
    )
    dissect: Dissect = Field(Dissect(), description="how units are compared with concepts")

    @property
    def examined_split(self) -> str:
        """The split whose activations are extracted and dissected: that of other stages, too, where none is named."""
        return self.dissect.split


class SceneCounts(Strict):
    """The number of scenes drawn for each split."""

    train: NonNegativeInt = Field(8000, description="images to train on")
    validation: NonNegativeInt = Field(1600, description="images to dissect, and to measure accuracy on")


class Scenes(Dataset):
    """The embedded procedural scenes: twelve classes, with label maps of objects, parts, materials and colours."""

    has_truth: ClassVar[bool] = True
    redrawable: ClassVar[bool] = True

    kind: Literal["scenes"] = Field(description="this kind")
    concepts: list[Name] = Field([TRUTH], description=CONCEPTS)
    seed: NonNegativeInt = Field(0, description="another seed gives other scenes")
    size: Annotated[int, Field(ge=16, le=1024)] = Field(64, description="height and width in pixels")
    images: SceneCounts = Field(SceneCounts(), description="number of scenes, by split")


class Split(Strict):
    """Exactly one way to assign every image to a split."""

    folders: bool = Field(False, description="the first folder names the split: root/<split>/<class>/image")
    csv: PathName | None = Field(None, description="CSV with columns image,split")
    share: dict[Name, Share] | None = Field(None, description="share of each split, by a hash of the image id")
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

    resize: PositiveInt | Squash | None = Field(
        None, description="length of the short side, or `squash`; default: no resize"
    )
    crop: PositiveInt | None = Field(None, description="centre crop after the resize")
    max_pixels: PositiveInt = Field(64_000_000, description="refuse files with more pixels before decoding")


class Files(Images):
    """The keys of data sets of image files."""

    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="the stage stops if a larger share of images is refused"
    )
    exif: Literal["turn", "ignore"] | None = Field(
        None,
        description="what an EXIF orientation does: `turn` the image upright, with label maps that lie on the upright "
        "image, or `ignore` it, with label maps that lie on the pixels as stored; default: turn, and refuse an image "
        "whose label map may lie on either",
    )
    bits: Annotated[int, Field(ge=9, le=16)] | None = Field(
        None, description="bits that grey of more than 8 bits uses, for example 12; default: all that the file has, 16"
    )
    like: Literal["torchvision"] | None = Field(
        None, description="read files as torchvision's ImageFolder: EXIF is ignored, and transparency is dropped"
    )

    @model_validator(mode="after")
    def _one_reading(self) -> Files:
        if self.like is not None and self.exif == "turn":
            raise ValueError("`like: torchvision` ignores EXIF: give it or `exif: turn`")
        return self


ClassOrder = Literal["name", "number"]
CLASS_ORDER = "order of classes by their names: as text (`name`: 1, 10, 2), or by the `number` in them (1, 2, 10)"


class ImageFolder(Files):
    """Images in one folder per class."""

    kind: Literal["imagefolder"] = Field(description="this kind")
    root: PathName = Field(description="folder of the images")
    split: Split = Field(Split(all="validation"), description="how each image gets its split")
    labels: PathName | None = Field(None, description="CSV with columns image,label, for folders without classes")
    class_order: ClassOrder | None = Field(None, description=CLASS_ORDER + "; default: `name`")


class Csv(Files):
    """Images listed in a table."""

    kind: Literal["csv"] = Field(description="this kind")
    root: PathName = Field(description="base folder of the paths")
    table: PathName = Field(description="CSV with columns path,label,split; the last two are optional")
    split: Split | None = Field(
        None,
        description="how each image gets its split; default: the column `split`, or `validation` for all without "
        "that column",
    )
    class_order: ClassOrder | None = Field(None, description=CLASS_ORDER + "; default: `name`")


class ImageNet(Files):
    """ImageNet 2012, in torchvision's layout."""

    kind: Literal["imagenet"] = Field(description="this kind")
    root: PathName = Field(description="folder with val/, train/ and meta.bin or the devkit's archive")
    splits: Annotated[list[Literal["train", "validation"]], Field(min_length=1)] = Field(
        ["validation"], description="splits to use"
    )
    unpack: bool = Field(False, description="let torchvision unpack the archives in `root` if folders are missing")
    verify: bool = Field(True, description="check the md5 of the archives against the published ones")


class Places365(Files):
    """Places365, in torchvision's layout."""

    kind: Literal["places365"] = Field(description="this kind")
    root: PathName = Field(description="folder with the lists and val_256/, data_256_standard/ etc.")
    splits: Annotated[list[Literal["train", "train-challenge", "validation", "test"]], Field(min_length=1)] = Field(
        ["validation"], description="splits to use"
    )
    small: bool = Field(True, description="use the images of 256 x 256 pixels; false: the large ones")
    download: bool = Field(False, description="let torchvision download missing files to `root`")
    verify: bool = Field(True, description="check the md5 of the lists against the published ones")


class Cifar10(Images):
    """CIFAR-10, in the batches that torchvision reads."""

    kind: Literal["cifar10"] = Field(description="this kind")
    root: PathName = Field(description="folder with cifar-10-batches-py/")
    splits: Annotated[list[Literal["train", "test"]], Field(min_length=1)] = Field(
        ["train", "test"], description="splits to use"
    )
    download: bool = Field(False, description="let torchvision download missing files to `root`")
    verify: bool = Field(True, description="check the md5 of the batches against the published ones")


class Npz(Images):
    """Images in an array of a numpy file."""

    kind: Literal["npz"] = Field(description="this kind")
    file: PathName | Annotated[dict[Name, PathName], Field(min_length=1)] = Field(
        description="an npz, with splits in its optional array `split`; or one npz per split"
    )
    x: str = Field("x", description="array of the images, uint8; `{split}` in it stands for the name of the split")
    y: str | None = Field("y", description="array of the labels, whole numbers; null: no labels")
    classes: list[str] | None = Field(None, description="names of the classes; default: their numbers")


class LabelMaps(Strict):
    """The index maps of one category."""

    folder: PathName = Field(description="folder of the label maps, with the layout of the images' folder")
    classes: PathName = Field(
        description="class list: one name per line, `id name` lines, or a CSV with columns id,name"
    )
    void: list[NonNegativeInt] = Field([], description="void values: nothing is known about the pixel")
    label_suffix: str | None = Field(
        None, description="end of the names of the label maps, before `.png`, in place of `image_suffix`"
    )


Names = list[Name]  # a name for it, since the next class has a key `list`


class Segmentation(Files):
    """Images with index label maps, one folder per category."""

    has_truth: ClassVar[bool] = True

    kind: Literal["segmentation"] = Field(description="this kind")
    concepts: Names = Field([TRUTH], description=CONCEPTS)
    root: PathName = Field(description="folder of the images")
    split: Split = Field(Split(all="validation"), description="how each image gets its split")
    label_maps: Annotated[dict[Name, LabelMaps], Field(min_length=1)] = Field(description="by name of category")
    labels: PathName | None = Field(None, description="CSV with columns image,label")
    list: PathName | Annotated[dict[Name, PathName], Field(min_length=1)] | None = Field(
        None,
        description="text file with the images to use, one name per line, with or without extension, as in VOC's "
        "ImageSets; or one file per split; default: all images",
    )
    image_suffix: str | None = Field(
        None,
        description="end of the names of the images, before their extension, that their label maps lack, for example "
        "`_leftImg8bit`; others are ignored",
    )

    @model_validator(mode="after")
    def _splits_once(self) -> Segmentation:
        if isinstance(self.list, dict) and "split" in self.model_fields_set:
            raise ValueError("`list` with one file per split and `split` both say the splits: give one of them")
        return self


class Generated(Dataset):
    """Images that a generator makes: image i of a split follows from the seed, the split and i alone."""

    kind: Literal["generated"] = Field(description="this kind")
    generator: Name = Field(description="of the section `generators`")
    seed: NonNegativeInt = Field(0, description="another seed draws other latents")
    size: tuple[PositiveInt, PositiveInt] = Field(description="height, width of the generator's images")
    images: Annotated[dict[Name, PositiveInt], Field(min_length=1)] = Field(
        {"validation": 2000}, description="number of images, by split"
    )


AnyDataset = Annotated[
    Scenes | ImageFolder | Segmentation | Csv | ImageNet | Places365 | Cifar10 | Npz | Generated,
    Field(discriminator="kind"),
]
