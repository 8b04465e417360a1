"""Listings: the images, classes, splits and label maps of a data set, found without opening a file.

A listing is ordered by image id, whatever order a file system returns names in, so its digest is the id of the data
set's snapshot. Slots, groups and shares follow from hashes of the image id: they do not change when images are added or
removed.
"""

import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.datasets import ClassOrder
from pipeline.data.csv_tables import (
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMNS,
    Table,
    Tables,
    composed,
    rows_of,
)
from pipeline.data.snapshot import Files, Named, snapshot
from pipeline.errors import MicrotomeError, nearest

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
LABEL_MAP_EXTENSIONS = frozenset((".png",))
SPLIT_FOLDERS = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ONE_SPLIT = {"training": "train", "val": "validation", "valid": "validation", "testing": "test"}
LIKE_A_SPLIT = re.compile(
    r"(train|val|valid|validation|test)(ing)?([ _-]?(set|data|images|split|20\d\d))?", re.IGNORECASE
)
A_FOLD = re.compile(r"(fold|split|cv)[ _-]?[0-9]+", re.IGNORECASE)
MASK = re.compile(r"(.+)[_.-](mask|masks|seg|segmentation|gt|label|labels|annotation)", re.IGNORECASE)
SMALL_COPIES = frozenset(("thumbnails", "thumbs", "previews"))
NONE = "-1"  # the folder of images without a class
NO_CLASSES = SMALL_COPIES | {"images", "imgs", "img", "jpegimages", "annotations", "labels", "masks"}
MOST_CLASSES = 1_000_000  # a larger index is a mistake, and would allocate its names
WHOLE = re.compile(r"(-?[0-9]{1,9})(\.0+)?")
A_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?", re.IGNORECASE)
LACKING = frozenset(("nan", "na", "n/a", "none", "null", "nil", "?", "-", "inf", "<na>", "missing"))

STRINGS = np.dtypes.StringDType()


@dataclass
class Listing:
    """The images of a data set, in the order of their ids; arrays have one entry per image.

    root: the folder that the ids are relative to. Digests leave it out: a data set can move.
    image_id: StringDType, the path below `root` with `/`.
    size, mtime_ns: int64, of the file; -1 if it cannot be read (a broken link): decoding refuses it.
    label: int64, index into `classes`; -1 for none.
    split: StringDType.
    label_map_roots: category -> folder, sorted by category.
    label_map_path: category -> StringDType, the path of the label map below its folder; "" for none. In the same order.
    label_map_size, label_map_mtime_ns: int64 (image, category), in the same order; -1 if there is no label map.
    refused: image id -> reason, for images that are listed (they have a slot) but cannot be used.
    ignored: number of files in the folders that are not listed; keys are extensions or a description.
    notices: lines on what a user may have meant otherwise, for example columns of a table that are not used.
    chosen: bool (image,), the images that are used, or None for all: a bound excludes the others (`bounded`). Excluded
        images keep a slot that they have and get no new one.
    walked, read: the inputs of the listing besides the configuration: folders as (root, table or None), as in
        `snapshot`, and single files. While none of them changes, a new listing would be the same.
    """

    root: Path
    image_id: np.ndarray
    size: np.ndarray
    mtime_ns: np.ndarray
    label: np.ndarray
    split: np.ndarray
    classes: list[str]
    label_map_roots: dict[str, Path] = field(default_factory=dict)
    label_map_path: dict[str, np.ndarray] = field(default_factory=dict)
    label_map_size: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    label_map_mtime_ns: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int64))
    refused: dict[str, str] = field(default_factory=dict)
    ignored: dict[str, int] = field(default_factory=dict)
    notices: list[str] = field(default_factory=list)
    chosen: np.ndarray | None = None
    walked: tuple[tuple[Path, Path | None], ...] = ()
    read: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.label_map_path:
            self.label_map_size = self.label_map_mtime_ns = np.empty((len(self.image_id), 0), np.int64)

    def __len__(self) -> int:
        return len(self.image_id)

    @property
    def images(self) -> np.ndarray:
        """Return the indices of the images that are used, int64, in order."""
        return np.arange(len(self)) if self.chosen is None else np.flatnonzero(self.chosen)

    def splits(self) -> dict[str, int]:
        """Return the number of used images of each split."""
        names, counts = np.unique(self.split[self.images], return_counts=True)
        return {str(name): int(count) for name, count in zip(names, counts, strict=True)}

    def path(self, image: int) -> Path:
        """Return the path of one image's file."""
        return self.root / str(self.image_id[image])

    def label_map(self, image: int, category: str) -> Path | None:
        """Return the path of one image's label map, or None if it has none."""
        relative = str(self.label_map_path[category][image])
        return self.label_map_roots[category] / relative if relative else None

    def digest(self) -> str:
        """Return the sha256 (hex) of everything used: ids, sizes, times, labels, splits, classes, label maps."""
        used = slice(None) if self.chosen is None else self.chosen
        sha256 = hashlib.sha256(b"microtome listing 1")
        _update_texts(sha256, self.image_id[used])
        for numbers in (self.size, self.mtime_ns, self.label):
            sha256.update(numbers[used].astype("<i8").tobytes())
        _update_texts(sha256, self.split[used])
        _update_texts(sha256, self.classes)
        _update_texts(sha256, self.label_map_path)
        for paths in self.label_map_path.values():
            _update_texts(sha256, paths[used])
        for numbers in (self.label_map_size, self.label_map_mtime_ns):
            sha256.update(numbers[used].astype("<i8").tobytes())
        return sha256.hexdigest()

    def record_digests(self, images: np.ndarray | None = None) -> np.ndarray:
        """Return uint8 (image, 16): for each of `images` (default: all), a digest of its source.

        It covers the id, size and mtime_ns of the file, and category, size and mtime_ns of its label maps. It leaves
        out the label and the split, which change no pixel. The digest of a shard's records is the shard's id.
        """
        rows = np.arange(len(self)) if images is None else images
        columns = (self.size[:, None], self.mtime_ns[:, None], self.label_map_size, self.label_map_mtime_ns)
        numbers = np.concatenate(columns, axis=1)[rows].astype("<i8")
        width = numbers.shape[1] * 8
        packed = memoryview(numbers.tobytes())
        categories = json.dumps(list(self.label_map_path)).encode()
        # The id comes last, after parts of known length, so its own length need not be hashed.
        start = hashlib.blake2b(len(categories).to_bytes(8, "little") + categories, digest_size=16, person=b"record")
        digests = bytearray()
        for at, image_id in enumerate(self.image_id[rows]):
            record = start.copy()
            record.update(packed[at * width : (at + 1) * width])
            record.update(image_id.encode())
            digests += record.digest()
        return np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class Folders:
    """Splits are the first folders below the root: train, val (valid, validation), test."""


