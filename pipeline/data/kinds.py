"""The kinds of data sets behind one interface: a listing of images, their pixels, their label maps.

Each kind has one branch in each function here, and one section in `pipeline.config.datasets`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from pipeline.config.base import TRUTH
from pipeline.config.datasets import (
    AnyDataset,
    Cifar10,
    Csv,
    Files,
    Generated,
    ImageFolder,
    ImageNet,
    Images,
    LabelMaps,
    Npz,
    Places365,
    Scenes,
    Segmentation,
    Split,
    Squash,
)
from pipeline.errors import MicrotomeError, nearest
from pipeline.storage.identity import digest

if TYPE_CHECKING:
    from pipeline.data.decode import Geometry, Reading, Stamp
    from pipeline.data.label_maps import ClassList
    from pipeline.data.listing import Listing, SplitRule
    from pipeline.data.scenes import Scene


SHOWN = 3  # classes that the plan names
IMAGE = ""  # in place of a category: the image itself
LOOKED_AT = 8  # images whose range of grey is looked at


@dataclass(frozen=True)
class Summary:
    """What the plan needs to know about a data set.

    `settings` determine its id, `splits` has the images of each split, and `classes` is how many classes the images are
    labelled with (0: no image has a label); `names` are those of the first. `notices` are lines on what a user may have
    meant otherwise.
    """

    settings: dict[str, Any]
    splits: dict[str, int]
    classes: int
    names: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def require(self, name: str, split: str, key: str = "") -> None:
        """Raise `MicrotomeError` if the data set of this name has no image of a split, which a key asks for."""
        if split not in self.splits:
            there = ", ".join(f"{known} ({count:,} images)" for known, count in self.splits.items())
            asked = f"{key}: " if key else ""
            raise MicrotomeError(
                f"{asked}data set {name!r} has no split {split!r}; it has {there}{nearest(split, self.splits)}"
            )


def summary(dataset: AnyDataset, scratch: Path, version: int, rescan: bool = False) -> Summary:
    """Return the summary of a data set, from the cache or from a new listing.

    A cached summary is valid until an input of its listing changes: with 1.3 million files, a start reads only the
    times of their folders. `version` is that of the code that makes a listing.
    """
    # The key includes the field names, so a summary cached by other code is not read.
    asked = [version, list(Summary.__dataclass_fields__), origin(dataset), dataset.model_dump()]
    memory = scratch / "datasets" / f"{digest(asked)}.json"
    known = None if rescan else _remembered(memory, scratch)
    if known is not None:
        return known
    began = time.time_ns()
    listed = listing(dataset, scratch, rescan)
    classes = len(listed.classes) if (listed.label >= 0).any() else 0
    made = Summary(
        settings(dataset, listed),
        listed.splits(),
        classes,
        listed.classes[:SHOWN],
        [*listed.notices, *_range_of_grey(dataset, listed)],
    )
    _remember(memory, made, listed, scratch, began)
    return made


def _remembered(memory: Path, scratch: Path) -> Summary | None:
    from pipeline.data.snapshot import stamp, unchanged

    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return None
    for root, table, sha256 in known["folders"]:
        if unchanged(root, scratch, Path(table) if table else None) != sha256:
            return None
    if any(stamp(Path(path)) != kept for path, kept in known["files"]):
        return None
    return Summary(**known["summary"])


def _remember(memory: Path, made: Summary, listed: Listing, scratch: Path, began: int) -> None:
    from pipeline.data.snapshot import SETTLED_NS, stamp, unchanged
    from pipeline.storage.atomic import write_atomically

    if not listed.walked and not listed.read:
        return
    folders = [(str(root), table and str(table), unchanged(root, scratch, table)) for root, table in listed.walked]
    files = [(str(path), stamp(path)) for path in listed.read]
    # A folder outside the cache is walked at every start; a file that has just changed may change again.
    if any(sha256 is None for *_, sha256 in folders) or any(kept and kept[1] > began - SETTLED_NS for _, kept in files):
        return
    try:
        write_atomically(memory, json.dumps({"folders": folders, "files": files, "summary": asdict(made)}))
    except OSError:
        return  # the next start lists again


def described(name: str, dataset: AnyDataset, made: Summary) -> Iterator[str]:
    """Yield lines on what is read from a data set: its first classes, its splits, the first concepts of label maps."""
    classes = f"{made.classes:,} classes ({_pairs(dict(enumerate(made.names)), made.classes)})"
    splits = ", ".join(f"{split} {count:,}" for split, count in made.splits.items())
    yield f"{name}: {classes if made.classes else 'no labels'}; images: {splits}"
    if isinstance(dataset, Segmentation) and TRUTH in dataset.concepts:
        for category, maps in dataset.label_maps.items():
            concepts = class_list(maps).concepts()
            yield f"{name}, label maps {category}: {len(concepts):,} concepts ({_pairs(concepts, len(concepts))})"


def _pairs(names: Mapping[int, str], count: int) -> str:
    shown = [f"{index} → {name}" for index, name in list(names.items())[:SHOWN]]
    return ", ".join([*shown, "..."] if count > len(shown) else shown)


def _range_of_grey(dataset: AnyDataset, listed: Listing) -> list[str]:
    """Return lines on the range that is taken for images of 16 bits, if some of a few images are such."""
    from pipeline.data.decode import Refused, deepest

    if not isinstance(dataset, Files) or dataset.bits is not None:
        return []
    found: list[tuple[str, int] | None] = []
    for at in np.unique(np.linspace(0, len(listed) - 1, LOOKED_AT).astype(int)):
        with contextlib.suppress(Refused):
            found.append(deepest(listed.path(at), dataset.max_pixels))
    lines = []
    grey, colours = ([each[1] for each in found if each and each[0] == kind] for kind in ("grey", "colours"))
    if grey:
        bits = max(9, max(grey).bit_length())
        hint = f"; if they use {bits} bits, give `bits: {bits}`" if bits < 16 else ""
        lines.append(
            f"16-bit grey: 0 to 65,535 becomes 0 to 255; of {len(found)} images the largest value is "
            f"{max(grey):,}{hint}"
        )
    if colours:
        dark = max(colours) < 128
        hint = "; if they use fewer bits, spread them over all 16 first, or save them with 8" if dark else ""
        lines.append(
            f"16-bit colours: their upper bytes are taken, 0 to 65,535 becomes 0 to 255; of {len(found)} images the "
            f"largest is {max(colours)} of 255{hint}"
        )
    return lines


def settings(dataset: AnyDataset, listed: Listing) -> dict[str, Any]:
    """Return what the data set's id is made of: the snapshot of its listing, and how an image becomes an array."""
    from pipeline.data.decode import AS_STATED

    made_of: dict[str, Any] = {
        "kind": dataset.kind,
        "listing": listed.digest(),
        "images": len(listed.images),
        "size": list(image_size(dataset, listed)),
        "shard_images": dataset.shard_images,
        "source": origin(dataset),
    }
    if isinstance(dataset, Scenes):
        from pipeline.data.scenes import VERSION

        made_of["scenes"] = VERSION
    elif not isinstance(dataset, Generated):
        made_of |= {"geometry": repr(geometry(dataset)), "max_pixels": dataset.max_pixels}
    if other := {key: value for key, value in asdict(reading(dataset)).items() if value != asdict(AS_STATED)[key]}:
        made_of["reading"] = other
    if isinstance(dataset, Npz):
        made_of["array"] = dataset.x
    return made_of


