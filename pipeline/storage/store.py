"""Verified zarr stores: the checksum of every chunk file is recorded when written and checked when read.

A store is a zarr v3 group whose arrays are written shard by shard, each shard by one task. `write` returns the size and
crc32c of every file it wrote, computed from the bytes in memory. The `Ledger` beside the store keeps them. `Reader`
rejects a chunk file that is missing, truncated or altered, and names store and file.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import Files, below
from pipeline.storage.object_storage import Objects, objects_of

# Empty chunks are written: an absent all-zero chunk would look like a lost one, and the scan for such chunks is the
# write bottleneck. One thread per process: Dask workers provide the parallelism.
zarr.config.set({"array.write_empty_chunks": True, "threading.max_workers": 1, "async.concurrency": 1})

# zstd's own checksum lets any reader notice damage. The codec crc32c would break verification: a file that ends in its
# own crc32c has the same crc32c whatever it holds, so the recorded checksums, and all ids computed from them, would say
# nothing.
COMPRESSOR = ZstdCodec(level=1, checksum=True)


class DamagedStoreError(MicrotomeError):
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


def create(path: Path, arrays: Mapping[str, Array], attrs: Mapping[str, Any], coordinates: Sequence[str] = ()) -> None:
    """Create a store, or bring an existing one to this layout.

    An array that differs only in shape is resized and keeps its chunks. An array with any other difference (dtype,
    chunks, dimension names) is recreated. A lost or damaged zarr.json is rewritten beside the existing chunks: the
    ledger knows which of them are good. Metadata is consolidated, so that `xarray.open_zarr` opens the store without a
    warning.
    """
    attributes = dict(attrs)
    if coordinates:
        attributes["coordinates"] = " ".join(coordinates)
    try:
        group = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3, use_consolidated=False)
    except (FileNotFoundError, ValueError, KeyError):  # absent, or its zarr.json is damaged
        (path / "zarr.json").unlink(missing_ok=True)
        group = zarr.create_group(LocalStore(path), zarr_format=3)
    for name, array in arrays.items():
        _create_array(group, path / name, name, array)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr: "consolidated metadata is not yet part of the v3 specification"
        zarr.consolidate_metadata(group.store)
    # zarr lists arrays in file system order, which differs between machines.
    layout = json.loads((path / "zarr.json").read_text())
    layout["attributes"] = attributes
    layout["consolidated_metadata"]["metadata"] = dict(sorted(layout["consolidated_metadata"]["metadata"].items()))
    write_atomically(path / "zarr.json", json.dumps(layout, indent=2))
    if objects := objects_of(path):
        for file in descriptions(path):
            objects.put(file.relative_to(path).as_posix(), file.read_bytes())


def _create_array(group: zarr.Group, folder: Path, name: str, array: Array) -> None:
    wanted: dict[str, Any] = {
        "shape": array.shape,
        "dtype": array.dtype,
        "chunks": array.chunk,
        "shards": array.shard,
        "compressors": [COMPRESSOR],
        "fill_value": array.fill,
        "dimension_names": list(array.dims),
    }
    if folder.exists():
        try:
            existing = group[name]
        except (KeyError, ValueError):
            existing = None
            (folder / "zarr.json").unlink(missing_ok=True)
        if isinstance(existing, zarr.Array):
            same = (
                existing.chunks == array.chunk
                and existing.shards == array.shard
                and existing.metadata.dimension_names == array.dims  # type: ignore[union-attr]
                and (
                    existing.dtype == np.dtype(array.dtype) if array.dtype is not str else existing.dtype.kind in "OTU"
                )
            )
            if same:
                if existing.shape != array.shape:
                    existing.resize(array.shape)
                return
            remove(folder)
    group.create_array(name, **wanted)


class _Recorder(LocalStore):
    """A store that records size and crc32c of every chunk file it writes, to disk or to object storage."""

    files: Files
    objects: Objects | None

    async def set(self, key: str, value: Buffer) -> None:
        data = value.to_bytes()
        self.files[key] = (len(data), crc32c(data))
        if self.objects is None:
            await super().set(key, value)
        else:
            self.objects.put(key, data)


def write(path: Path, values: Mapping[str, tuple[tuple[int, ...], np.ndarray]]) -> Files:
    """Write blocks that cover whole chunk files and return {file: (size, crc32c)}, relative to the store.

    `values` maps an array's name to (offset in every dimension, block). Each file is written under a temporary name and
    renamed. No two tasks may write the same file. Raises `ValueError` unless blocks start at a chunk (or shard)
    boundary and end at one or at the array's end.
    """
    store = _Recorder(path)
    store.files, store.objects = {}, objects_of(path)
    group = zarr.open_group(store, mode="r+", zarr_format=3, use_consolidated=False)
    for name, (offset, block) in values.items():
        array = group[name]
        assert isinstance(array, zarr.Array)
        step = array.shards or array.chunks
        for start, length, size, whole in zip(offset, block.shape, step, array.shape, strict=True):
            if start % size or ((start + length) % size and start + length != whole):
                raise ValueError(f"{path}/{name}: block {start}:{start + length} is not made of whole files of {size}")
        array[tuple(slice(o, o + n) for o, n in zip(offset, block.shape, strict=True))] = block
    return {key: value for key, value in store.files.items() if not key.endswith("zarr.json")}


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


class Located(LocalStore):
    """An unverified store that finds its chunk files on disk or on object storage."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        objects = chunks_of(Path(self.root), key)
        if objects is None:
            return await super().get(key, prototype, byte_range)
        try:
            return _served(objects.get(key), prototype, byte_range)
        except FileNotFoundError:
            return None


