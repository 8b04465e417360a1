"""Ledgers: what of a store is written, shard by shard."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import Files
from pipeline.storage.object_storage import chunks_of


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
