"""Label maps from COCO's JSON files: instances, or panoptic segments with their PNG files.

    python -m pipeline.data.coco instances_val2017.json labels
    python -m pipeline.data.coco panoptic_val2017.json labels --panoptic panoptic_val2017

writes `labels/<image>.png`, 16 bits, the category's id at each pixel and 0 where there is none, and `labels.txt` beside
the folder, the class list. Of instances that overlap, the smaller one is on top. A polygon has the pixels whose centres
it holds; pycocotools may differ by a pixel at its outline.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import MicrotomeError

LARGEST = 2**16 - 1


def convert(file: Path, folder: Path, panoptic: Path | None = None) -> int:
    """Write the label maps and the class list of a COCO file; return how many images it has.

    Parameters
    ----------
    panoptic : folder of the PNG files that a panoptic file names.

    Raises
    ------
    MicrotomeError
        It is no such file, or a category, a region or a PNG file cannot be read.
    """
    told = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(told, dict) or not {"images", "annotations", "categories"} <= told.keys():
        raise MicrotomeError(f"{file} is no COCO file: expected `images`, `annotations` and `categories`")
    names = _names(told["categories"], file)
    of_image: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for each in told["annotations"]:
        of_image[each["image_id"]].append(each)
    if unknown := of_image.keys() - {image["id"] for image in told["images"]}:
        raise MicrotomeError(f"{file}: annotations name image {min(unknown)}, which is not among its images")
    for image in told["images"]:
        regions, where = of_image[image["id"]], f"{file}, image {image['file_name']}"
        if any("segments_info" in each for each in regions) and panoptic is None:
            raise MicrotomeError(f"{file} is a panoptic file: give the folder of its PNG files, `--panoptic FOLDER`")
        size = image["height"], image["width"]
        labels = _panoptic(regions, panoptic, size, where) if panoptic else _instances(regions, size, where)
        if other := set(np.unique(labels).tolist()) - names.keys() - {0}:
            raise MicrotomeError(f"{where}: category {min(other)} is not among its categories")
        path = folder / PurePosixPath(image["file_name"]).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(path)
    lines = [f"{number} {names[number]}\n" for number in sorted(names)]
    folder.with_name(f"{folder.name}.txt").write_text("".join(lines), encoding="utf-8")
    return len(told["images"])


def _names(categories: Iterable[Mapping[str, Any]], file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for each in categories:
        number, name = each["id"], each["name"]
        if not 0 < number <= LARGEST or number in found or name in found.values():
            raise MicrotomeError(
                f"{file}: category {number} ({name!r}): ids go from 1 to {LARGEST:,}, each with a name"
            )
        found[number] = name
    return found


def _instances(regions: Sequence[Mapping[str, Any]], size: tuple[int, int], where: str) -> np.ndarray:
    masks = [(each["category_id"], _mask(each.get("segmentation"), size, where)) for each in regions]
    labels = np.zeros(size, np.uint16)
    for number, mask in sorted(masks, key=lambda each: -int(each[1].sum())):
        labels[mask] = number
    return labels


def _mask(region: Any, size: tuple[int, int], where: str) -> np.ndarray:
    """Return a region, (y, x) bool: polygons, or runs of pixels down the columns, as numbers or as COCO's text."""
    if isinstance(region, Mapping):
        runs = region["counts"] if isinstance(region["counts"], list) else runs_of(region["counts"])
        if tuple(region["size"]) != size or sum(runs) != size[0] * size[1] or min(runs, default=0) < 0:
            raise MicrotomeError(f"{where}: runs of {sum(runs)} pixels in {region['size']}, expected {list(size)}")
        inside = np.arange(len(runs)) % 2 == 1
        return np.repeat(inside, runs).reshape(size[::-1]).T
    if not isinstance(region, list) or not all(len(each) >= 6 and len(each) % 2 == 0 for each in region):
        raise MicrotomeError(f"{where}: a region that is neither polygons of three corners or more nor runs of pixels")
    mask = np.zeros(size, bool)
    for polygon in region:
        mask |= filled(np.array(polygon, np.float64).reshape(-1, 2), size)
    return mask


def filled(corners: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return the pixels (y, x) whose centres lie inside a polygon with these corners (corner, x and y)."""
    inside = np.zeros(size, bool)
    rows, columns = (np.arange(length) + 0.5 for length in size)
    for (x, y), (to_x, to_y) in zip(corners, np.roll(corners, -1, 0), strict=True):
        crossed = np.flatnonzero((y <= rows) != (to_y <= rows))
        at = x + (rows[crossed] - y) * (to_x - x) / (to_y - y) if len(crossed) else rows[:0]
        inside[crossed] ^= columns > at[:, None]
    return inside


def runs_of(text: str) -> list[int]:
    """Return the runs that COCO's text holds: 5 bits a character, each run after the second less the last but one."""
    runs: list[int] = []
    value = shift = 0
    for character in text.encode():
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:  # a negative number
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
        value = shift = 0
    return runs


def _panoptic(regions: Sequence[Mapping[str, Any]], folder: Path, size: tuple[int, int], where: str) -> np.ndarray:
    """Return the categories of segments, whose ids are the colours of a PNG file: red + 256 green + 65,536 blue."""
    labels = np.zeros(size, np.uint16)
    for each in regions:
        path = folder / each["file_name"]
        try:
            with Image.open(path) as image:
                colours = np.asarray(image.convert("RGB")).astype(np.int64)
        except OSError as error:
            raise MicrotomeError(f"{where}: {path} cannot be read: {error}") from error
        ids = colours @ np.array([1, 256, 65536])
        known = {0: 0} | {segment["id"]: segment["category_id"] for segment in each["segments_info"]}
        found, place = np.unique(ids, return_inverse=True)
        if ids.shape != size or (unknown := set(found.tolist()) - known.keys()):
            raise MicrotomeError(
                f"{where}: {path} is {ids.shape[1]} x {ids.shape[0]}"
                + ("" if ids.shape != size else f" and has the segment {min(unknown)}, which `segments_info` lacks")
            )
        labels = np.array([known[each] for each in found.tolist()])[place].reshape(size).astype(np.uint16)
    return labels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m pipeline.data.coco", description="Label maps from COCO's JSON files.")
    parser.add_argument("file", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--panoptic", type=Path, help="folder of the PNG files of a panoptic file")
    told = parser.parse_args(arguments)
    try:
        count = convert(told.file, told.folder, told.panoptic)
    except MicrotomeError as error:
        raise SystemExit(str(error)) from None
    print(f"{count:,} label maps in {told.folder}, their classes in {told.folder.with_name(f'{told.folder.name}.txt')}")


if __name__ == "__main__":
    main()
