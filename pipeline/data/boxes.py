"""Boxes of objects in images: from a CSV, or from XML files as Pascal VOC and ImageNet have them.

A box is (xmin, ymin, xmax, ymax) by the edges of pixels: pixel i of a row reaches from i to i + 1, and a box of the
whole image ends at its width and height.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pipeline.data.csv_tables import IMAGE_COLUMNS, LABEL_COLUMNS, composed, read_table
from pipeline.errors import MicrotomeError, nearest

if TYPE_CHECKING:
    from pipeline.data.decode import Geometry

Edges = tuple[float, float, float, float]
COLUMNS = ("xmin", "ymin", "xmax", "ymax")
FROM_ZERO = ("ilsvrc", "imagenet")
"""Databases whose XML files give edges; Pascal VOC's give the first and the last pixel, counted from 1."""
LARGEST_FILE = 10_000_000


@dataclass(frozen=True)
class Box:
    """A box as it is written.

    Attributes
    ----------
    image : the image's path as written, or the path of its XML file without suffix. name : of the class.
    edges : (xmin, ymin, xmax, ymax). size : (height, width) of the image, where the file says so.
    where : for messages.
    """

    image: str
    name: str
    edges: Edges
    size: tuple[int, int] | None
    where: str


def read_boxes(path: Path | str) -> list[Box]:
    """Read the boxes of a CSV with columns path, class, xmin, ymin, xmax, ymax, or of a folder of XML files.

    Raises `MicrotomeError`: nothing there, a line or file that is not understood, a box without area.
    """
    path = Path(path)
    found = _of_folder(path) if path.is_dir() else _of_table(path)
    if not found:
        raise MicrotomeError(f"{path} has no boxes")
    for box in found:
        left, top, right, bottom = box.edges
        if not (right > left and bottom > top):
            raise MicrotomeError(f"{box.where}: box {_shown(box.edges)} has no area: expected xmin < xmax, ymin < ymax")
    return found


def _of_table(path: Path) -> list[Box]:
    table = read_table(path)
    images, names = table.columns[table.column(IMAGE_COLUMNS)], table.values(LABEL_COLUMNS)
    columns = [table.values((name,)) for name in COLUMNS]
    found = []
    for row, line in enumerate(table.lines):
        where, edges = table.line(line), []
        for name, column in zip(COLUMNS, columns, strict=True):
            edges.append(_number(column[row], f"{where}: {name}"))
        found.append(Box(images[row].strip(), names[row], _edges(edges), None, where))
    return found


def _of_folder(folder: Path) -> list[Box]:
    files = sorted(folder.rglob("*.xml"))
    if not files:
        raise MicrotomeError(f"{folder} has no XML files with boxes")
    return [box for file in files for box in _of_file(file, file.relative_to(folder).with_suffix("").as_posix())]


def _of_file(file: Path, image: str) -> list[Box]:
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise MicrotomeError(f"{file} has {file.stat().st_size:,} bytes: it is no file of boxes")
        text = file.read_bytes()
        if b"<!DOCTYPE" in text or b"<!ENTITY" in text:
            raise MicrotomeError(f"{file} defines entities: it is no file of boxes")
        root = ElementTree.fromstring(text)
    except (OSError, ElementTree.ParseError) as error:
        raise MicrotomeError(f"{file} cannot be read as XML: {error}") from None
    database = (root.findtext("source/database") or "").lower()
    first = 0.0 if any(word in database for word in FROM_ZERO) else 1.0
    size = None
    if root.find("size") is not None:
        sides = [_number(_text(root, f"size/{name}", file), f"{file}: size/{name}") for name in ("height", "width")]
        size = (int(sides[0]), int(sides[1]))
    found = []
    for item in root.findall("object"):
        name = _text(item, "name", file)
        edges = [_number(_text(item, f"bndbox/{key}", file), f"{file}: bndbox/{key}") for key in COLUMNS]
        edges[0], edges[1] = edges[0] - first, edges[1] - first
        found.append(Box(image, name, _edges(edges), size, str(file)))
    return found


def _text(item: ElementTree.Element, key: str, file: Path) -> str:
    text = (item.findtext(key) or "").strip()
    if not text:
        raise MicrotomeError(f"{file}: an object or the image lacks <{key}>")
    return text


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MicrotomeError(f"{where} is {text!r}, expected a number of pixels")
    return value


