"""Verified reading of stores, tables and JSON files that stages wrote."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import zarr

from pipeline.errors import MicrotomeError
from pipeline.storage.engine import Located
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import recorded, recorded_files
from pipeline.storage.store import Reader


class Store(Protocol):
    """A zarr store opened for reading."""

    @property
    def attrs(self) -> Mapping[str, Any]: ...

    def __getitem__(self, name: str) -> Any: ...


def open_store(path: Path) -> Store:
    """Open a zarr store for reading. The report reads stores only through this function.

    Chunks are verified if a manifest lists them.
    """
    recorded = recorded_files(path)
    if recorded:
        return Reader(path, recorded)
    try:
        return zarr.open_group(Located(path, read_only=True), mode="r", use_consolidated=False)
    except FileNotFoundError:
        raise MicrotomeError(f"there is no store {path}; dissect the network") from None


def read_json(file: Path) -> dict[str, Any]:
    with read_text(file) as stream:
        try:
            content = json.load(stream)
        except json.JSONDecodeError as error:
            raise MicrotomeError(f"{file} is not JSON ({error}); recompute it") from None
    if not isinstance(content, dict):
        raise MicrotomeError(f"{file} holds a {type(content).__name__}, a JSON object was expected; recompute it")
    return content


def read_text(file: Path) -> IO[str]:
    """Return a table or JSON file as a text stream, after checking it against its manifest."""
    written = recorded(file)
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        todo = "run `make repair`" if written else "dissect the network first"
        raise MicrotomeError(f"there is no {file}; {todo}") from None
    if written is not None and written != (len(data), crc32c(data)):
        raise MicrotomeError(
            f"{file} is not what was written; run `make verify` to find all damage and `make repair` to make only "
            f"these again"
        )
    try:
        return io.StringIO(data.decode(), newline="")
    except UnicodeDecodeError as error:
        raise MicrotomeError(f"{file} is not text in UTF-8 ({error}); recompute it") from None
