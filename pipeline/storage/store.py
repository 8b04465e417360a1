"""Verified zarr stores: the checksum of every chunk file is recorded when written and checked when read.

A store is a zarr v3 group whose arrays are written shard by shard, each shard by one task. `write` returns the size and
crc32c of every file it wrote, computed from the bytes in memory. The `Ledger` beside the store keeps them. `Reader`
rejects a chunk file that is missing, truncated or altered, and names store and file.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.storage.layout import Array as Array
from pipeline.storage.layout import DamagedStoreError as DamagedStoreError
from pipeline.storage.layout import attributes as attributes
from pipeline.storage.layout import metadata_files as metadata_files
from pipeline.storage.layout import remove as remove
from pipeline.storage.layout import remove_other_arrays as remove_other_arrays
from pipeline.storage.layout import remove_partials as remove_partials
from pipeline.storage.layout import remove_unlisted as remove_unlisted
from pipeline.storage.layout import stored_bytes as stored_bytes
from pipeline.storage.layout import verified_bytes as verified_bytes
from pipeline.storage.ledger import Ledger as Ledger
from pipeline.storage.manifest import Files, below


def create(path: Path, arrays: Mapping[str, Array], attrs: Mapping[str, Any], coordinates: Sequence[str] = ()) -> None:
    """Create a store, or bring an existing one to this layout.

    An array that differs only in shape is resized and keeps its chunks. An array with any other difference (dtype,
    byte order, codecs, fill value, chunks, dimension names) is recreated, since its chunks would be decoded otherwise
    than they were written. A lost or damaged zarr.json is rewritten beside the existing chunks: the
    ledger knows which of them are good. Metadata is consolidated, so that `xarray.open_zarr` opens the store without a
    warning.
    """
    from pipeline.storage import engine

    engine.create(path, arrays, attrs, coordinates)


def write(path: Path, values: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> Files:
    """Write blocks that cover whole chunk files and return {file: (size, crc32c)}, relative to the store.

    `values` maps an array's name to (offset in every dimension, block). Each file is written under a temporary name and
    renamed. No two tasks may write the same file. Raises `ValueError` unless blocks start at a chunk (or shard)
    boundary and end at one or at the array's end.
    """
    from pipeline.storage import engine

    return engine.write(path, values)


def write_whole(
    path: Path,
    arrays: Mapping[str, tuple[tuple[str, ...], np.ndarray]],
    attrs: Mapping[str, Any],
    coordinates: Sequence[str] = (),
) -> Files:
    """Write a small store in one go, one chunk per array; return all its files with size and crc32c.

    An existing store is replaced. `arrays` maps a name to (dimension names, values); values of dtype object are text.
    """
    remove(path)
    layout = {
        name: Array(dims, values.shape, str if values.dtype == object else values.dtype, values.shape, fill=None)
        for name, (dims, values) in arrays.items()
    }
    create(path, layout, attrs, coordinates)
    files = write(path, {name: ((0,) * values.ndim, values) for name, (_, values) in arrays.items()})
    return files | metadata_files(path)


class Reader:
    """A verified reader of a store: `reader["activation"][0:64]`.

    `files` maps chunk files, relative to the store, to (size, crc32c), as in a manifest or ledger.
    """

    def __init__(self, path: Path, files: Mapping[str, tuple[int, int]]) -> None:
        from pipeline.storage import engine

        self.group = engine.open_verified(path, files)
        self.path = path

    @property
    def attrs(self) -> Mapping[str, Any]:
        return self.group.attrs

    def __getitem__(self, name: str) -> Any:
        """Return an array of the store (`zarr.Array`); a slice of it is a numpy array."""
        return self.group[name]


@dataclass(frozen=True)
class StoreRef:
    """A reference to a store, as tasks carry it: its path, and the readable files with size and crc32c."""

    path: Path
    files: Files

    @staticmethod
    def of_manifest(folder: Path, name: str, files: Files) -> "StoreRef":
        """Return the store `folder/name`, with the files that a manifest lists relative to `folder`."""
        return StoreRef(folder / name, below(name, files))

    def of(self, arrays: Iterable[str], shards: Iterable[int]) -> "StoreRef":
        """Return the same store with only the files of some arrays and shards.

        The first index of a chunk is its shard. A task carries no more than it reads.
        """
        wanted = list(shards)
        names = ["zarr.json"]
        for array in arrays:
            names += [
                f"{array}/zarr.json",
                *(name for shard in wanted for name in self._chunks.get((array, shard), ())),
            ]
        return StoreRef(self.path, {name: self.files[name] for name in names if name in self.files})

    def shards(self, array: str) -> list[int]:
        """Return the shards of an array that are written, ascending; the others hold nothing but the fill value."""
        return sorted({shard for name, shard in self._chunks if name == array})

    @cached_property
    def _chunks(self) -> dict[tuple[str, int], list[str]]:
        found: dict[tuple[str, int], list[str]] = {}
        for name in self.files:
            array, chunk, place = name.partition("/c/")
            if chunk:
                found.setdefault((array, int(place.partition("/")[0])), []).append(name)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "files": self.files}

    def open(self) -> "Reader":
        return Reader(self.path, self.files)