def origin(dataset: AnyDataset) -> str:
    """Return where the images come from; while it stays the same, known images keep their slots."""
    match dataset:
        case Scenes() | Generated():
            where: Any = dataset.seed
        case Npz():
            parts = {"": dataset.file} if isinstance(dataset.file, str) else dataset.file
            where = {split: str(Path(file).absolute()) for split, file in parts.items()}
        case ImageFolder() | Segmentation() | Csv() | ImageNet() | Places365() | Cifar10():
            where = str(Path(dataset.root).absolute())
        case _:
            assert_never(dataset)
    return digest([dataset.kind, where])


def listing(dataset: AnyDataset, scratch: Path, rescan: bool = False) -> Listing:
    """List the images of a data set with labels, splits and label maps, without opening an image."""
    from pipeline.data.listing import bounded

    found = _all_images(dataset, scratch, rescan)
    return found if dataset.max_images is None else bounded(found, dataset.max_images)


def _all_images(dataset: AnyDataset, scratch: Path, rescan: bool) -> Listing:
    from pipeline.data import arrays
    from pipeline.data import listing as files
    from pipeline.data import published_layouts as known_datasets

    match dataset:
        case Scenes():
            return _list_scenes(dataset)
        case Generated():
            return _list_generated(dataset)
        case ImageFolder():
            return files.list_imagefolder(
                dataset.root,
                split_rule(dataset.split),
                _path(dataset.labels),
                cache=scratch,
                rescan=rescan,
                order=dataset.class_order or "name",
            )
        case Segmentation():
            return files.list_segmentation(
                dataset.root,
                {category: Path(maps.folder) for category, maps in dataset.label_maps.items()},
                split_rule(dataset.split),
                _path(dataset.labels),
                cache=scratch,
                rescan=rescan,
                lists=_lists(dataset.list),
                image_suffix=_ending(dataset.image_suffix),
                label_suffixes={name: _ending(maps.label_suffix) for name, maps in dataset.label_maps.items()},
            )
        case Csv():
            rule = split_rule(dataset.split) if dataset.split is not None else None
            return files.list_table(dataset.root, dataset.table, rule, scratch, rescan, dataset.class_order or "name")
        case ImageNet():
            return known_datasets.list_imagenet(
                Path(dataset.root), dataset.splits, dataset.verify, dataset.unpack, scratch, rescan
            )
        case Places365():
            return known_datasets.list_places365(
                Path(dataset.root), dataset.splits, dataset.small, dataset.verify, dataset.download, scratch, rescan
            )
        case Cifar10():
            return known_datasets.list_verified_cifar10(
                Path(dataset.root), dataset.splits, dataset.verify, dataset.download, scratch
            )
        case Npz():
            return arrays.list_npz(_npz_files(dataset), dataset.x, dataset.y, dataset.classes)
        case _:
            assert_never(dataset)


