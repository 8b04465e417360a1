"""The zarr side of stores: it writes, verifies and serves chunk files. Only users pay for the import of zarr."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import LocalStore, MemoryStore

from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c
from pipeline.storage.layout import Array, DamagedStoreError, descriptions, remove, verified_bytes
from pipeline.storage.manifest import Files
from pipeline.storage.object_storage import Objects, chunks_of, objects_of

# Empty chunks are written: an absent all-zero chunk would look like a lost one, and the scan for such chunks is the
# write bottleneck. One thread per process: Dask workers provide the parallelism.
zarr.config.set({"array.write_empty_chunks": True, "threading.max_workers": 1, "async.concurrency": 1})

# zstd's own checksum lets any reader notice damage. The codec crc32c would break verification: a file that ends in its
# own crc32c has the same crc32c whatever it holds, so the recorded checksums, and all ids computed from them, would say
# nothing.
COMPRESSOR = ZstdCodec(level=1, checksum=True)


def create(path: Path, arrays: Mapping[str, Array], attrs: Mapping[str, Any], coordinates: Sequence[str] = ()) -> None:
    """Create a store, or bring an existing one to this layout.

    An array that differs only in shape is resized and keeps its chunks. An array with any other difference (dtype,
    byte order, codecs, fill value, chunks, dimension names) is recreated, since its chunks would be decoded otherwise
    than they were written. A lost or damaged zarr.json is rewritten beside the existing chunks: the
    ledger knows which of them are good. Metadata is consolidated, so that `xarray.open_zarr` opens the store without a
    warning.
    """
    attributes = dict(attrs)
    if coordinates:
        attributes["coordinates"] = " ".join(coordinates)
    try:
        group = zarr.open_group(LocalStore(path), mode="r+", zarr_format=3, use_consolidated=False)
        if group.metadata.zarr_format != 3:
            raise ValueError("a zarr.json of another version")
    except Exception as error:  # absent, or its zarr.json is damaged
        _reraise_refusals(error)
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
        existing = _read_array(group, name)
        if existing is None:
            (folder / "zarr.json").unlink(missing_ok=True)
        elif _description(existing) == _description(zarr.create_array(MemoryStore(), **wanted)):
            if existing.shape != array.shape:
                existing.resize(array.shape)
            return
        else:
            remove(folder)
    group.create_array(name, **wanted)


def _read_array(group: zarr.Group, name: str) -> zarr.Array | None:
    """Return an array of a store; None if its zarr.json is lost or cannot be read."""
    try:
        found = group[name]
    except Exception as error:
        _reraise_refusals(error)
        return None
    return found if isinstance(found, zarr.Array) else None


def _reraise_refusals(error: Exception) -> None:
    """Raise what the system refused; zarr raises nearly every other type of error where a zarr.json is damaged."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        raise error


def _description(array: zarr.Array) -> dict[str, Any]:
    """Return all that an array's zarr.json says, but its shape, as this version of zarr writes it."""
    written = array.metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"].to_bytes()
    return {key: value for key, value in json.loads(written).items() if key != "shape"}


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


def open_verified(path: Path, files: Mapping[str, tuple[int, int]]) -> zarr.Group:
    """Open a store whose files are checked against what was recorded; raise `DamagedStoreError` where that fails."""
    store = _Verifying(path, read_only=True)
    store.expected = files
    try:
        return zarr.open_group(store, mode="r", zarr_format=3, use_consolidated=False)
    except (FileNotFoundError, ValueError, KeyError) as error:
        why = str(error)
    # Outside, without a context: errors of zarr do not come back from a worker.
    raise DamagedStoreError(f"{path}: not a readable zarr store ({why})")