@dataclass(frozen=True)
class SplitTable:
    """Splits come from a CSV with a column of images (`csv_tables.IMAGE_COLUMNS`) and one of splits.

    The column is called `split`; val means validation.
    """

    path: Path


@dataclass(frozen=True)
class Share:
    """Each image falls into a split by a hash of its id: `{"train": .8, "validation": .2}`.

    An image keeps its split when others are added or removed. The shares are laid out in the order of their names.
    """

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        for name in self.shares:
            _check_split_name(name, "a share")
        one_name_a_split(self.shares, "the shares")
        for name, share in self.shares.items():
            if not 0 < share <= 1:
                raise MicrotomeError(f"the share of split {name!r} is {share}; expected a number over 0, at most 1")
        total = sum(self.shares.values())
        if abs(total - 1) > 1e-6:
            raise MicrotomeError(f"the shares {dict(self.shares)} add up to {total}; expected 1")


@dataclass(frozen=True)
class Fixed:
    """All images belong to one split."""

    name: str

    def __post_init__(self) -> None:
        _check_split_name(self.name, "the data set")


SplitRule = Folders | SplitTable | Share | Fixed


def list_imagefolder(
    root: Path | str,
    split_rule: SplitRule,
    labels: Path | str | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    rescan: bool = False,
    order: ClassOrder = "name",
) -> Listing:
    """List `root/<class>/**/*.jpg`, or `root/<split>/<class>/**/*.jpg` with `Folders`; classes are sorted by name.

    Without class folders (images directly in the root or the split's folder), labels are -1.

    labels: a CSV with a column of images (`csv_tables.IMAGE_COLUMNS`) and one of labels (`csv_tables.LABEL_COLUMNS`);
        folders then say nothing about the class.
    classes: the names in order, for indices that are a network's: they fix the index of each class name.
    cache, rescan: see `snapshot`; `cache` is a folder.
    order: of the classes, by `name` as text, or by the `number` in each name.

    Raises `MicrotomeError` for: no folder, no images, images beside class folders, a class folder without images,
    folders that are splits or parts of a layout instead of classes, a name that is not UTF-8, a table that does not
    match the images.
    """
    files, tables = snapshot(root, cache, rescan), Tables()
    listing = _list_images(root, files, split_rule, labels, tables)
    if labels is not None:
        listing.label, listing.classes = read_labels(Path(labels), listing.image_id.tolist(), classes, order, tables)
    else:
        depth = 1 if isinstance(split_rule, Folders) else 0
        listing.label, listing.classes = _classes_from_folders(listing, depth, classes, files, order)
    return _noticed(listing, tables, order)


