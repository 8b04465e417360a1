"""Content ids: short digests of everything an output depends on.

The main process computes them in seconds, without importing torch.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import google_crc32c

from pipeline.errors import MicrotomeError

ID_LENGTH = 20  # hex digits: 80 bits


def digest(value: Any) -> str:
    """Return the content id of a JSON-able value: `ID_LENGTH` hex digits of the sha256 of its canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def crc32c(data: bytes) -> int:
    return int(google_crc32c.value(data))


class FileDigests:
    """A cache of sha256 file digests, by path and stamp, so that large checkpoints are read once.

    A stamp is size, mtime_ns, inode and ctime_ns. Programs can set all but the last, as `cp -p` and `tar x` do.
    The cache is a JSON file in the results folder. If it is lost, the files are read again.
    """

    def __init__(self, memory: Path) -> None:
        self.memory = memory
        try:
            known = json.loads(memory.read_bytes())
        except (OSError, ValueError):
            known = None
        self.known: dict[str, list] = known if isinstance(known, dict) else {}

    def __call__(self, path: Path | str) -> str:
        path = Path(path)
        try:
            stat = path.stat()
            key = digest(os.fspath(path.resolve()))  # hashed, so that the cache reveals no paths
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns]
            entry = self.known.get(key)
            if isinstance(entry, list) and entry[:-1] == stamp:
                return entry[-1]
            with path.open("rb") as file:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from error
        self.known[key] = [*stamp, sha256]
        return sha256

    def save(self) -> None:
        """Write the cache; ignore a results folder that is not writable."""
        from pipeline.storage.atomic import write_atomically

        try:
            write_atomically(self.memory, json.dumps(self.known))
        except OSError:
            return