def _edges(values: Sequence[float]) -> Edges:
    left, top, right, bottom = values
    return left, top, right, bottom


def _shown(edges: Edges) -> str:
    return "(" + ", ".join(f"{each:g}" for each in edges) + ")"


def by_image(
    boxes: Sequence[Box], image_ids: Sequence[str], classes: Sequence[str], class_of: Mapping[str, str]
) -> dict[str, list[tuple[int, Box]]]:
    """Return the boxes of each image with the number of their class; images without a box are left out.

    An image is named by its path below the data set's folder, with or without suffix, or by the end of that path if
    no other image ends so. Boxes of images that the data set lacks are left out: files of boxes often cover more.

    Parameters
    ----------
    classes : names by number. class_of : a class of the data set for names that boxes have for it; a name that is
        neither among its keys nor a class is refused.

    Raises
    ------
    MicrotomeError
        An unknown class, an image named by an end that several share, no box of any image.
    """
    number = {name: at for at, name in enumerate(classes)}
    for name, of in class_of.items():
        if of not in number:
            raise MicrotomeError(
                f"class_of: {name!r} is {of!r}, which is no class of the data set{nearest(of, number)}"
            )
    ends = _ends(image_ids)
    found: dict[str, list[tuple[int, Box]]] = defaultdict(list)
    for box in boxes:
        images = ends.get(composed(box.image), ()) or ends.get(_stem(composed(box.image)), ())
        if len(images) > 1:
            raise MicrotomeError(
                f"{box.where}: {box.image!r} may be {images[0]!r} or {images[1]!r}: write the path below the folder of "
                "the data set"
            )
        if not images:
            continue
        name = class_of.get(box.name, box.name)
        if name not in number:
            raise MicrotomeError(
                f"{box.where}: class {box.name!r} is no class of the data set{nearest(box.name, number)}; give "
                f"`class_of: {{{box.name}: CLASS}}`"
            )
        found[images[0]].append((number[name], box))
    if not found:
        raise MicrotomeError(
            f"no box is of an image of the data set: boxes name {boxes[0].image!r}, and an image is {image_ids[0]!r}"
        )
    return dict(found)


def _ends(image_ids: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the images by all that may name them: their path, with or without suffix, and each end of it."""
    found: dict[str, tuple[str, ...]] = {}
    whole = {}
    for image in image_ids:
        path = composed(str(image))
        for text in {path, _stem(path)}:
            parts = text.split("/")
            for at in range(len(parts)):
                end = "/".join(parts[at:])
                found[end] = (*found.get(end, ())[:1], str(image))
        whole[path] = (str(image),)
    return found | whole


def _stem(path: str) -> str:
    own = PurePosixPath(path)
    return str(own.with_suffix("")) if own.suffix else path


def placed(box: Box, size: tuple[int, int], geometry: Geometry) -> Edges | None:
    """Return a box in the image as it is resized and cropped; None if nothing of it is left.

    Parameters
    ----------
    size : (height, width) of the upright image before that.

    Raises
    ------
    MicrotomeError
        The box does not lie in the image, or its file gives another size of the image.
    """
    height, width = size
    left, top, right, bottom = box.edges
    if box.size is not None and box.size != size:
        raise MicrotomeError(
            f"{box.where}: is of an image of {box.size[1]} x {box.size[0]} pixels, and {box.image!r} has {width} x "
            f"{height}"
        )
    if left < 0 or top < 0 or right > width or bottom > height:
        raise MicrotomeError(
            f"{box.where}: box {_shown(box.edges)} lies outside its image {box.image!r} of {width} x {height} pixels"
        )
    new_height, new_width = geometry.resized(height, width)
    above, before, rows, columns = geometry.offsets(new_height, new_width)
    x, y = new_width / width, new_height / height
    edges = (
        min(max(left * x - before, 0.0), columns),
        min(max(top * y - above, 0.0), rows),
        min(max(right * x - before, 0.0), columns),
        min(max(bottom * y - above, 0.0), rows),
    )
    return edges if edges[2] > edges[0] and edges[3] > edges[1] else None
