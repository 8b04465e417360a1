"""Find files that differ from what manifests and ledgers recorded, and forget them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import MicrotomeError
from pipeline.storage import SCRATCH
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import Files, Manifest
from pipeline.storage.store import Ledger, remove, stored_bytes

NAME = re.compile(r"[a-z][a-z0-9_]*\.[0-9a-f]{20}\.json")  # of a manifest

ATTEMPTS = 10  # to list a folder in which a run removes others


@dataclass(frozen=True)
class Damage:
    """One file that differs from its record, and the manifest or ledger that holds the record."""

    record: Path
    folder: Path
    name: str
    what: str

    @property
    def file(self) -> Path:
        return self.folder / self.name

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


@dataclass(frozen=True)
class Findings:
    """What was damaged, and the records of what a run wrote or removed while this looked: that is no damage."""

    damaged: list[Damage]
    changed: list[Path]


def manifests(results: Path) -> Iterator[Path]:
    """Yield every manifest of a results folder: other files, and what links lead to, are not ours."""
    return (
        path
        for path in _below(results, "done/*.json")
        if SCRATCH not in path.relative_to(results).parts and NAME.fullmatch(path.name) and not path.is_symlink()
    )


def verify(results: Path) -> list[Damage]:
    """Return the damage of a results folder on which nobody works."""
    return look(results).damaged


def look(results: Path) -> Findings:
    """Compare every recorded file with its size and crc32c; report each file once.

    Manifests record finished outputs; ledgers also record the shards of unfinished stores. A file that differs from a
    record that has itself changed or gone since was changed meanwhile.
    """
    found: dict[Path, Damage] = {}
    good: set[tuple[Path, int, int]] = set()
    read: dict[Path, bytes] = {}

    def compare(record: Path, folder: Path, files: Files) -> None:
        for name, (size, crc) in files.items():
            file = folder / name
            if file in found or (file, size, crc) in good:
                continue
            what = _compare(folder, name, size, crc)
            if what is None:
                good.add((file, size, crc))
            else:
                found[file] = Damage(record, folder, name, what)

    gone = []
    for path in (*manifests(results), *ledgers(results)):
        try:
            read[path] = path.read_bytes()
            if path.suffix == ".json":
                compare(path, path.parent.parent, Manifest.read(path).files)
            else:
                ledger, store = Ledger(path), path.with_suffix(".zarr")
                compare(path, store, _inside(store, ledger.files(ledger.entries)))
        except FileNotFoundError:
            gone.append(path)
        except MicrotomeError as error:
            found[path] = Damage(path, path.parent, path.name, str(error))
    records = {one.record for one in found.values()}
    changed = {path for path in records if not path.exists() or path.read_bytes() != read[path]}
    return Findings([one for one in found.values() if one.record not in changed], [*gone, *sorted(changed)])


def ledgers(results: Path) -> Iterator[Path]:
    """Yield every ledger of a results folder that stands beside a store."""
    return (path for path in _below(results, "*.ledger") if path.with_suffix(".zarr").is_dir())


def _below(results: Path, pattern: str) -> list[Path]:
    """Return what has a name like this at any depth, in order; a run may remove folders meanwhile."""
    for _ in range(ATTEMPTS):
        try:
            return sorted(results.rglob(pattern))
        except FileNotFoundError:
            continue
    raise MicrotomeError(f"{results} changes faster than it can be read: end the run that works on it, and look again")


def _inside(store: Path, files: Files) -> Files:
    """Return the chunk files inside the present shapes of their arrays.

    A ledger also knows the shards of a store that was once larger.
    """
    shapes: dict[str, list[tuple[int, int]]] = {}
    found: Files = {}
    for name, recorded in files.items():
        array, _, place = name.partition("/c/")
        if array not in shapes:
            try:
                layout = json.loads((store / array / "zarr.json").read_text())
                steps = layout["chunk_grid"]["configuration"]["chunk_shape"]
                shapes[array] = list(zip(layout["shape"], steps, strict=True))
            except (OSError, ValueError, KeyError):  # the metadata are damaged: then check every chunk
                shapes[array] = []
        if all(int(at) * step < length for at, (length, step) in zip(place.split("/"), shapes[array], strict=False)):
            found[name] = recorded
    return found


def _compare(folder: Path, name: str, size: int, crc: int) -> str | None:
    try:
        data = stored_bytes(folder, name)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if len(data) != size:
        return f"{len(data)} bytes, {size} were written"
    if crc32c(data) != crc:
        return f"checksum {crc32c(data):08x}, {crc:08x} was written"
    return None


def repair(results: Path) -> list[Damage]:
    """Forget every damaged file: remove it, and each manifest that names it. The next run recomputes only these.

    A ledger entry whose file is gone counts as absent, so the shard is recomputed. Its children are checked by id and
    digest, and stay if the recomputed bytes are the same.
    """
    damaged = verify(results)
    files = {damage.file for damage in damaged}
    for path in manifests(results):
        try:
            names = Manifest.read(path).files
        except MicrotomeError:
            path.unlink()
            continue
        if any(path.parent.parent / name in files for name in names):
            path.unlink()
    for one in damaged:
        remove(one.folder, one.name)
    return damaged