def list_table(
    root: Path | str,
    table: Path | str,
    split_rule: SplitRule | None,
    cache: Path | None = None,
    rescan: bool = False,
    order: ClassOrder = "name",
) -> Listing:
    """List the images that a CSV names, as paths below `root`; other files are ignored.

    Labels are in the first of `csv_tables.LABEL_COLUMNS` that exists (else -1), splits in the column `split`, unless
    `split_rule` says otherwise; with neither, all images belong to the split `validation`.

    cache, rescan, order: as in `list_imagefolder`.

    Raises `MicrotomeError` for: a file that is not a table, no rows, a path twice, a path that is absolute, leads out
    of the root with `..` or is not in its shortest form.
    """
    tables = Tables()
    rows = tables[Path(table)]
    images = [_as_on_disk(root, image) for image in rows.images(lambda image: _is_file(root, image))]
    if not images:
        raise MicrotomeError(f"{table} names no images")
    for line, image in zip(rows.lines, images, strict=True):
        if not is_inside(image):
            raise MicrotomeError(
                f"{rows.line(line)} has the path {image!r}; expected one below {root}, without `..`, `.` or `//`"
            )
    at = sorted(range(len(images)), key=images.__getitem__)
    image_ids = [images[i] for i in at]
    if split_rule is None:
        found = rows.find(SPLIT_COLUMNS)
        split = np.array(_splits_of(rows, at), STRINGS) if found else assign_splits(image_ids, Fixed("validation"))
    else:
        split = assign_splits(image_ids, split_rule, tables)
    label, classes = np.full(len(at), -1, np.int64), list[str]()
    if rows.find(LABEL_COLUMNS):
        label, classes = _labels_of(rows, at, None, order)
    listing = list_named(Path(root), Named(Path(table), image_ids), label, split, classes, cache, rescan)
    return _noticed(listing, tables, order)


def list_named(
    root: Path,
    named: Named,
    label: np.ndarray,
    split: np.ndarray,
    classes: list[str],
    cache: Path | None,
    rescan: bool,
) -> Listing:
    """List files by their names below `root`, sorted, given everything but their sizes and times."""
    check_names(list(named.names), named.table)
    files = snapshot(root, cache, rescan, named)
    return Listing(
        root=root,
        image_id=np.array(files.names, STRINGS),
        size=files.size,
        mtime_ns=files.mtime_ns,
        label=label,
        split=split,
        classes=classes,
        walked=((root, named.table),),
        read=(named.table,),
    )


def _is_file(root: Path | str, name: str) -> bool:
    return is_inside(name) and Path(root, name).is_file()


def _as_on_disk(root: Path | str, name: str) -> str:
    """Return a name in the Unicode form in which its file exists, composed or decomposed; else as it is."""
    if name.isascii() or _is_file(root, name):
        return name
    forms = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    return next((form for form in forms if _is_file(root, form)), name)


def is_inside(path: str) -> bool:
    """Return whether a relative path stays below its folder and is written in its one shortest form, with `/`."""
    return "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/"))


def list_segmentation(
    images: Path | str,
    label_maps: Mapping[str, Path | str],
    split_rule: SplitRule,
    labels: Path | str | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    rescan: bool = False,
    lists: Path | Mapping[str, Path] | None = None,
    image_suffix: str = "",
    label_suffixes: Mapping[str, str] | None = None,
) -> Listing:
    """List images with one PNG label map per category, paired by their paths below the folders without extension.

    An image that lacks a label map of any category is `refused` (it keeps its slot): as an image without concepts, it
    would silently lower every IoU. An image that shows nothing of a category has a map of void. Label maps without an
    image are counted in `ignored`.

    label_maps: category -> folder.
    labels, classes, cache, rescan: as in `list_imagefolder`; without `labels`, labels are -1.
    lists: a file with a name per line, or one per split: only these images are listed.
    image_suffix, label_suffixes: ends of the names of images, and of label maps by category, before their extensions.
        What is left is paired; names without them are ignored.

    Raises `MicrotomeError` as `list_imagefolder`, and for: two images or two label maps with the same stem, a folder in
    which no label map belongs to an image.
    """
    tables, suffixes = Tables(), label_suffixes or {}
    files = snapshot(images, cache, rescan)
    listing = _list_images(images, files, split_rule, labels, tables, lists, image_suffix)
    if labels is not None:
        listing.label, listing.classes = read_labels(Path(labels), listing.image_id.tolist(), classes, tables=tables)
    stems = _stems(listing.image_id.tolist(), images, image_suffix)
    for category in sorted(label_maps):
        folder = Path(label_maps[category])
        _pair(listing, stems, category, folder, snapshot(folder, cache, rescan), suffixes.get(category, ""))
        listing.walked += ((folder, None),)
    return _noticed(listing, tables, "name")