def _lists(value: str | Mapping[str, str] | None) -> Path | dict[str, Path] | None:
    return {split: Path(file) for split, file in value.items()} if isinstance(value, Mapping) else _path(value)


def _ending(suffix: str | None) -> str:
    """Return the end of names before their extension, which may be part of what was given."""
    from pipeline.data.listing import IMAGE_EXTENSIONS

    ending = Path(suffix or "")
    return (suffix or "").removesuffix(ending.suffix) if ending.suffix.lower() in IMAGE_EXTENSIONS else suffix or ""


def _npz_files(dataset: Npz) -> Path | dict[str, Path]:
    if isinstance(dataset.file, str):
        return Path(dataset.file)
    return {split: Path(file) for split, file in dataset.file.items()}


def _list_scenes(dataset: Scenes) -> Listing:
    from pipeline.data.listing import STRINGS, Listing
    from pipeline.data.scenes import CLASSES

    counts = dataset.images.model_dump()
    split = np.array([name for name, count in counts.items() for _ in range(count)], STRINGS)
    index = np.concatenate([np.arange(count) for count in counts.values()])
    if not len(index):
        raise MicrotomeError("scenes: no images; give images.train or images.validation a count")
    absent = np.full(len(index), -1, np.int64)
    return Listing(
        root=Path(),
        image_id=np.array([f"{name}/{i:07d}" for name, i in zip(split, index, strict=True)], STRINGS),
        size=absent,
        mtime_ns=absent,
        label=(index % len(CLASSES)).astype(np.int64),
        split=split,
        classes=list(CLASSES),
    )


def _list_generated(dataset: Generated) -> Listing:
    from pipeline.data.listing import STRINGS, Listing

    split = np.array([name for name, count in dataset.images.items() for _ in range(count)], STRINGS)
    index = np.concatenate([np.arange(count) for count in dataset.images.values()])
    absent = np.full(len(index), -1, np.int64)
    return Listing(
        root=Path(),
        image_id=np.array([f"{name}/{i:07d}" for name, i in zip(split, index, strict=True)], STRINGS),
        size=absent,
        mtime_ns=absent,
        label=absent,
        split=split,
        classes=[],
    )


def split_rule(split: Split) -> SplitRule:
    from pipeline.data.listing import Fixed, Folders, Share, SplitTable

    if split.folders:
        return Folders()
    if split.csv is not None:
        return SplitTable(Path(split.csv))
    if split.share is not None:
        return Share(split.share)
    assert split.all is not None
    return Fixed(split.all)


def geometry(dataset: Images) -> Geometry:
    from pipeline.data.decode import Geometry

    resize = dataset.resize.squash if isinstance(dataset.resize, Squash) else dataset.resize
    return Geometry(resize=resize, crop=dataset.crop)


