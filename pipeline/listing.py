"""What a data set consists of: its images, classes, splits and label maps, without opening one file.

A listing is ordered by image id and does not depend on the order in which a file system returns names, so its digest
is the id of the data set's snapshot. Slots, groups and shares go by hashes of the image id: they stay as they are when
images are added or removed.
"""

import csv
import hashlib
import json
import os
import re
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MicrotomeError, nearest

IMAGE_EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm")
)
LABEL_MAP_EXTENSIONS = frozenset((".png",))
SPLIT_FOLDERS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

IMAGE_COLUMNS = ("image_id", "image", "path", "file")
LABEL_COLUMNS = ("label", "class_index", "class")
MOST_CLASSES = 1_000_000  # a larger index is a mistake, and would allocate its names

CACHE_FROM = 20_000  # fewer files are listed again every time: it takes a moment and also sees files changed in place
CACHE_VERSION = 1
CACHE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
SETTLED_NS = 2_000_000_000  # a folder changed just before it was listed may change again within one tick of its clock

STRINGS = np.dtypes.StringDType()


@dataclass
class Listing:
    """The images of a data set, in the order of their ids; arrays have one entry an image.

    root: the folder that the ids are relative to. It is not part of any digest: a data set can move.
    image_id: StringDType, the path below `root` with `/`.
    size, mtime_ns: int64, of the file; -1 where it cannot be read (a broken link): decoding refuses it.
    label: int64, index into `classes`; -1 for none.
    split: StringDType.
    label_map_roots: category -> folder, sorted by category.
    label_map_path: category -> StringDType, the path of the label map below its folder; "" for none. As sorted.
    label_map_size, label_map_mtime_ns: int64 (image, category), in the same order; -1 where there is no label map.
    refused: image id -> reason, for images that are listed (they have a slot) but cannot be used.
    ignored: what lies in the folders and is not listed -> how many; keys are extensions or a description.
    """

    root: Path
    image_id: np.ndarray
    size: np.ndarray
    mtime_ns: np.ndarray
    label: np.ndarray
    split: np.ndarray
    classes: list[str]
    label_map_roots: dict[str, Path]
    label_map_path: dict[str, np.ndarray]
    label_map_size: np.ndarray
    label_map_mtime_ns: np.ndarray
    refused: dict[str, str]
    ignored: dict[str, int]

    def __len__(self) -> int:
        return len(self.image_id)

    def path(self, image: int) -> Path:
        """Return the path of one image's file."""
        return self.root / str(self.image_id[image])

    def label_map(self, image: int, category: str) -> Path | None:
        """Return the path of one image's label map, or None where it has none."""
        relative = str(self.label_map_path[category][image])
        return self.label_map_roots[category] / relative if relative else None

    def digest(self) -> str:
        """Return the sha256 (hex) of all that is listed: ids, sizes, times, labels, splits, classes, label maps."""
        sha256 = hashlib.sha256(b"microtome listing 1")
        _update_texts(sha256, self.image_id)
        for numbers in (self.size, self.mtime_ns, self.label):
            sha256.update(numbers.astype("<i8").tobytes())
        _update_texts(sha256, self.split)
        _update_texts(sha256, self.classes)
        _update_texts(sha256, self.label_map_path)
        for paths in self.label_map_path.values():
            _update_texts(sha256, paths)
        for numbers in (self.label_map_size, self.label_map_mtime_ns):
            sha256.update(numbers.astype("<i8").tobytes())
        return sha256.hexdigest()

    def record_digests(self) -> np.ndarray:
        """Return uint8 (image, 16): for each image a digest of what its pixels and label maps come from.

        It covers the id, size and mtime_ns of the file, and category, size and mtime_ns of its label maps; not the
        label or the split, which change no pixel. The digest of a shard's records is the shard's id.
        """
        columns = (self.size[:, None], self.mtime_ns[:, None], self.label_map_size, self.label_map_mtime_ns)
        numbers = np.concatenate(columns, axis=1).astype("<i8")
        width = numbers.shape[1] * 8
        packed = memoryview(numbers.tobytes())
        categories = json.dumps(list(self.label_map_path)).encode()
        # all that precedes the id has a known length, so the id, which comes last, needs none
        start = hashlib.blake2b(len(categories).to_bytes(8, "little") + categories, digest_size=16, person=b"record")
        digests = bytearray()
        for image, image_id in enumerate(self.image_id):
            record = start.copy()
            record.update(packed[image * width : (image + 1) * width])
            record.update(image_id.encode())
            digests += record.digest()
        return np.frombuffer(bytes(digests), np.uint8).reshape(-1, 16)


