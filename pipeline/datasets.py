"""The kinds of data sets behind one face: a listing of images, their pixels, their label maps.

Another kind is one more branch in each function here, and one more section in `pipeline.config`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

import numpy as np

from pipeline.config import AnyDataset, Files, ImageFolder, LabelMaps, Scenes, Segmentation, Split, Squash
from pipeline.errors import MicrotomeError
from pipeline.identity import digest

if TYPE_CHECKING:
    from pipeline.decode import Geometry
    from pipeline.label_maps import ClassList
    from pipeline.listing import Listing, SplitRule


def settings(dataset: AnyDataset, scratch: Path, rescan: bool = False) -> dict[str, Any]:
    """What the data set's id is made of: the snapshot of its listing, and how an image becomes an array."""
    listed = listing(dataset, scratch, rescan)
    made_of = {
        "kind": dataset.kind,
        "listing": listed.digest(),
        "images": len(listed),
        "size": list(image_size(dataset, listed)),
        "shard_images": dataset.shard_images,
        "source": origin(dataset),
    }
    if isinstance(dataset, Scenes):
        from pipeline.scenes import VERSION

        made_of["scenes"] = VERSION
    else:
        made_of |= {"geometry": repr(geometry(dataset)), "max_pixels": dataset.max_pixels}
    return made_of


def origin(dataset: AnyDataset) -> str:
    """Where the images come from: while it stays, an image that was known keeps its slot."""
    root = dataset.seed if isinstance(dataset, Scenes) else str(Path(dataset.root).absolute())
    return digest([dataset.kind, root])


def listing(dataset: AnyDataset, scratch: Path, rescan: bool = False) -> Listing:
    """List the images of a data set, with labels, splits and label maps; no image is opened."""
    from pipeline import listing as files

    match dataset:
        case Scenes():
            return _list_scenes(dataset)
        case ImageFolder():
            found = files.list_imagefolder(
                dataset.root, split_rule(dataset.split), _path(dataset.labels), cache=scratch, rescan=rescan
            )
        case Segmentation():
            found = files.list_segmentation(
                dataset.root,
                {category: Path(maps.folder) for category, maps in dataset.label_maps.items()},
                split_rule(dataset.split),
                _path(dataset.labels),
                cache=scratch,
                rescan=rescan,
            )
        case _:
            assert_never(dataset)
    if not len(found):
        raise MicrotomeError(f"{dataset.root}: no images")
    return found


def _list_scenes(dataset: Scenes) -> Listing:
    from pipeline.listing import STRINGS, Listing
    from pipeline.scenes import CLASSES

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
        label_map_roots={},
        label_map_path={},
        label_map_size=np.empty((len(index), 0), np.int64),
        label_map_mtime_ns=np.empty((len(index), 0), np.int64),
        refused={},
        ignored={},
    )


def split_rule(split: Split) -> SplitRule:
    from pipeline.listing import Fixed, Folders, Share, SplitTable

    if split.folders:
        return Folders()
    if split.csv is not None:
        return SplitTable(Path(split.csv))
    if split.share is not None:
        return Share(split.share)
    assert split.all is not None
    return Fixed(split.all)


def geometry(dataset: Files) -> Geometry:
    from pipeline.decode import Geometry

    resize = dataset.resize.squash if isinstance(dataset.resize, Squash) else dataset.resize
    return Geometry(resize=resize, crop=dataset.crop)


def image_size(dataset: AnyDataset, listed: Listing) -> tuple[int, int]:
    """(height, width) of every image of the data set; without a crop or a squash, that of its first readable one."""
    if isinstance(dataset, Scenes):
        return dataset.size, dataset.size
    if dataset.crop is not None:
        return dataset.crop, dataset.crop
    if isinstance(dataset.resize, Squash):
        return dataset.resize.squash

    from pipeline.decode import Refused, size_of

    reason = "no images"
    for index in range(len(listed)):
        try:
            return geometry(dataset).output_size(*size_of(listed.path(index), dataset.max_pixels))
        except Refused as error:
            reason = error.reason
    raise MicrotomeError(f"{dataset.root}: not one of {len(listed)} images can be read; the last: {reason}")


def read_image(dataset: AnyDataset, image_id: str, size: tuple[int, int]) -> np.ndarray:
    """Return one image as uint8 (3, height, width), or raise `decode.Refused`."""
    from pipeline.decode import Refused, decode

    if isinstance(dataset, Scenes):
        return _scene(dataset, image_id, image=True)[0]
    image = decode(Path(dataset.root) / image_id, geometry(dataset), dataset.max_pixels)
    if image.shape[1:] != size:
        raise Refused(
            f"{image.shape[2]}x{image.shape[1]} pixels, expected {size[1]}x{size[0]} as the first image: "
            "give the data set a crop or a squash"
        )
    return image


def truth_categories(dataset: AnyDataset) -> dict[str, list[str]]:
    """Concept names by category; `read_label_maps` numbers them from 1, and 0 is nothing."""
    match dataset:
        case Scenes():
            from pipeline.scenes import CONCEPTS

            return {category: list(names) for category, names in CONCEPTS.items()}
        case Segmentation():
            return {
                category: list(_class_list(maps).concepts().values()) for category, maps in dataset.label_maps.items()
            }
        case _:
            return {}


def read_label_maps(
    dataset: AnyDataset, image_id: str, paths: Mapping[str, Path | None], size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Return the ground truth of one image, uint16 (height, width) by category, or raise `decode.Refused`.

    `paths` are the image's label maps by category, where the data set has files.
    """
    from pipeline.decode import Refused, size_of
    from pipeline.label_maps import decode_label_map

    match dataset:
        case Scenes():
            from pipeline.scenes import CATEGORIES

            return dict(zip(CATEGORIES, _scene(dataset, image_id, image=False)[0], strict=True))
        case Segmentation():
            image_size = size_of(Path(dataset.root) / image_id, dataset.max_pixels)
            found = {}
            for category, maps in dataset.label_maps.items():
                path = paths.get(category)
                if path is None:
                    raise Refused(f"no label map of category {category!r}")
                classes, lookup = _lookup(maps.model_dump_json(), Path(maps.classes).stat().st_mtime_ns)
                label_map = decode_label_map(path, classes, lookup, geometry(dataset), image_size, dataset.max_pixels)
                if label_map.shape != size:
                    raise Refused(f"label map {path} gives {label_map.shape}, expected {size}")
                found[category] = label_map
            return found
        case _:
            raise MicrotomeError(f"data sets of kind {dataset.kind} have no ground truth")


@functools.lru_cache(maxsize=64)
def _lookup(maps: str, mtime_ns: int) -> tuple[ClassList, np.ndarray]:
    """Class list and look-up table of a category, by its configuration and the list's time: made once a worker."""
    classes = _class_list(LabelMaps.model_validate_json(maps))
    return classes, classes.lookup({name: at + 1 for at, name in enumerate(classes.concepts().values())})


def _class_list(maps: LabelMaps) -> ClassList:
    from pipeline.label_maps import read_class_list

    return read_class_list(maps.classes, maps.void)


def _scene(dataset: Scenes, image_id: str, image: bool) -> np.ndarray:
    from pipeline.scenes import generate

    split, _, index = image_id.partition("/")
    drawn = generate(dataset.seed, int(index), 1, dataset.size, split, image=image, label_map=not image)
    return drawn.image if image else drawn.label_map


def _path(value: str | None) -> Path | None:
    return Path(value) if value is not None else None