def reading(dataset: AnyDataset) -> Reading:
    """Return how the files of a data set are read."""
    from pipeline.data.decode import AS_STATED, Reading

    if not isinstance(dataset, Files):
        return AS_STATED
    like = dataset.like is not None
    return Reading(upright=not like and dataset.exif != "ignore", composited=not like, bits=dataset.bits)


def image_size(dataset: AnyDataset, listed: Listing) -> tuple[int, int]:
    """Return (height, width) of every image; without a crop or a squash, that of the first readable image."""
    if isinstance(dataset, Scenes):
        return dataset.size, dataset.size
    if isinstance(dataset, Generated):
        return dataset.size
    if dataset.crop is not None:
        return dataset.crop, dataset.crop
    if isinstance(dataset.resize, Squash):
        return dataset.resize.squash

    match dataset:
        case Npz():
            from pipeline.data.arrays import image_size as size_in
            from pipeline.data.arrays import member

            path, name, _ = _npz_place(dataset, str(listed.image_id[0]))
            return geometry(dataset).output_size(*size_in(member(path, name)))
        case Cifar10():
            from pipeline.data.arrays import CIFAR10_SIZE

            return geometry(dataset).output_size(*CIFAR10_SIZE)

    from pipeline.data.decode import Refused, size_of

    reason = "no images"
    for index in range(len(listed)):
        try:
            return geometry(dataset).output_size(*size_of(listed.path(index), dataset.max_pixels, reading(dataset)))
        except Refused as error:
            reason = error.reason
    raise MicrotomeError(f"{dataset.root}: not one of {len(listed)} images can be read; the last: {reason}")


def source(dataset: AnyDataset, image_id: str, size: tuple[int, int]) -> tuple[tuple[int, int], Geometry]:
    """Return (height, width) of an image before it is resized and cropped, and how it is; or raise `decode.Refused`.

    size : (height, width) of every image after that.
    """
    from pipeline.data.decode import Geometry, size_of

    match dataset:
        case Scenes() | Generated():
            return size, Geometry()
        case Npz():
            from pipeline.data.arrays import image_size as size_in
            from pipeline.data.arrays import member

            path, name, _ = _npz_place(dataset, image_id)
            return size_in(member(path, name)), geometry(dataset)
        case Cifar10():
            from pipeline.data.arrays import CIFAR10_SIZE

            return CIFAR10_SIZE, geometry(dataset)
        case _:
            path = Path(dataset.root) / image_id
            return size_of(path, dataset.max_pixels, reading(dataset)), geometry(dataset)


def read_image(dataset: AnyDataset, image_id: str, size: tuple[int, int], listed: Stamp | None = None) -> np.ndarray:
    """Return one image as uint8 (3, height, width), or raise `decode.Refused`.

    With `listed`, size and mtime_ns of its file in the listing, another file there raises `decode.ChangedError`.
    """
    from pipeline.data.decode import Refused, decode, transform_array

    match dataset:
        case Scenes():
            return _scene(dataset, image_id, image=True)[0]
        case Generated():
            raise MicrotomeError("images of kind generated are made by a network, not read")
        case Npz():
            from pipeline.data.arrays import npz_image

            pixels = npz_image(*_npz_place(dataset, image_id), listed)
            image = transform_array(pixels, geometry(dataset), dataset.max_pixels)
        case Cifar10():
            from pipeline.data.arrays import cifar10_image

            split, _, index = image_id.partition("/")
            pixels = cifar10_image(Path(dataset.root), split, int(index), listed)
            image = transform_array(pixels, geometry(dataset), dataset.max_pixels)
        case _:
            path = Path(dataset.root) / image_id
            image = decode(path, geometry(dataset), dataset.max_pixels, reading(dataset), listed)
    if image.shape[1:] != size:
        raise Refused(
            f"{image.shape[2]}x{image.shape[1]} pixels, expected {size[1]}x{size[0]} as the first image: "
            "give the data set a crop or a squash"
        )
    return image


def memory_need(dataset: AnyDataset) -> int:
    """Return the bytes that reading takes besides the images read: the largest file, or the arrays held."""
    match dataset:
        case Scenes() | Generated():
            return 0
        case Npz():
            from pipeline.data.arrays import held

            parts = {"": dataset.file} if isinstance(dataset.file, str) else dataset.file
            return sum(held(Path(file), dataset.x.replace("{split}", split)) for split, file in parts.items())
        case Cifar10():
            from pipeline.data.arrays import CIFAR10_BYTES

            return 2 * CIFAR10_BYTES
        case _:
            return 2 * 4 * dataset.max_pixels