def _served(data: bytes, prototype: BufferPrototype | None, byte_range: ByteRequest | None) -> Buffer:
    """Return the part of a file that zarr requests."""
    match byte_range:
        case RangeByteRequest(start, end):
            data = data[start:end]
        case OffsetByteRequest(offset):
            data = data[offset:]
        case SuffixByteRequest(suffix):
            data = data[-suffix:]
    if prototype is None:
        prototype = zarr.core.buffer.default_buffer_prototype()
    return prototype.buffer.from_bytes(data)


class _Verifying(LocalStore):
    """A store that checks each chunk file once against its record, before serving any byte of it."""

    expected: Mapping[str, tuple[int, int]]
    held: tuple[str, bytes] = ("", b"")

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        if key.endswith("zarr.json"):
            # zarr also requests metadata that does not exist. Recorded metadata has to match its record.
            if key not in self.expected:
                return await super().get(key, prototype, byte_range)
            data = verified_bytes(Path(self.root), key, self.expected)
        else:
            if self.held[0] != key:
                self.held = (key, verified_bytes(Path(self.root), key, self.expected))
            data = self.held[1]
        return _served(data, prototype, byte_range)


def verified_bytes(root: Path, key: str, expected: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the bytes of one chunk file, or raise `DamagedStoreError` with store and file."""
    advice = "run `make verify` to find all damage and `make repair` to make only these again"
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


def chunks_of(root: Path, key: str) -> Objects | None:
    """Return the objects that hold a file below a folder, if it is a chunk on object storage; else None."""
    return objects_of(root) if "/c/" in key else None


def stored_bytes(root: Path, key: str) -> bytes:
    """Return the bytes of a file below a folder, from disk or object storage. Raises `OSError`."""
    objects = chunks_of(root, key)
    return (root / key).read_bytes() if objects is None else objects.get(key)


class Reader:
    """A verified reader of a store: `reader["activation"][0:64]`.

    `files` maps chunk files, relative to the store, to (size, crc32c), as in a manifest or ledger.
    """

    def __init__(self, path: Path, files: Mapping[str, tuple[int, int]]) -> None:
        store = _Verifying(path, read_only=True)
        store.expected = files
        why = None
        try:
            self.group = zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
        except (FileNotFoundError, ValueError, KeyError) as error:
            why = str(error)
        if why is not None:  # outside the handler, without a context: zarr's errors cannot return from a worker
            raise DamagedStoreError(f"{path}: not a readable zarr store ({why})")
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


class Ledger:
    """The record of a store's finished shards: one line per shard, appended once the shard's files are in place.

    A line is JSON {shard, id, files, ...} and its crc32c. `id` is the digest of the shard's inputs: an entry with
    another id is stale. A line that is damaged, or truncated by a crash, counts as absent, and the shard is recomputed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, dict] = {}
        self._listed: dict[str, int] | None = None
        try:
            lines = path.read_bytes().splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            body, _, crc = line.rpartition(b"\t")
            if crc.isdigit() and crc32c(body) == int(crc):
                entry = json.loads(body)
                self.entries[entry["shard"]] = entry

    def get(self, shard: str, id: str, store: Path) -> dict | None:
        """Return a shard's entry if it has this id and its files exist with the right sizes; else None."""
        entry = self.entries.get(shard)
        if entry is None or entry["id"] != id:
            return None
        return entry if all(self._size(store, name) == size for name, (size, _) in entry["files"].items()) else None

    def _size(self, store: Path, name: str) -> int | None:
        """Return the bytes of a file of the store, None if it is missing; objects are listed once."""
        objects = chunks_of(store, name)
        if objects is not None:
            if self._listed is None:
                self._listed = objects.sizes()
            return self._listed.get(name)
        try:
            return (store / name).stat().st_size
        except OSError:
            return None

    def record(self, shard: str, id: str, files: Files, **facts: Any) -> dict:
        entry = {"shard": shard, "id": id, "files": {k: list(v) for k, v in files.items()}, **facts}
        body = json.dumps(entry, sort_keys=True).encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            # A crash may have left half a line: start a new one.
            if file.tell() and not self._ends_with_newline():
                file.write(b"\n")
            file.write(body + b"\t" + str(crc32c(body)).encode() + b"\n")
        self.entries[shard] = entry
        self._listed = None
        return entry

    def clear(self) -> None:
        """Forget all entries, for a store that was removed."""
        self.path.unlink(missing_ok=True)
        self.entries.clear()

    def _ends_with_newline(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"

    def files(self, shards: Iterable[str]) -> Files:
        """Return all chunk files of these shards with size and crc32c."""
        return {name: (s[0], s[1]) for shard in shards for name, s in self.entries[shard]["files"].items()}


def remove_partials(path: Path) -> None:
    """Remove temporary files and folders that a killed writer left in a store."""
    for left in list(path.rglob("*.partial")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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