def _list_images(
    root: Path | str,
    files: Files,
    split_rule: SplitRule,
    labels: Path | str | None,
    tables: Tables,
    lists: Path | Mapping[str, Path] | None = None,
    suffix: str = "",
) -> Listing:
    """Return the images among `files` with their splits, without labels and label maps.

    They are those whose names end in `suffix` and that `lists` name, if there are any.
    """
    extensions = [extension_of(name) for name in files.names]
    kept = [i for i, extension in enumerate(extensions) if extension in IMAGE_EXTENSIONS]
    if not kept:
        expected = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise MicrotomeError(f"no images in {root}: found {_count(extensions)}; expected files that end in {expected}")
    check_names([files.names[i] for i in kept], root)
    ignored = Counter(extension for extension in extensions if extension not in IMAGE_EXTENSIONS)
    ended = [i for i in kept if _has_suffix(files.names[i], suffix)]
    if not ended:
        raise MicrotomeError(f"no image in {root} ends in {suffix!r}, the first is {files.names[kept[0]]!r}")
    listed = {} if lists is None else _listed(lists, [files.names[i] for i in ended], suffix)
    named = ended if lists is None else [i for i in ended if files.names[i] in listed]
    if len(ended) < len(kept):
        ignored[f"images that do not end in {suffix!r}"] = len(kept) - len(ended)
    if len(named) < len(ended):
        ignored["images that `list` does not name"] = len(ended) - len(named)
    kept = named
    image_ids = [files.names[i] for i in kept]
    if isinstance(lists, Mapping):
        split = np.array([listed[name] for name in image_ids], STRINGS)
    else:
        split = assign_splits(image_ids, split_rule, tables)
    if files.hidden:
        ignored["hidden"] = files.hidden
    return Listing(
        root=Path(root),
        image_id=np.array(image_ids, STRINGS),
        size=files.size[kept],
        mtime_ns=files.mtime_ns[kept],
        label=np.full(len(image_ids), -1, np.int64),
        split=split,
        classes=[],
        ignored=dict(ignored),
        walked=((Path(root), None),),
        read=tuple(
            Path(table)
            for table in (labels, getattr(split_rule, "path", None), *_files_of(lists).values())
            if table is not None
        ),
    )


def _files_of(lists: Path | Mapping[str, Path] | None) -> Mapping[str, Path]:
    return lists if isinstance(lists, Mapping) else {} if lists is None else {"": lists}


def _has_suffix(name: str, suffix: str) -> bool:
    return name[: name.rindex(".")].endswith(suffix)


def _listed(lists: Path | Mapping[str, Path], names: Sequence[str], suffix: str) -> dict[str, str]:
    """Return image -> split ("" with a single list) for the images that lists name, with or without their ends."""
    known: dict[str, str] = {}
    for name in names:
        stem = name[: name.rindex(".")]
        known |= {composed(form): name for form in (name, stem, stem.removesuffix(suffix))}
    found: dict[str, str] = {}
    one_name_a_split(_files_of(lists), "the lists")
    for split, path in _files_of(lists).items():
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise MicrotomeError(f"cannot read the list {path}: {error}") from error
        for at, line in enumerate(map(str.strip, lines), start=1):
            if not line:
                continue
            image = known.get(composed(line))
            if image is None:
                hint = nearest(line, names) if len(names) <= 10_000 else ""
                raise MicrotomeError(f"line {at} of {path}, {line!r}, names no image; expected one name per line{hint}")
            if found.setdefault(image, split) != split:
                raise MicrotomeError(f"line {at} of {path}: {line!r} is in two splits, {found[image]} and {split}")
    if not found:
        raise MicrotomeError(f"{lists} names no images")
    return found


def _pair(listing: Listing, stems: list[str], category: str, folder: Path, files: Files, suffix: str) -> None:
    """Add the label maps of one category to a listing."""
    extensions = [extension_of(name) for name in files.names]
    maps = [
        i
        for i, extension in enumerate(extensions)
        if extension in LABEL_MAP_EXTENSIONS and _has_suffix(files.names[i], suffix)
    ]
    names = [files.names[i] for i in maps]
    check_names(names, folder)
    map_of = dict(zip(_stems(names, folder, suffix), maps, strict=True))
    index = np.array([map_of.get(stem, -1) for stem in stems], np.int64)
    paired = index >= 0
    if not paired.any():
        raise MicrotomeError(
            f"no label map of category {category!r} in {folder} belongs to an image in {listing.root}: the image "
            f"{str(listing.image_id[0])!r} needs {stems[0] + suffix + '.png'!r}; found {_count(extensions)}"
            + ("" if suffix else "; `image_suffix` and `label_suffix` say how their names end differently")
        )
    listing.label_map_roots[category] = folder
    listing.label_map_path[category] = np.array([files.names[i] if i >= 0 else "" for i in index], STRINGS)
    sizes, times = np.where(paired, files.size[index], -1), np.where(paired, files.mtime_ns[index], -1)
    listing.label_map_size = np.column_stack([listing.label_map_size, sizes])
    listing.label_map_mtime_ns = np.column_stack([listing.label_map_mtime_ns, times])
    for image in np.flatnonzero(~paired):
        listing.refused.setdefault(str(listing.image_id[image]), f"no label map of category {category!r}")
    extra = len(maps) - int(paired.sum())
    if extra:
        listing.ignored[f"label maps of category {category!r} without an image"] = extra


# Classes, splits and labels