@dataclass(frozen=True)
class Folders:
    """Splits are the first folders below the root: train, val or validation, test."""


@dataclass(frozen=True)
class SplitTable:
    """Splits come from a CSV: a column of images (`IMAGE_COLUMNS`) and a column `split` (val is validation)."""

    path: Path


@dataclass(frozen=True)
class Share:
    """Each image falls into a split by a hash of its id: `{"train": .8, "validation": .2}`.

    An image keeps its split when others are added or removed. The shares are laid out in the order of their names.
    """

    shares: Mapping[str, float]

    def __post_init__(self) -> None:
        for name, share in self.shares.items():
            _check_split_name(name, "a share")
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
) -> Listing:
    """List `root/<class>/**/*.jpg`, or `root/<split>/<class>/**/*.jpg` with `Folders`; classes are sorted by name.

    Without class folders (images directly in the root or the split's folder) labels are -1.

    labels: a CSV with a column of images (`IMAGE_COLUMNS`) and one of labels (`LABEL_COLUMNS`: names or indices);
        folders then say nothing about the class. With indices, a column `name` gives the names of the classes.
    classes: the names in order, where the indices are a network's: they fix the index of each class name.
    cache, rescan: see `snapshot`; `cache` is a folder.

    Raises `MicrotomeError` for: no folder, no images, images beside class folders, a class folder without images, a
    name that is not UTF-8, a table that does not match the images.
    """
    files = snapshot(root, cache, rescan)
    listing = _list_images(root, files, split_rule)
    if labels is not None:
        listing.label, listing.classes = read_labels(Path(labels), listing.image_id.tolist(), classes)
    else:
        depth = 1 if isinstance(split_rule, Folders) else 0
        listing.label, listing.classes = _classes_from_folders(listing, depth, classes, files)
    return listing


def list_segmentation(
    images: Path | str,
    label_maps: Mapping[str, Path | str],
    split_rule: SplitRule,
    labels: Path | str | None = None,
    classes: Sequence[str] | None = None,
    cache: Path | None = None,
    rescan: bool = False,
) -> Listing:
    """List images with one PNG label map a category, paired by their paths below the folders without extension.

    An image that lacks a label map of any category is `refused` (it keeps its slot): taken for an image without
    concepts, it would lower every IoU in silence. An image that shows nothing of a category has a map of void. Label
    maps without an image are counted in `ignored`.

    label_maps: category -> folder.
    labels, classes, cache, rescan: as `list_imagefolder`; without `labels` the labels are -1.

    Raises `MicrotomeError` as `list_imagefolder`, and for: two images or two label maps with one stem, a folder in
    which no label map belongs to an image.
    """
    listing = _list_images(images, snapshot(images, cache, rescan), split_rule)
    if labels is not None:
        listing.label, listing.classes = read_labels(Path(labels), listing.image_id.tolist(), classes)
    stems = _stems(listing.image_id.tolist(), images)
    for category in sorted(label_maps):
        _pair(listing, stems, category, Path(label_maps[category]), snapshot(label_maps[category], cache, rescan))
    return listing


