"""Data sets whose images are arrays in a file: numpy's npz, and the batches of CIFAR-10.

These images have no files of their own. An image's id is its number, below the name of its split if each split has a
separate file. Its record is that of the file that holds it.
"""

from __future__ import annotations

import functools
import io
import math
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.csv_tables import composed
from pipeline.data.decode import ChangedError, Stamp, check_listed
from pipeline.data.listing import MOST_CLASSES, SPLIT_NAME, STRINGS, Listing, one_name_a_split
from pipeline.data.plain_pickle import read_dict
from pipeline.errors import MicrotomeError, nearest

HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MOST_LOADED = 4 << 30  # bytes of a compressed array that a worker holds; an uncompressed array is mapped
READ_AT_ONCE = 1 << 24
LONGEST_HEADER = 1 << 14  # bytes of an .npy; numpy reads none of more than 10,000
LONGEST_TEXT = 4096  # bytes of an entry of an array of text, four a character
LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member; the lengths of its name and of its extra field come last

CIFAR10_FOLDER = "cifar-10-batches-py"
CIFAR10_BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
CIFAR10_META = "batches.meta"
CIFAR10_SIZE = (32, 32)
CIFAR10_VALUES = 3 * 32 * 32
CIFAR10_BYTES = 60_000 * CIFAR10_VALUES


# npz ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One array of an npz: shape, type, order, and the offset of its bytes; offset None: compressed."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int | None

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * self.dtype.itemsize


def list_npz(
    file: Path | Mapping[str, Path], images: str, labels: str | None, classes: Sequence[str] | None
) -> Listing:
    """List the images of one npz, or of one npz per split.

    file: one file: its array `split` of text gives the splits (default: all `validation`), and ids are the numbers from
        `0000000`. Several files by split: ids are `<split>/0000000` onwards.
    images, labels: names of the arrays; `{split}` in them is replaced by the name of the split. Labels are whole
        numbers, -1 for none; with `labels` None, no image has a label.
    classes: their names; default: the labels as they are.

    Raises `MicrotomeError`: no npz, no such array, a type or shape other than those of `layout` and labels, damage.
    """
    parts = {"": file} if isinstance(file, Path) else dict(sorted(file.items()))
    one_name_a_split(parts, "the files")
    ids, label, split, size, time = [], [], [], [], []
    for name, path in parts.items():
        found = member(path, images.replace("{split}", name))
        layout(found)
        check(found)
        count = found.shape[0]
        ids += [f"{name}/{index:07d}".removeprefix("/") for index in range(count)]
        label.append(_labels(path, labels.replace("{split}", name), count) if labels else np.full(count, -1, np.int64))
        split += [name] * count if name else _splits(path, count)
        status = path.stat()
        size.append(np.full(count, status.st_size))
        time.append(np.full(count, status.st_mtime_ns))
    numbers = np.concatenate(label)
    first = next(iter(parts.values()))
    order = np.argsort(np.array(ids, STRINGS), kind="stable")  # ids of over ten million images have an eighth digit
    return Listing(
        root=first if isinstance(file, Path) else first.parent,
        image_id=np.array(ids, STRINGS)[order],
        size=np.concatenate(size)[order],
        mtime_ns=np.concatenate(time)[order],
        label=numbers[order],
        split=np.array(split, STRINGS)[order],
        classes=_classes(numbers, classes, first),
        read=tuple(dict.fromkeys(parts.values())),
    )


def member(path: Path, name: str) -> Member:
    """Find an array of an npz and read its header."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [entry[:-4] for entry in archive.namelist() if entry.endswith(".npy")]
            if name not in names:
                there = ", ".join(sorted(names)[:20]) or "(none)"
                raise MicrotomeError(f"{path} has the arrays {there}; expected {name!r}{nearest(name, names)}")
            info = archive.getinfo(name + ".npy")
            with archive.open(info) as file:
                head = io.BytesIO(file.read(LONGEST_HEADER))  # a header may say that it has gigabytes
                version = np.lib.format.read_magic(head)
                if version not in HEADERS:
                    raise MicrotomeError(f"{path}: array {name!r} is in version {version} of npy, not known here")
                shape, fortran, dtype = HEADERS[version](head)
                begins = head.tell()
        if dtype.hasobject:
            raise MicrotomeError(f"{path}: array {name!r} holds Python objects, which are not read; save plain numbers")
        if min(shape, default=0) < 0 or begins + math.prod(shape) * dtype.itemsize != info.file_size:
            raise MicrotomeError(f"{path}: array {name!r} of shape {shape} does not have the bytes for it; damaged?")
        offset = None
        if info.compress_type == zipfile.ZIP_STORED:
            with path.open("rb") as file:
                file.seek(info.header_offset)
                offset = info.header_offset + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size)))
            offset += begins
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, ValueError, RuntimeError, NotImplementedError, EOFError, struct.error) as error:
        raise MicrotomeError(f"{path} is not an npz file of numpy: {error}") from error
    return Member(path, name, tuple(shape), dtype, fortran, offset)


def check(found: Member) -> None:
    """Read an array to its end, so that the zip file's checksum reveals damage; keep nothing."""
    if found.offset is None and found.nbytes > MOST_LOADED:
        raise MicrotomeError(
            f"{found.path}: array {found.name!r} is compressed and too large for every worker to hold "
            f"({found.nbytes / 1e9:.1f} GB); save it with numpy.savez, without compression"
        )
    try:
        with zipfile.ZipFile(found.path) as archive, archive.open(found.name + ".npy") as file:
            while file.read(READ_AT_ONCE):
                pass
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise MicrotomeError(f"{found.path}: array {found.name!r} is damaged: {error}") from error