def _classes_from_folders(
    listing: Listing, depth: int, classes: Sequence[str] | None, files: Files, order: ClassOrder
) -> tuple[np.ndarray, list[str]]:
    """Return label (image,) and the class names: those of the folders at `depth` below the root, if there are any."""
    root = listing.root
    paths = [image_id.split("/", depth + 1) for image_id in listing.image_id]
    loose = ["/".join(path) for path in paths if len(path) < depth + 2]
    if len(loose) == len(paths):
        return listing.label, list(classes or [])
    if loose:
        raise MicrotomeError(
            f"{len(loose):,} images in {root} lie beside class folders, the first is {loose[0]!r}; move each into its "
            "class folder, or give the labels as a CSV"
        )
    name_of = _one_form({path[depth] for path in paths})
    found = sorted(set(name_of.values()), key=_key_of(order))
    if depth == 0:
        _check_no_splits(root, found)
    else:
        _check_classes_of_splits(
            root, {(str(s), name_of[path[1]]) for s, path in zip(listing.split, paths, strict=True)}
        )
    if NONE in found and len(found) > 1 and NONE not in (classes or ()):  # as in every column of labels
        found.remove(NONE)
        held = sum(name_of[path[depth]] == NONE for path in paths)
        listing.notices.append(f"the folder {NONE!r} is no class: its {held:,} images have no label")
    listing.notices += _unlike_classes(paths, depth, name_of)
    parts = [name for name in found if name.casefold() in NO_CLASSES]
    if parts and len(found) > 1 and classes is None:
        raise MicrotomeError(
            f"the folder {parts[0]!r} in {root} lies beside {len(found) - 1:,} class folders, and would be a class "
            "that shifts their numbers: move it away, or give the labels as a CSV (`labels`)"
        )
    folders = [name.split("/") for name in files.folders]
    empty = sorted({path[depth] for path in folders if len(path) == depth + 1 and path[depth]} - name_of.keys())
    if empty:
        raise MicrotomeError(
            f"{len(empty):,} class folders in {root} have no images, the first is {empty[0]!r}; they would shift the "
            "numbers of the classes: fill or remove them"
        )
    names_in_order = found if classes is None else list(classes)
    number = {NONE: -1} | {composed(name): index for index, name in enumerate(names_in_order)}
    for name in found:
        if composed(name) not in number:
            hint = nearest(name, names_in_order)
            raise MicrotomeError(f"folder {name!r} in {root} is not one of the classes given{hint}")
    return np.array([number[composed(path[depth])] for path in paths], np.int64), names_in_order


def _unlike_classes(paths: Sequence[list[str]], depth: int, name_of: Mapping[str, str]) -> Iterator[str]:
    """Yield what class folders hold that may be meant otherwise: splits within them, classes of one split alone."""
    inside = {part for path in paths for part in path[depth + 1].split("/")[:-1] if LIKE_A_SPLIT.fullmatch(part)}
    if len(inside) > 1:
        yield f"folders of splits lie within the class folders and are not read: {', '.join(sorted(inside))}"
    if depth == 1:
        splits: dict[str, set[str]] = {}
        for split, name, *_ in paths:
            splits.setdefault(name_of[name], set()).add(split)
        alone = [f"{name!r} ({next(iter(held))})" for name, held in sorted(splits.items()) if len(held) == 1]
        if alone and len({path[0] for path in paths}) > 1:
            yield f"classes that one split alone has: {', '.join(alone[:6])}" + (", ..." if len(alone) > 6 else "")


def _one_form(names: Iterable[str]) -> dict[str, str]:
    """Return name -> name: of names that differ in their Unicode form alone, the composed one for all of them."""
    forms = Counter(map(composed, names))
    return {name: composed(name) if forms[composed(name)] > 1 else name for name in names}


def _by_number(name: str) -> tuple[list[tuple[int, int | str]], str]:
    """Return the key that sorts `c2` before `c10`."""
    parts = [part for part in re.split(r"([0-9]+)", name) if part]
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts], name


def _by_name(name: str) -> str:
    return name


def _key_of(order: ClassOrder) -> Callable[[str], Any]:
    return _by_number if order == "number" else _by_name


def _check_no_splits(root: Path, found: Sequence[str]) -> None:
    """Refuse folders of splits as classes: all of them are, or two splits are among them; and folders of folds."""
    if len(found) > 1 and all(map(A_FOLD.fullmatch, found)):
        raise MicrotomeError(
            f"the folders in {root} are folds, not classes: {', '.join(found[:4])}; give classes and splits as a CSV "
            f"(`labels`), or make one of them the root"
        )
    like = [(name, of) for name in found if (of := LIKE_A_SPLIT.fullmatch(name))]
    splits = {ONE_SPLIT.get(of[1].lower(), of[1].lower()) for _, of in like}
    if like and (len(like) == len(found) or len(splits) > 1):
        names = ", ".join(name for name, _ in like)
        raise MicrotomeError(
            f"the folders in {root} are splits, not classes: {names}; take the splits from folders (`split: {{folders: "
            f"true}}`, which knows {', '.join(SPLIT_FOLDERS)}), or make one of them the root"
        )