def _list_images(root: Path | str, files: "Files", split_rule: SplitRule) -> Listing:
    """Return the images among `files` with their splits, without labels and label maps."""
    extensions = [_extension(name) for name in files.names]
    kept = [i for i, extension in enumerate(extensions) if extension in IMAGE_EXTENSIONS]
    if not kept:
        expected = ", ".join(sorted(IMAGE_EXTENSIONS))
        raise MicrotomeError(f"no images in {root}: found {_count(extensions)}; expected files that end in {expected}")
    image_ids = [files.names[i] for i in kept]
    _check_names(image_ids, root)
    ignored = Counter(extension for extension in extensions if extension not in IMAGE_EXTENSIONS)
    if files.hidden:
        ignored["hidden"] = files.hidden
    return Listing(
        root=Path(root),
        image_id=np.array(image_ids, STRINGS),
        size=files.size[kept],
        mtime_ns=files.mtime_ns[kept],
        label=np.full(len(image_ids), -1, np.int64),
        split=assign_splits(image_ids, split_rule),
        classes=[],
        label_map_roots={},
        label_map_path={},
        label_map_size=np.empty((len(image_ids), 0), np.int64),
        label_map_mtime_ns=np.empty((len(image_ids), 0), np.int64),
        refused={},
        ignored=dict(ignored),
    )


