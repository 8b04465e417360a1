"""What a store is on disk, without zarr: the layout of arrays, its files, their bytes, and how they are removed."""

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DamagedError
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import Files
from pipeline.storage.object_storage import chunks_of, objects_of


class DamagedStoreError(DamagedError):
    """A chunk file that differs from what was written."""


@dataclass(frozen=True)
class Array:
    """Layout of one array: dimension names, shape, dtype, inner chunk shape and (optional) shard shape.

    Without `shard`, every chunk is a separate file. With `fill` None, zarr's default for the dtype applies.
    """

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Any
    chunk: tuple[int, ...]
    shard: tuple[int, ...] | None = None
    fill: Any = 0


def attributes(path: Path) -> Mapping[str, Any]:
    """Return the attributes of a store; empty if there is none or its zarr.json is damaged."""
    try:
        return json.loads((path / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError):
        return {}


def metadata_files(path: Path) -> Files:
    """Return size and crc32c of the zarr.json files of a store and its arrays, read back from disk."""
    found: Files = {}
    for file in descriptions(path):
        data = file.read_bytes()
        found[file.relative_to(path).as_posix()] = (len(data), crc32c(data))
    return found


def descriptions(path: Path) -> list[Path]:
    """Return the zarr.json files of a store and its arrays."""
    return sorted((*path.glob("zarr.json"), *path.glob("*/zarr.json")))  # no deeper: below are chunks, maybe a million


def verified_bytes(root: Path, key: str, expected: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the bytes of one chunk file, or raise `DamagedStoreError` with store and file."""
    advice = "run `make verify` to find all damage and `make repair` to recompute only these"
    if key not in expected:
        raise DamagedStoreError(f"{root}: chunk {key} was never recorded as written; {advice}")
    size, crc = expected[key]
    try:
        data = stored_bytes(root, key)
    except OSError as error:
        raise DamagedStoreError(f"{root}: chunk {key} cannot be read ({error.strerror}); {advice}") from error
    if len(data) != size:
        raise DamagedStoreError(f"{root}: chunk {key} has {len(data)} bytes, {size} were written; {advice}")
    if crc32c(data) != crc:
        raise DamagedStoreError(f"{root}: chunk {key} has checksum {crc32c(data):08x}, {crc:08x} was written; {advice}")
    return data


def stored_bytes(root: Path, key: str) -> bytes:
    """Return the bytes of a file below a folder, from disk or object storage. Raises `OSError`."""
    objects = chunks_of(root, key)
    return (root / key).read_bytes() if objects is None else objects.get(key)


def remove_partials(path: Path) -> None:
    """Remove temporary files and folders that a killed writer left in a store."""
    for left in list(path.rglob("*.partial")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def remove_unlisted(path: Path, files: Files) -> None:
    """Remove the chunk files of a store that are not among these: other readers would take them for results."""
    objects = objects_of(path)
    there = {file.relative_to(path).as_posix() for file in path.glob("*/c/**/*") if file.is_file()}
    there |= {key for key in (objects.sizes() if objects is not None else ()) if "/c/" in key}
    if unlisted := sorted(there - set(files)):
        remove(path, *unlisted)


def remove_other_arrays(path: Path, arrays: Iterable[str]) -> None:
    """Remove the arrays of a store that are not among these."""
    for folder in path.glob("*/"):
        if folder.name not in set(arrays):
            remove(folder)


def remove(path: Path, *keys: str) -> None:
    """Remove a store, or a folder with stores, from disk and object storage; with keys, only these files."""
    for key in keys:
        objects = chunks_of(path, key)
        if objects is None:
            (path / key).unlink(missing_ok=True)
        else:
            objects.remove(key)
    if not keys:
        objects = objects_of(path)
        if objects is not None:
            objects.remove()
        shutil.rmtree(path, ignore_errors=True)
