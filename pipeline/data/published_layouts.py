"""ImageNet and Places365 in their publishers' layouts, with classes and file lists as torchvision reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from pipeline.data import torchvision_data
from pipeline.data.arrays import CIFAR10_BATCHES, CIFAR10_FOLDER, CIFAR10_META, list_cifar10
from pipeline.data.listing import IMAGE_EXTENSIONS, STRINGS, Listing, check_names, extension_of, is_inside, list_named
from pipeline.data.snapshot import Named, snapshot
from pipeline.data.torchvision_data import IMAGENET_DEVKIT, IMAGENET_FOLDERS, IMAGENET_META, PLACES365_SPLITS
from pipeline.errors import MicrotomeError, nearest


def list_imagenet(
    root: Path, splits: Sequence[str], verify: bool, unpack: bool, scratch: Path, rescan: bool = False
) -> Listing:
    """List `train/<WordNet id>/*` and `val/<WordNet id>/*` below the root, for the wanted splits.

    The number of a class is its position among all sorted ids of the devkit, as in torchvision and in networks trained
    on ImageNet, even if some class folders are missing.

    Raises `MicrotomeError`: as `torchvision_data.ask`, a folder that is not a class of the devkit or has no images,
    images beside the class folders.
    """
    request = {"kind": "imagenet", "root": str(root), "splits": list(splits), "verify": verify, "unpack": unpack}
    meta = [root / IMAGENET_META, root / IMAGENET_DEVKIT]
    wanted = {IMAGENET_FOLDERS[split]: split for split in splits}
    words = torchvision_data.ask(request, [*meta, *(root / name for name in wanted if unpack)], scratch)["words"]
    number = {wnid: index for index, wnid in enumerate(words)}
    ids, label, split, size, time = [], [], [], [], []
    for name in sorted(wanted):
        if not (root / name).is_dir():
            raise MicrotomeError(
                f"{root} has no folder {name!r} with the {wanted[name]} images; unpack its archive there, or give the "
                "data set `unpack: true` to have torchvision do so"
            )
        files = snapshot(root / name, scratch, rescan)
        kept = [i for i, file in enumerate(files.names) if extension_of(file) in IMAGE_EXTENSIONS]
        folders = [files.names[i].split("/", 1)[0] for i in kept]
        _check_classes(root / name, set(folders), {folder.split("/")[0] for folder in files.folders} - {""}, number)
        names = [files.names[i] for i in kept]
        check_names(names, root / name)
        ids += [f"{name}/{file}" for file in names]
        label += [number[folder] for folder in folders]
        split += [wanted[name]] * len(kept)
        size.append(files.size[kept])
        time.append(files.mtime_ns[kept])
    return Listing(
        root=root,
        image_id=np.array(ids, STRINGS),
        size=np.concatenate(size),
        mtime_ns=np.concatenate(time),
        label=np.array(label, np.int64),
        split=np.array(split, STRINGS),
        classes=_names(words),
        walked=tuple((root / name, None) for name in sorted(wanted)),
        read=tuple(meta),
    )


def _check_classes(folder: Path, found: set[str], folders: set[str], number: dict[str, int]) -> None:
    loose = sorted(name for name in found if name not in folders)
    if loose:
        raise MicrotomeError(
            f"{len(loose):,} images in {folder} lie beside class folders, the first is {loose[0]!r}; expected "
            f"{folder}/<WordNet id>/*, as torchvision.datasets.ImageNet unpacks them"
        )
    unknown = sorted(folders - number.keys())
    if unknown:
        hint = nearest(unknown[0], number)
        raise MicrotomeError(f"folder {unknown[0]!r} in {folder} is not a WordNet id of the devkit{hint}")
    empty = sorted(folders - found)
    if empty:
        raise MicrotomeError(
            f"{len(empty):,} class folders in {folder} have no images, the first is {empty[0]!r}; was unpacking cut "
            "short?"
        )
    if not found:
        raise MicrotomeError(f"no images in {folder}; expected {folder}/<WordNet id>/*")


def _names(words: dict[str, list[str]]) -> list[str]:
    """Return the first word of each class; if several classes share it, with the WordNet id."""
    count = Counter(found[0] for found in words.values())
    return [found[0] if count[found[0]] == 1 else f"{found[0]} ({wnid})" for wnid, found in words.items()]


def list_places365(
    root: Path,
    splits: Sequence[str],
    small: bool,
    verify: bool,
    download: bool,
    scratch: Path,
    rescan: bool = False,
) -> Listing:
    """List the images in the file lists of Places365, of the small (256 x 256) or the large variant.

    A listed image that is missing is refused when it is decoded. Classes are named without their first letter:
    `/a/airfield` is `airfield`.

    Raises `MicrotomeError`: as `torchvision_data.ask`, a missing folder, a path that leads out of it.
    """
    request = {
        "kind": "places365",
        "root": str(root),
        "splits": list(splits),
        "small": small,
        "verify": verify,
        "download": download,
    }
    lists = [root / f"places365_{PLACES365_SPLITS[split].replace('-', '_')}.txt" for split in splits]
    categories = root / "categories_places365.txt"
    found = torchvision_data.ask(request, [categories, *lists], scratch)
    classes = [_without_letter(name) for name in found["classes"]]
    ids, label, split = [], [], []
    for name, part in found["splits"].items():
        wrong = next((image for image in part["images"] if not is_inside(image)), None)
        if wrong is not None:
            raise MicrotomeError(
                f"the list of the {name} images in {root} has the path {wrong!r}; expected one below it"
            )
        folder = part["images"][0].split("/")[0]
        if not (root / folder).is_dir():
            other = "false for the large ones" if small else "true for those of 256 x 256"
            raise MicrotomeError(
                f"{root} has no folder {folder!r} with the {name} images; unpack its archive there, or give the data "
                f"set `download: true`, or `small: {other}`"
            )
        ids += part["images"]
        label += part["labels"]
        split += [name] * len(part["images"])
    order = sorted(range(len(ids)), key=ids.__getitem__)
    numbers = np.array(label, np.int64)[order]
    if numbers.max() >= len(classes) or numbers.min() < -1:
        raise MicrotomeError(
            f"the lists in {root} have the label {numbers.max()}; {categories} has {len(classes)} classes"
        )
    names = [ids[i] for i in order]
    twice = next((name for name, after in pairwise(names) if name == after), None)
    if twice is not None:
        raise MicrotomeError(f"the lists in {root} have {twice!r} twice")
    listed = list_named(
        root, Named(lists[0], names), numbers, np.array(split, STRINGS)[order], classes, scratch, rescan
    )
    listed.read = (categories, *lists)
    return listed


def _without_letter(name: str) -> str:
    """Return `/a/apartment_building/outdoor` without `/a/`."""
    letter, slash, rest = name.removeprefix("/").partition("/")
    return rest if slash and len(letter) == 1 else name


def list_verified_cifar10(root: Path, splits: Sequence[str], verify: bool, download: bool, scratch: Path) -> Listing:
    """List CIFAR-10, after torchvision has compared its files with the published ones, or downloaded them."""
    names = [CIFAR10_META, *(batch for split in sorted(splits) for batch in CIFAR10_BATCHES[split])]
    folder = root / CIFAR10_FOLDER
    absent = [name for name in names if not (folder / name).is_file()]
    if absent and not download:
        raise MicrotomeError(
            f"{folder} has no {', '.join(absent)}; unpack the archive of CIFAR-10 in {root}, or give the data set "
            "`download: true` to have torchvision do so"
        )
    if verify or download:
        request = {"kind": "cifar10", "root": str(root), "files": names, "verify": verify, "download": download}
        torchvision_data.ask(request, [folder / name for name in names], scratch)
    return list_cifar10(root, splits)