def values(found: Member) -> np.ndarray:
    """Return the values of an array, memory-mapped if it is not compressed."""
    order: Any = "F" if found.fortran else "C"
    if found.offset is not None and found.count:
        return np.memmap(found.path, found.dtype, "r", found.offset, found.shape, order)
    try:
        with zipfile.ZipFile(found.path) as archive, archive.open(found.name + ".npy") as file:
            data = file.read()
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise MicrotomeError(f"{found.path}: array {found.name!r} is damaged: {error}") from error
    flat = np.frombuffer(data, found.dtype, found.count, len(data) - found.nbytes)
    return flat.reshape(found.shape, order=order)


def held(path: Path, name: str) -> int:
    """Return how many bytes of an array a worker holds while it reads images from it."""
    found = member(path, name)
    return 2 * found.nbytes if found.offset is None else 0


def layout(found: Member) -> str:
    """Return where an array of images has its channels: `none` (grey), `first` or `last`."""
    shape, where = found.shape, f"{found.path}: array {found.name!r}"
    expected = "uint8 of shape (n, height, width), (n, height, width, 3) or (n, 3, height, width)"
    if found.dtype != np.uint8 or not found.shape or 0 in shape:
        raise MicrotomeError(f"{where} has type {found.dtype} and shape {shape}; expected {expected}")
    first, last = (len(shape) == 4 and shape[axis] in (1, 3) for axis in (1, 3))
    if first and last:
        raise MicrotomeError(f"{where} of shape {shape} may have its channels first or last; expected {expected}")
    if len(shape) == 3:
        return "none"
    if not first and not last:
        raise MicrotomeError(f"{where} has shape {shape}; expected {expected}")
    return "first" if first else "last"


def image_size(found: Member) -> tuple[int, int]:
    """Return (height, width) of the images of an array."""
    start = 2 if layout(found) == "first" else 1
    return found.shape[start], found.shape[start + 1]


def _labels(path: Path, name: str, count: int) -> np.ndarray:
    found = member(path, name)
    if found.dtype.kind not in "iu" or found.shape not in ((count,), (count, 1)):
        raise MicrotomeError(
            f"{path}: array {name!r} has type {found.dtype} and shape {found.shape}; expected {count:,} whole numbers, "
            "one for each image"
        )
    check(found)
    label = values(found).reshape(count).astype(np.int64)
    wrong = (label < -1) | (label >= MOST_CLASSES)
    if wrong.any():
        at = int(np.argmax(wrong))
        raise MicrotomeError(
            f"{path}: label {label[at]} of image {at}; expected 0 to {MOST_CLASSES - 1:,}, -1 for none"
        )
    return label


def _splits(path: Path, count: int) -> list[str]:
    """Return the splits from the array `split` of a file; without one, all are `validation`."""
    with zipfile.ZipFile(path) as archive:
        if "split.npy" not in archive.namelist():
            return ["validation"] * count
    found = member(path, "split")
    if found.dtype.kind not in "US" or found.shape != (count,):
        raise MicrotomeError(
            f"{path}: array 'split' has type {found.dtype} and shape {found.shape}; expected {count:,} texts, one for "
            "each image"
        )
    if found.dtype.itemsize > LONGEST_TEXT:
        raise MicrotomeError(
            f"{path}: array 'split' has room for {found.dtype.itemsize // 4:,} characters in each text; expected names "
            "of splits: save it with the type that numpy gives a list of names"
        )
    check(found)
    names = values(found).astype(str).tolist()
    wrong = next((name for name in set(names) if not SPLIT_NAME.fullmatch(name)), None)
    if wrong is not None:
        raise MicrotomeError(f"{path} has the split {wrong!r}; expected letters, digits and . _ -, at most 64")
    one_name_a_split(names, f"array 'split' of {path}")
    return ["validation" if name == "val" else name for name in names]


def _classes(label: np.ndarray, classes: Sequence[str] | None, path: Path) -> list[str]:
    count = int(label.max(initial=-1)) + 1
    if classes is None:
        return [str(number) for number in range(count)]
    if count > len(classes):
        raise MicrotomeError(f"{path} has the label {count - 1}, but {len(classes)} classes are named")
    twice = [name for name, of in Counter(map(composed, classes)).items() if of > 1]
    if twice:
        raise MicrotomeError(f"two classes of {path} have the name {twice[0]!r}; make them differ")
    return list(classes)