def _pair(listing: Listing, stems: list[str], category: str, folder: Path, files: "Files") -> None:
    """Add the label maps of one category to a listing."""
    extensions = [_extension(name) for name in files.names]
    maps = [i for i, extension in enumerate(extensions) if extension in LABEL_MAP_EXTENSIONS]
    names = [files.names[i] for i in maps]
    _check_names(names, folder)
    map_of = dict(zip(_stems(names, folder), maps, strict=True))
    index = np.array([map_of.get(stem, -1) for stem in stems], np.int64)
    paired = index >= 0
    if not paired.any():
        raise MicrotomeError(
            f"no label map of category {category!r} in {folder} belongs to an image in {listing.root}: the image "
            f"{str(listing.image_id[0])!r} needs {stems[0] + '.png'!r}; found {_count(extensions)}"
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
    listing: Listing, depth: int, classes: Sequence[str] | None, files: "Files"
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
    found = sorted({path[depth] for path in paths})
    if depth == 0 and set(found) <= SPLIT_FOLDERS.keys():
        names = ", ".join(found)
        raise MicrotomeError(f"the folders in {root} are splits, not classes: {names}; take the splits from folders")
    folders = [name.split("/") for name in files.folders]
    empty = sorted({path[depth] for path in folders if len(path) == depth + 1 and path[depth]} - set(found))
    if empty:
        raise MicrotomeError(
            f"{len(empty):,} class folders in {root} have no images, the first is {empty[0]!r}; they would shift the "
            "numbers of the classes: fill or remove them"
        )
    names_in_order = found if classes is None else list(classes)
    number = {name: index for index, name in enumerate(names_in_order)}
    for name in found:
        if name not in number:
            hint = nearest(name, names_in_order)
            raise MicrotomeError(f"folder {name!r} in {root} is not one of the classes given{hint}")
    return np.array([number[path[depth]] for path in paths], np.int64), names_in_order


def assign_splits(image_ids: Sequence[str], rule: SplitRule) -> np.ndarray:
    """Return the split of each image, StringDType (image,)."""
    if isinstance(rule, Fixed):
        return np.full(len(image_ids), rule.name, STRINGS)
    if isinstance(rule, Share):
        names = sorted(rule.shares)
        edges = np.cumsum([rule.shares[name] for name in names])[:-1]
        return np.array(names, STRINGS)[np.searchsorted(edges, _hash(image_ids, b"split") / 2.0**64, side="right")]
    if isinstance(rule, SplitTable):
        return np.array(_read_splits(rule.path, image_ids), STRINGS)
    tops = [image_id.partition("/") for image_id in image_ids]
    for name, slash, rest in tops:
        if not slash or name not in SPLIT_FOLDERS:
            raise MicrotomeError(
                f"the image {name + slash + rest!r} is not in the folder of a split; expected one of "
                f"{', '.join(SPLIT_FOLDERS)} at the top, or another rule for splits (a CSV, shares, or one name)"
            )
    return np.array([SPLIT_FOLDERS[name] for name, _, _ in tops], STRINGS)


def _read_splits(path: Path, image_ids: Sequence[str]) -> list[str]:
    rows = _read_table(path, image_ids, ("split",))
    for row in rows:
        _check_split_name(row.value, f"line {row.line} of {path}")
    return ["validation" if split == "val" else split for split in _in_order(rows, image_ids, path, "split")]


def _check_split_name(name: str, where: str) -> None:
    if not SPLIT_NAME.fullmatch(name):
        raise MicrotomeError(f"{where} has the split {name!r}; expected letters, digits and . _ -, at most 64")


def read_labels(
    path: Path, image_ids: Sequence[str], classes: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """Return label int64 (image,) and the class names, from a CSV with one row an image.

    Where all labels are whole numbers they are indices, and a column `name` names them (an index without an image is
    named by its number). Otherwise they are names: sorted, unless `classes` gives their order.
    """
    rows = _read_table(path, image_ids, LABEL_COLUMNS)
    ordered = _in_order(rows, image_ids, path, "label")
    if all(re.fullmatch("[0-9]{1,9}", value) for value in ordered):
        return np.array(ordered).astype(np.int64), _names_of_indices(path, rows, classes)
    names = sorted(set(ordered)) if classes is None else list(classes)
    number = {name: index for index, name in enumerate(names)}
    for row in rows:
        if row.value not in number:
            hint = nearest(row.value, names)
            raise MicrotomeError(f"line {row.line} of {path} has the label {row.value!r}, which is not a class{hint}")
    return np.array([number[value] for value in ordered], np.int64), names


def _names_of_indices(path: Path, rows: list["Row"], classes: Sequence[str] | None) -> list[str]:
    most = MOST_CLASSES if classes is None else len(classes)
    names: dict[int, str] = {}
    for row in rows:
        if int(row.value) >= most:
            raise MicrotomeError(f"line {row.line} of {path} has the label {row.value}; expected 0 to {most - 1:,}")
        before = names.setdefault(int(row.value), row.name)
        if before != row.name:
            raise MicrotomeError(
                f"line {row.line} of {path} names class {row.value} {row.name!r}, but it is {before!r}"
            )
    if classes is not None:
        return list(classes)
    return [names.get(index) or str(index) for index in range(max(names) + 1)]


@dataclass(frozen=True)
class Row:
    """One row of a table of images."""

    line: int
    image: str
    value: str
    name: str


def _read_table(path: Path, image_ids: Sequence[str], value_columns: Sequence[str]) -> list[Row]:
    """Read a CSV with one row an image; every row must name a listed image, and none twice."""
    rows: list[Row] = []
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            image, value = _column(path, header, IMAGE_COLUMNS), _column(path, header, value_columns)
            name = header.index("name") if "name" in header else None
            known, seen = set(image_ids), dict[str, int]()
            for cells in reader:
                if not cells:
                    continue
                where = f"line {reader.line_num} of {path}"
                if len(cells) != len(header):
                    raise MicrotomeError(f"{where} has {len(cells)} fields, its header {len(header)}")
                image_id, given = cells[image], cells[value].strip()
                if image_id not in known:
                    hint = nearest(image_id, image_ids) if len(known) <= 10_000 else ""  # it compares with every name
                    raise MicrotomeError(f"{where} names {image_id!r}, which is not an image of the data set{hint}")
                if image_id in seen:
                    raise MicrotomeError(f"{where} names {image_id!r} again, first on line {seen[image_id]}")
                if not given:
                    raise MicrotomeError(f"{where} has an empty {header[value]!r} for {image_id!r}")
                seen[image_id] = reader.line_num
                rows.append(Row(reader.line_num, image_id, given, "" if name is None else cells[name].strip()))
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise MicrotomeError(f"{path} is not a CSV in UTF-8: {error}") from error
    return rows


def _column(path: Path, header: list[str], names: Sequence[str]) -> int:
    for name in names:
        if name in header:
            return header.index(name)
    raise MicrotomeError(f"{path} has the columns {', '.join(header) or '(none)'}; expected one of {', '.join(names)}")


def _in_order(rows: list[Row], image_ids: Sequence[str], path: Path, what: str) -> list[str]:
    """Return the values of the rows in the order of the images; every image must have one."""
    values = {row.image: row.value for row in rows}
    missing = [image_id for image_id in image_ids if image_id not in values]
    if missing:
        n = len(missing)
        raise MicrotomeError(f"{n:,} images have no {what} in {path}, the first is {missing[0]!r}; add their rows")
    return [values[image_id] for image_id in image_ids]


# Slots and groups


def slots(listing: Listing, previous_ids: Sequence[str] | np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the image id of every slot (StringDType), and its index in `listing` (int64; -1: the image is gone).

    Images of `previous_ids` keep their slots. New ones follow, by split and then by a hash of the id, so that a shard
    mixes the classes and the first shards of a split are a random sample of it.
    """
    known = [] if previous_ids is None else np.asarray(previous_ids, STRINGS).tolist()
    if len(set(known)) != len(known):
        twice = next(image_id for image_id, n in Counter(known).items() if n > 1)
        raise MicrotomeError(f"the image id {twice!r} has two slots; the store is damaged: ingest the data set afresh")
    index_of = dict(zip(listing.image_id.tolist(), range(len(listing)), strict=True))
    kept = np.array([index_of.get(image_id, -1) for image_id in known], np.int64)
    is_new = np.ones(len(listing), bool)
    is_new[kept[kept >= 0]] = False
    new = np.flatnonzero(is_new)
    split = np.unique(listing.split[new], return_inverse=True)[1]
    # where two hashes are equal the order of the ids decides, in which `new` is
    new = new[np.lexsort((_hash(listing.image_id[new], b"slot"), split))]
    return np.concatenate([np.array(known, STRINGS), listing.image_id[new]]), np.concatenate([kept, new])


def group(image_ids: Iterable[str], groups: int = 20) -> np.ndarray:
    """Return the group of each image, uint8 below `groups`: by a hash of the id that neither slots nor shares use."""
    if not 1 <= groups <= 256:
        raise MicrotomeError(f"{groups} groups; expected 1 to 256")
    return (_hash(image_ids, b"group") % np.uint64(groups)).astype(np.uint8)


def _hash(image_ids: Iterable[str], person: bytes) -> np.ndarray:
    """Return 64 bits of blake2b of each id, uint64; hashes of different purposes (`person`) are independent."""
    blake2b = hashlib.blake2b
    joined = b"".join([blake2b(i.encode(), digest_size=8, person=person).digest() for i in image_ids])
    return np.frombuffer(joined, "<u8").astype(np.uint64)


# Walking a folder


@dataclass
class Files:
    """The files below a folder, in the order of their names (relative, with `/`), and the folders they lie in.

    size, mtime_ns: int64; -1 where a file is a broken link, a pipe, or the like.
    folders: relative name ("" for the folder itself) -> (mtime_ns, inode), read before the folder was.
    hidden: how many names were skipped that start with a dot (and `__MACOSX`).
    """

    names: list[str]
    size: np.ndarray
    mtime_ns: np.ndarray
    folders: dict[str, tuple[int, int]]
    hidden: int


def snapshot(root: Path | str, cache: Path | None = None, rescan: bool = False) -> Files:
    """Return the files below `root`; from `cache` when it holds more than 20,000 and no folder has changed since.

    A folder changes when a name in it is added, removed or replaced. A file that is written in place, or behind a
    link, changes no folder: `rescan` lists again in any case.

    cache: a folder that keeps one file for each root, or None. A cache that is damaged or cannot be written is as none.
    """
    if not rescan and unchanged(root, cache) is not None:
        known = _read_cache(_cache_path(root, cache))
        if known is not None:
            return known
    started = time.time_ns()
    files = scan(root)
    settled = all(mtime_ns < started - SETTLED_NS for mtime_ns, _ in files.folders.values())
    if cache is not None and len(files.names) > CACHE_FROM and settled:
        _write_cache(_cache_path(root, cache), files)
    return files


def unchanged(root: Path | str, cache: Path | None) -> str | None:
    """Return a digest of the files that `snapshot` would take from its cache; None when it would list again.

    It reads the folders' times and no names: a listing's digest can be remembered under it, so that starting is quick.
    """
    try:
        with _cache_path(root, cache).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
        same = header["version"] == CACHE_VERSION and all(
            _folder_stamp(root, name) == tuple(stamp) for name, stamp in header["folders"].items()
        )
        return header["sha256"] if same else None
    except CACHE_ERRORS:
        return None


def scan(root: Path | str) -> Files:
    """Walk `root` and return its files, whatever their type; links are followed, names with a leading dot are not.

    Raises `MicrotomeError` when a folder is missing or cannot be read, and when links lead to one folder twice: images
    would be counted twice, or the walk never end.
    """
    base = os.fspath(root)
    names: list[str] = []
    stamps: list[tuple[int, int]] = []
    folders: dict[str, tuple[int, int]] = {}
    seen: dict[tuple[int, int], str] = {}
    hidden = 0
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            status = Path(base, folder).stat()
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                raise MicrotomeError(
                    f"links in {base} lead to one folder twice: {first!r} and {folder!r}; remove one of them"
                )
            entries = os.scandir(f"{base}/{folder}")
        except OSError as error:
            raise MicrotomeError(f"cannot read the folder {base}/{folder}: {error.strerror or error}") from error
        folders[folder] = (status.st_mtime_ns, status.st_ino)
        prefix = f"{folder}/" if folder else ""
        with entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name == "__MACOSX":
                    hidden += 1
                elif _is_folder(entry):
                    waiting.append(prefix + name)
                else:
                    names.append(prefix + name)
                    stamps.append(_file_stamp(entry))
    order = sorted(range(len(names)), key=names.__getitem__)
    columns = np.array(stamps, np.int64).reshape(-1, 2)[order]
    return Files([names[i] for i in order], columns[:, 0].copy(), columns[:, 1].copy(), folders, hidden)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _file_stamp(entry: os.DirEntry) -> tuple[int, int]:
    try:
        if entry.is_file():
            status = entry.stat()
            return status.st_size, status.st_mtime_ns
    except OSError:  # removed since, or a loop of links
        pass
    return -1, -1


def _folder_stamp(root: Path | str, name: str) -> tuple[int, int]:
    status = Path(root, name).stat()
    return status.st_mtime_ns, status.st_ino


def _cache_path(root: Path | str, cache: Path | None) -> Path:
    if cache is None:
        raise FileNotFoundError("no cache")
    return cache / f"{hashlib.sha256(os.fsencode(Path(root).absolute())).hexdigest()[:20]}.listing.npz"


def _write_cache(path: Path, files: Files) -> None:
    names = json.dumps(files.names).encode("ascii")  # its escapes keep names that are not UTF-8
    content = hashlib.sha256(names)
    for numbers in (files.size, files.mtime_ns):
        content.update(numbers.astype("<i8").tobytes())
    header = {"version": CACHE_VERSION, "sha256": content.hexdigest(), "folders": files.folders, "hidden": files.hidden}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode("ascii"), np.uint8),
                names=np.frombuffer(names, np.uint8),
                size=files.size,
                mtime_ns=files.mtime_ns,
            )
        temporary.replace(path)
    except OSError:
        return  # the next run lists again


def _read_cache(path: Path) -> Files | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            names = json.loads(stored["names"].tobytes())
            size, mtime_ns = stored["size"], stored["mtime_ns"]
        folders = {name: (mtime, inode) for name, (mtime, inode) in header["folders"].items()}
        hidden = header["hidden"]
    except CACHE_ERRORS:
        return None
    return Files(names, size, mtime_ns, folders, hidden) if len(names) == len(size) == len(mtime_ns) else None


# Names


def _check_names(names: list[str], folder: Path | str) -> None:
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


def _stems(names: Sequence[str], folder: Path | str) -> list[str]:
    """Return names without their extensions; no two may be the same, or what belongs together is not clear."""
    stems = [name[: name.rindex(".")] for name in names]
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


def _extension(name: str) -> str:
    """Return the extension in lower case, with its dot."""
    dot = name.rfind(".")
    if dot <= name.rfind("/"):
        return "(no extension)"
    extension = name[dot:].lower()
    return extension if extension.isascii() else repr(extension)


def _update_texts(sha256, texts: Iterable[str]) -> None:
    """Add texts to a hash so that no two lists add the same bytes: their number, their lengths, then all of them."""
    encoded = [text.encode() for text in texts]
    sha256.update(len(encoded).to_bytes(8, "little"))
    sha256.update(np.array([len(text) for text in encoded], "<i8").tobytes())
    sha256.update(b"".join(encoded))
