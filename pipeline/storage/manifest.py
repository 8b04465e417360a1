"""Manifests: proof that a stage finished, and a record of its files at that time.

A manifest is `done/<stage>.<id>.json` beside the stores it describes. Its name carries the content id of everything
that the output depends on. It holds the output's digest, the manifests it was computed from with *their* digests, and
the size and crc32c of every file. A stage writes it last and atomically, and removes it before rewriting anything it
describes.
"""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c

Files = dict[str, tuple[int, int]]  # path relative to the manifest's base folder → (size, crc32c)


@dataclass(frozen=True)
class Manifest:
    """The record that a finished stage leaves.

    `digest` identifies the *output*: equal outputs have equal digests, whatever they were computed from. `parents` maps
    manifest paths, relative to the results folder, to the output digests that were read. `includes` does the same for
    the manifests of shared layers that the output refers to. `result` holds the small facts that later stages need
    without opening a store.
    """

    stage: str
    id: str
    digest: str
    parents: Mapping[str, str] = field(default_factory=dict)
    files: Files = field(default_factory=dict)
    includes: Mapping[str, str] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        body = json.dumps(self.__dict__, indent=1, sort_keys=True, ensure_ascii=False)
        # The manifest guards everything else, so its first line carries its own checksum.
        write_atomically(path, f'{{"crc32c": {crc32c(body.encode())},\n"manifest": {body}}}\n')

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read a manifest. Raises `MicrotomeError` with its path if it is damaged, `FileNotFoundError` if missing."""
        raw = path.read_text(encoding="utf-8", errors="replace")
        try:
            head, _, rest = raw.partition("\n")
            body = rest.removeprefix('"manifest": ').rstrip("\n").removesuffix("}")
            if crc32c(body.encode()) != int(head.removeprefix('{"crc32c": ').removesuffix(",")):
                raise ValueError("checksum does not match")
            value = json.loads(body)
            value["files"] = {name: (size, crc) for name, (size, crc) in value["files"].items()}
            return Manifest(**value)
        except (ValueError, TypeError, KeyError) as error:
            raise MicrotomeError(f"the manifest {path} is damaged ({error}): delete it and run again") from error


def recorded(file: Path) -> tuple[int, int] | None:
    """Return size and crc32c of a file from a manifest in `done/` beside it; None if no manifest lists the file."""
    for path in sorted((file.parent / "done").glob("*.json")):
        files = Manifest.read(path).files
        if file.name in files:
            return files[file.name]
    return None


def recorded_files(store: Path) -> Files:
    """Return size and crc32c of a store's files, by name within the store, from the manifests that list them.

    Manifests are in `done/` beside the store or one folder further up. Without any, the result is empty.
    """
    found: Files = {}
    for base in (store.parent, store.parent.parent):
        inside = store.relative_to(base).as_posix() + "/"
        for path in sorted((base / "done").glob("*.json")):
            files = Manifest.read(path).files
            found |= {name.removeprefix(inside): files[name] for name in files if name.startswith(inside)}
    return found


def latest(done: Path, stage: str) -> Manifest | None:
    """Return the newest manifest of a stage in one `done` folder, ignoring damaged ones; None if there is none."""
    found = []
    for path in done.glob(f"{stage}.*.json"):
        with contextlib.suppress(MicrotomeError, FileNotFoundError):
            found.append(Manifest.read(path))
    return max(found, key=lambda manifest: manifest.provenance["began"], default=None)


def remove_others(done: Path, stage: str, keep: str | None = None) -> None:
    """Remove the manifests of a stage in one `done` folder, except the one with id `keep`.

    Call this before rewriting a store with a plain name: the old manifests no longer describe it.
    """
    for path in done.glob(f"{stage}.*.json"):
        if path.name != f"{stage}.{keep}.json":
            path.unlink(missing_ok=True)


def write_file(folder: Path, name: str, data: bytes) -> Files:
    """Write a file atomically and return its manifest entry: name, size and crc32c."""
    write_atomically(folder / name, data)
    return {name: (len(data), crc32c(data))}


def within(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """Return the same files, named from one folder further up."""
    return {f"{folder}/{name}": value for name, value in files.items()}


def below(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """Return the files of one folder, named relative to that folder."""
    return {name[len(folder) + 1 :]: value for name, value in files.items() if name.startswith(folder + "/")}


def unnamed_stores(folder: Path, stage: str) -> list[Path]:
    """Return the stores in a folder that no manifest of a stage lists.

    Return none while the stage has no manifest: unfinished work may still need all of them.
    """
    finished = [Manifest.read(path) for path in (folder.parent / "done").glob(f"{stage}.*.json")]
    named = {name.partition("/")[0] for manifest in finished for name in below(folder.name, manifest.files)}
    return [store for store in sorted(folder.glob("*.zarr")) if finished and store.name not in named]