# The batches of CIFAR-10 ----------------------------------------------------------------------------------------------


def list_cifar10(root: Path, splits: Sequence[str]) -> Listing:
    """List the images of CIFAR-10 in torchvision's layout and order; ids are `<split>/0000000` onwards.

    Raises `MicrotomeError`: a batch that cannot be read or holds anything but 32 x 32 images and their labels.
    """
    folder = root / CIFAR10_FOLDER
    meta = read_dict(folder / CIFAR10_META)
    classes = meta.get("label_names")
    if type(classes) is not list or not classes or not all(type(name) is str for name in classes):
        raise MicrotomeError(f"{folder / CIFAR10_META} has no list label_names; expected the names of the classes")
    ids, label, split, size, time = [], [], [], [], []
    for name in sorted(splits):
        begins = 0
        for batch in CIFAR10_BATCHES[name]:
            images, labels = cifar10_batch(folder / batch)
            if max(labels, default=0) >= len(classes):
                raise MicrotomeError(f"{folder / batch} has the label {max(labels)}; expected 0 to {len(classes) - 1}")
            count = len(images)
            ids += [f"{name}/{index:07d}" for index in range(begins, begins + count)]
            label += labels
            split += [name] * count
            status = (folder / batch).stat()
            size += [status.st_size] * count
            time += [status.st_mtime_ns] * count
            begins += count
    if not ids:
        raise MicrotomeError(f"{folder} has no images in {', '.join(splits)}")
    batches = [batch for name in sorted(splits) for batch in CIFAR10_BATCHES[name]]
    return Listing(
        root=folder,
        image_id=np.array(ids, STRINGS),
        size=np.array(size, np.int64),
        mtime_ns=np.array(time, np.int64),
        label=np.array(label, np.int64),
        split=np.array(split, STRINGS),
        classes=classes,
        read=tuple(folder / name for name in (CIFAR10_META, *batches)),
    )


def cifar10_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    """Return uint8 (image, 3, 32, 32) and the labels of one batch, without executing anything in the file."""
    batch = read_dict(path)
    data, labels = batch.get("data"), batch.get("labels")
    if not isinstance(data, np.ndarray) or data.ndim != 2 or data.shape[1] != CIFAR10_VALUES:
        shape = getattr(data, "shape", None)
        raise MicrotomeError(f"{path}: data has shape {shape}; expected (n, {CIFAR10_VALUES}) of uint8")
    if type(labels) is not list or len(labels) != len(data) or not all(type(one) is int and one >= 0 for one in labels):
        raise MicrotomeError(f"{path}: labels are not {len(data):,} whole numbers from 0 on, one for each image")
    return data.reshape(-1, 3, *CIFAR10_SIZE), labels


# Reading one image ----------------------------------------------------------------------------------------------------


def npz_image(path: Path, images: str, index: int, listed: Stamp | None = None) -> np.ndarray:
    """Return one image of an npz as uint8 (3, height, width), with grey repeated. A worker opens the array once.

    With `listed`, another file than was listed raises `ChangedError`.
    """
    found, array = _opened(path, images, _time_of(path, listed))
    image = np.array(array[index])
    _time_of(path, listed)  # what was opened, and read from the map, lay between two looks at the file
    match layout(found):
        case "none":
            image = image[None]
        case "last":
            image = image.transpose(2, 0, 1)
    return np.repeat(image, 3, axis=0) if len(image) == 1 else image


def cifar10_image(root: Path, split: str, index: int, listed: Stamp | None = None) -> np.ndarray:
    """Return one image of CIFAR-10 as uint8 (3, 32, 32). A worker reads each batch once (31 MB each).

    With `listed`, another file than was listed raises `ChangedError`.
    """
    for name in CIFAR10_BATCHES[split]:
        path = root / CIFAR10_FOLDER / name
        images = _batch_images(path, path.stat().st_mtime_ns)
        if index < len(images):
            _time_of(path, listed)
            return images[index]
        index -= len(images)
    raise MicrotomeError(f"{root / CIFAR10_FOLDER}: the batches of {split} have fewer images than they had; run again")


def _time_of(path: Path, listed: Stamp | None) -> int:
    """Return mtime_ns of a file; raise `ChangedError` if it is not the one that was listed."""
    try:
        found = path.stat()
    except OSError as error:
        raise ChangedError(f"{path} cannot be read now ({error.strerror}): run again when it can") from error
    check_listed(path, found, listed)
    return found.st_mtime_ns


@functools.lru_cache(maxsize=8)
def _opened(path: Path, name: str, mtime_ns: int) -> tuple[Member, np.ndarray]:
    found = member(path, name)
    return found, values(found)


@functools.lru_cache(maxsize=8)
def _batch_images(path: Path, mtime_ns: int) -> np.ndarray:
    return cifar10_batch(path)[0]