def _npz_place(dataset: Npz, image_id: str) -> tuple[Path, str, int]:
    """Return the file, the array and the index of an image in an npz."""
    split, _, index = image_id.rpartition("/")
    file = dataset.file if isinstance(dataset.file, str) else dataset.file[split]
    return Path(file), dataset.x.replace("{split}", split), int(index)


def truth_categories(dataset: AnyDataset) -> dict[str, list[str]]:
    """Return concept names by category; `read_label_maps` numbers them from 1, and 0 means nothing."""
    match dataset:
        case Scenes() | Generated():
            from pipeline.data.scenes import CONCEPTS

            return {category: list(names) for category, names in CONCEPTS.items()}
        case Segmentation():
            return {
                category: list(class_list(maps).concepts().values()) for category, maps in dataset.label_maps.items()
            }
        case _:
            return {}


def read_label_maps(
    dataset: AnyDataset,
    image_id: str,
    paths: Mapping[str, Path | None],
    size: tuple[int, int],
    listed: Mapping[str, Stamp] | None = None,
) -> dict[str, np.ndarray]:
    """Return the ground truth of one image, uint16 (height, width) by category, or raise `decode.Refused`.

    `paths` are the image's label maps by category, if the data set has such files. With `listed`, their sizes and times
    in the listing, and those of the image under `IMAGE`, another file there raises `decode.ChangedError`.
    """
    from pipeline.data.decode import Refused, size_and_orientation
    from pipeline.data.label_maps import check_orientation, decode_label_map

    match dataset:
        case Scenes() | Generated():
            from pipeline.data.scenes import CATEGORIES

            return dict(zip(CATEGORIES, _scene(dataset, image_id, image=False)[0], strict=True))
        case Segmentation():
            most, own = dataset.max_pixels, reading(dataset)
            stamps = listed or {}
            image = Path(dataset.root) / image_id
            image_size, turned = size_and_orientation(image, most, own, listed=stamps.get(IMAGE))
            found = {}
            for category, maps in dataset.label_maps.items():
                path = paths.get(category)
                if path is None:
                    raise Refused(f"no label map of category {category!r}")
                classes, lookup = _lookup(maps.model_dump_json(), Path(maps.classes).stat().st_mtime_ns)
                if own.upright and dataset.exif is None:
                    check_orientation(path, image_size, turned, most)
                label_map = decode_label_map(
                    path, classes, lookup, geometry(dataset), image_size, most, own.upright, stamps.get(category)
                )
                if label_map.shape != size:
                    raise Refused(f"label map {path} gives {label_map.shape}, expected {size}")
                found[category] = label_map
            return found
        case _:
            raise MicrotomeError(f"data sets of kind {dataset.kind} have no ground truth")


@functools.lru_cache(maxsize=64)
def _lookup(maps: str, mtime_ns: int) -> tuple[ClassList, np.ndarray]:
    """Return class list and look-up table of a category, built once per worker, configuration and time of the list."""
    classes = class_list(LabelMaps.model_validate_json(maps))
    return classes, classes.lookup({name: at + 1 for at, name in enumerate(classes.concepts().values())})


def class_list(maps: LabelMaps) -> ClassList:
    """Return the class list of a category of label maps."""
    from pipeline.data.label_maps import read_class_list

    return read_class_list(maps.classes, maps.void)


def _scene(dataset: Scenes | Generated, image_id: str, image: bool) -> np.ndarray:
    from pipeline.data.scenes import generate

    split, _, index = image_id.partition("/")
    size = dataset.size if isinstance(dataset, Scenes) else dataset.size[0]
    drawn = generate(dataset.seed, int(index), 1, size, split, image=image, label_map=not image)
    return drawn.image if image else drawn.label_map


def draw_again(dataset: AnyDataset, image_id: str) -> Scene:
    """Return an image with its objects, without any of which it can be drawn."""
    from pipeline.data.scenes import draw_scene

    if not isinstance(dataset, Scenes):
        raise MicrotomeError(f"images of kind {dataset.kind} cannot be drawn again without one of their objects")
    split, _, index = image_id.partition("/")
    return draw_scene(dataset.seed, split, int(index), dataset.size)


def _path(value: str | None) -> Path | None:
    return Path(value) if value is not None else None