def _check_classes_of_splits(root: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Refuse splits whose only class no other split has, such as a folder `images`: it would shift the others."""
    classes: dict[str, set[str]] = {}
    for split, name in pairs:
        classes.setdefault(split, set()).add(name)
    for only in {next(iter(names)) for names in classes.values() if len(names) == 1}:
        own = sorted(split for split, names in classes.items() if names == {only})
        if len(own) < len(classes) and not any(only in names for split, names in classes.items() if split not in own):
            raise MicrotomeError(
                f"in {root}, {' and '.join(own)} have the one class {only!r}, and the other splits lack it: its number "
                "would shift theirs; lay the splits out alike, as <split>/<class>/<image>, move that folder away, or "
                "use `kind: csv`"
            )


def assign_splits(image_ids: Sequence[str], rule: SplitRule, tables: Tables | None = None) -> np.ndarray:
    """Return the split of each image, StringDType (image,); `tables` are those of the data set read so far."""
    if isinstance(rule, Fixed):
        return np.full(len(image_ids), rule.name, STRINGS)
    if isinstance(rule, Share):
        names = sorted(rule.shares)
        edges = np.cumsum([rule.shares[name] for name in names])[:-1]
        return np.array(names, STRINGS)[np.searchsorted(edges, _hash(image_ids, b"split") / 2.0**64, side="right")]
    if isinstance(rule, SplitTable):
        table = (Tables() if tables is None else tables)[rule.path]
        return np.array(_splits_of(table, rows_of(table, image_ids, "split")), STRINGS)
    tops = [image_id.partition("/") for image_id in image_ids]
    for name, slash, rest in tops:
        if not slash or name not in SPLIT_FOLDERS:
            raise MicrotomeError(
                f"the image {name + slash + rest!r} is not in the folder of a split; expected one of "
                f"{', '.join(SPLIT_FOLDERS)} at the top, or another rule for splits (a CSV, shares, or one name)"
            )
    one_name_a_split({name for name, _, _ in tops}, "the folders")
    return np.array([SPLIT_FOLDERS[name] for name, _, _ in tops], STRINGS)


def _splits_of(table: Table, rows: Sequence[int]) -> list[str]:
    values = table.values(SPLIT_COLUMNS)
    for name in set(values):
        _check_split_name(name, table.line(table.lines[values.index(name)]))
    one_name_a_split(values, f"column 'split' of {table.path}")
    return ["validation" if values[row] == "val" else values[row] for row in rows]


def _check_split_name(name: str, where: str) -> None:
    if not SPLIT_NAME.fullmatch(name):
        raise MicrotomeError(f"{where} has the split {name!r}; expected letters, digits and . _ -, at most 64")


def one_name_a_split(names: Iterable[str], where: str) -> None:
    """Refuse names of splits that differ in case alone, or as val and valid do; `val` is `validation`."""
    first: dict[str, str] = {}
    for name in sorted({"validation" if name == "val" else name for name in names}):
        low = name.lower()
        before = first.setdefault(ONE_SPLIT.get(low, low), name)
        if before != name:
            raise MicrotomeError(f"{where}: {before!r} and {name!r} may be one split: give both the same name")


def read_labels(
    path: Path,
    image_ids: Sequence[str],
    classes: Sequence[str] | None = None,
    order: ClassOrder = "name",
    tables: Tables | None = None,
) -> tuple[np.ndarray, list[str]]:
    """Return label int64 (image,) and the class names, from a CSV with one row per image.

    If all labels are whole numbers (`3` or `3.0`), they are indices, and a column `name` names them (an index without
    an image is named by its number). Otherwise they are names: sorted, unless `classes` gives their order. In both,
    -1 is none.
    """
    table = (Tables() if tables is None else tables)[path]
    table.column(IMAGE_COLUMNS), table.column(LABEL_COLUMNS)
    return _labels_of(table, rows_of(table, image_ids, "label"), classes, order)


def _labels_of(
    table: Table, rows: Sequence[int], classes: Sequence[str] | None, order: ClassOrder
) -> tuple[np.ndarray, list[str]]:
    """Return the labels of these rows, and the class names."""
    values = table.values(LABEL_COLUMNS)
    whole = [WHOLE.fullmatch(value) for value in values]
    if all(whole):
        label = np.array([found[1] for found in whole if found]).astype(np.int64)
        return label[rows], _names_of_indices(table, label, classes)
    _check_names_not_numbers(table, values)
    form = _one_form(set(values))
    absent = {value for value, found in zip(values, whole, strict=True) if found and int(found[1]) == -1}
    names = sorted(set(form.values()) - absent, key=_key_of(order)) if classes is None else list(classes)
    number = {composed(name): index for index, name in enumerate(names)} | dict.fromkeys(absent, -1)
    for line, value in zip(table.lines, values, strict=True):
        if composed(value) not in number:
            hint = nearest(value, names)
            raise MicrotomeError(f"{table.line(line)} has the label {value!r}, which is not a class{hint}")
    label = np.array([number[composed(value)] for value in values], np.int64)
    _check_other_labels(table, label)
    return label[rows], names


def _check_names_not_numbers(table: Table, values: Sequence[str]) -> None:
    """Refuse numbers that would be sorted as text because a few of them are fractions, or are lacking."""
    if not all(A_NUMBER.fullmatch(value) or value.lower() in LACKING for value in values):
        return
    if any(A_NUMBER.fullmatch(value) for value in values):
        odd = (at for at, value in enumerate(values) if not re.fullmatch(r"-?[0-9]+(\.0+)?", value))
        if (at := next(odd, None)) is not None:
            raise MicrotomeError(
                f"{table.line(table.lines[at])} has the label {values[at]!r} among numbers; expected whole numbers "
                "from 0 on, -1 for none, or names"
            )


def _check_other_labels(table: Table, label: np.ndarray) -> None:
    """Refuse a second column of labels that numbers the named classes in another way than their names' order does."""
    own = table.find(LABEL_COLUMNS)
    for other in LABEL_COLUMNS:
        if other == own or other not in table.columns:
            continue
        found = [WHOLE.fullmatch(value.strip()) for value in table.columns[other]]
        if all(found) and any(int(f[1]) != index for f, index in zip(found, label.tolist(), strict=True) if f):
            raise MicrotomeError(
                f"{table.path} has names in {own!r} and other numbers in {other!r} than the names' order gives: for "
                f"the numbers, call the names `name`; for the names, remove {other!r}"
            )


def _names_of_indices(table: Table, label: np.ndarray, classes: Sequence[str] | None) -> list[str]:
    most = MOST_CLASSES if classes is None else len(classes)
    wrong = (label >= most) | (label < -1)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise MicrotomeError(
            f"{table.line(table.lines[at])} has the label {label[at]}; expected 0 to {most - 1:,}, -1 for none"
        )
    names: dict[int, str] = {}
    given = table.columns.get("name", [""] * len(label))
    table.used.add("name")
    for at, (index, name) in enumerate(zip(label.tolist(), map(str.strip, given), strict=True)):
        before = names.setdefault(index, name)
        if before != name:
            raise MicrotomeError(f"{table.line(table.lines[at])} names class {index} {name!r}, but it is {before!r}")
    if classes is not None:
        return list(classes)
    found = [names.get(index) or str(index) for index in range(max(names, default=-1) + 1)]
    first: dict[str, int] = {}
    for index, name in enumerate(found):
        if (earlier := first.setdefault(composed(name), index)) != index:
            raise MicrotomeError(
                f"{table.path} gives the name {name!r} to the classes {earlier} and {index}; make them differ"
            )
    return found


def _noticed(listing: Listing, tables: Tables, order: ClassOrder) -> Listing:
    """Return the listing with its notices: columns that are not used, and class names that say less than they seem."""
    listing.notices += tables.notices()
    if listing.notices and not (listing.label >= 0).any():
        listing.notices.append(f"no labels were read; they are in a column {', '.join(LABEL_COLUMNS)}")
    names = listing.classes
    if order == "name" and names == sorted(names) != sorted(names, key=_by_number):
        shown = ", ".join(f"{index} → {name}" for index, name in enumerate(names[:4]))
        listing.notices.append(
            f"the classes are numbered in the order of text: {shown} ...; `class_order: number` changes it"
        )
    alike = Counter(map(_loosely, names))
    twins = [name for name in names if alike[_loosely(name)] > 1 and len(_loosely(name)) > 1]
    if twins:
        listing.notices.append(f"classes whose names differ in case or spaces alone: {', '.join(twins[:6])}")
    listing.notices += _suspects(listing)
    copies = [name for name in listing.image_id if not SMALL_COPIES.isdisjoint(name.lower().split("/")[:-1])]
    if copies:
        listing.notices.append(
            f"{len(copies):,} images lie in folders like {copies[0]!r}: small copies count as images"
        )
    return listing


def _suspects(listing: Listing) -> Iterator[str]:
    """Yield what may have gone wrong with labels and images."""
    names, held = listing.classes, set(listing.label[listing.label >= 0].tolist())
    if names == list(map(str, range(len(names)))) and held == set(range(1, len(names))) and len(held) > 1:
        yield (
            f"no image has the label 0: if the labels 1 to {len(names) - 1} count from 1, subtract 1, since a "
            f"network's classes begin with 0"
        )
    joined = [name for name in names if any(len(each) > 1 and set(each) <= set(names) for each in _parts(name))]
    if joined:
        yield f"class names that are made of others, where images have several labels: {', '.join(joined[:6])}"
    stems = {image_id.rpartition(".")[0] for image_id in listing.image_id.tolist()}
    masks = sorted(stem for stem in stems if (of := MASK.fullmatch(stem)) and of[1] in stems)
    if masks:
        yield f"{len(masks):,} images, the first is {masks[0]!r}, seem to be label maps of others, and count as images"


def _parts(name: str) -> Iterator[list[str]]:
    return ([part.strip() for part in name.split(mark)] for mark in "|;,/+&")


def _loosely(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


# Slots and groups


def bounded(listing: Listing, most: int) -> Listing:
    """Return the listing with the first `most` images of each split chosen, in slot order.

    Images chosen under a smaller bound are also chosen under a larger one, and already have their slots.
    """
    order = _in_slot_order(listing, np.arange(len(listing)))
    split = listing.split[order]
    chosen = np.zeros(len(listing), bool)
    for name in np.unique(split):
        chosen[order[split == name][:most]] = True
    return replace(listing, chosen=chosen)


def slots(listing: Listing, previous_ids: Sequence[str] | np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the image id of every slot (StringDType), and its index in `listing` (int64; -1: the image is gone).

    Images of `previous_ids` keep their slots, chosen or not. New chosen images follow, by split and then by a hash of
    the id, so that a shard mixes the classes and the first shards of a split are a random sample of it.
    """
    known = [] if previous_ids is None else np.asarray(previous_ids, STRINGS).tolist()
    if len(set(known)) != len(known):
        twice = next(image_id for image_id, n in Counter(known).items() if n > 1)
        raise MicrotomeError(f"the image id {twice!r} has two slots; the store is damaged: ingest the data set afresh")
    index_of = dict(zip(listing.image_id.tolist(), range(len(listing)), strict=True))
    kept = np.array([index_of.get(image_id, -1) for image_id in known], np.int64)
    is_new = np.ones(len(listing), bool) if listing.chosen is None else listing.chosen.copy()
    is_new[kept[kept >= 0]] = False
    new = _in_slot_order(listing, np.flatnonzero(is_new))
    return np.concatenate([np.array(known, STRINGS), listing.image_id[new]]), np.concatenate([kept, new])


def _in_slot_order(listing: Listing, images: np.ndarray) -> np.ndarray:
    """Return the same indices by split, then by a hash of the id; ties keep the given order."""
    split = np.unique(listing.split[images], return_inverse=True)[1]
    return images[np.lexsort((_hash(listing.image_id[images], b"slot"), split))]


def group(image_ids: Iterable[str], groups: int = 20) -> np.ndarray:
    """Return the group of each image, uint8 below `groups`: by a hash of the id that neither slots nor shares use."""
    if not 1 <= groups <= 256:
        raise MicrotomeError(f"{groups} groups; expected 1 to 256")
    return (_hash(image_ids, b"group") % np.uint64(groups)).astype(np.uint8)


def derangement(image_ids: Iterable[str]) -> np.ndarray:
    """Return the image whose label maps each image gets in the permuted control: the next by a hash of the ids.

    The permutation is one cycle through all images of a shard, so no image gets its own label maps, unless it is the
    only one.
    """
    keys = [
        hashlib.blake2b(str(name).encode("utf-8", "surrogateescape"), person=b"derange").digest() for name in image_ids
    ]
    order = np.array(sorted(range(len(keys)), key=keys.__getitem__))
    partner = np.empty(len(order), np.int64)
    partner[order] = np.roll(order, -1)
    return partner


def _hash(image_ids: Iterable[str], person: bytes) -> np.ndarray:
    """Return 64 bits of blake2b of each id, uint64; hashes for different purposes (`person`) are independent."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(i.encode(), digest_size=8, person=person).digest() for i in image_ids])
    return np.frombuffer(joined, "<u8").astype(np.uint64)


# Names


def check_names(names: list[str], folder: Path | str) -> None:
    """Refuse names that are not UTF-8: they cannot be an image id, which every result stores as text."""
    if "".join(names).isascii():
        return
    wrong = [name for name in names if not _is_utf8(name)]
    if wrong:
        raise MicrotomeError(
            f"{len(wrong):,} names in {folder} are not UTF-8, the first is {os.fsencode(wrong[0])!r}; rename them"
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _stems(names: Sequence[str], folder: Path | str, suffix: str = "") -> list[str]:
    """Return names without extension and the suffix before it; refuse duplicates, which would pair ambiguously."""
    stems = [composed(name[: name.rindex(".")].removesuffix(suffix)) for name in names]
    first: dict[str, str] = {}
    for stem, name in zip(stems, names, strict=True):
        if first.setdefault(stem, name) != name:
            raise MicrotomeError(
                f"two names in {folder} differ in their extension alone: {first[stem]!r} and {name!r}; remove one"
            )
    return stems


def _count(extensions: Iterable[str]) -> str:
    counts = Counter(extensions)
    return ", ".join(f"{counts[extension]:,} {extension}" for extension in sorted(counts)) or "no files"


def extension_of(name: str) -> str:
    """Return the extension in lower case, with its dot."""
    dot = name.rfind(".")
    if dot <= name.rfind("/"):
        return "(no extension)"
    extension = name[dot:].lower()
    return extension if extension.isascii() else repr(extension)


def _update_texts(sha256, texts: Iterable[str]) -> None:
    """Add texts to a hash: their number, their lengths, then the texts, so that no two lists add the same bytes."""
    encoded = [text.encode() for text in texts]
    sha256.update(len(encoded).to_bytes(8, "little"))
    sha256.update(np.array([len(text) for text in encoded], "<i8").tobytes())
    sha256.update(b"".join(encoded))
