"""Manifests: the proof that a stage is finished, and of what its files were when it finished.

A manifest is `done/<stage>.<id>.json` beside the stores it describes. Its name carries the content id of all that the
output depends on; inside stand the output's digest, the manifests it was made from with *their* digests, and size and
crc32c of every file. It is written last and atomically, and removed before anything it describes is rewritten.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c

Files = dict[str, tuple[int, int]]  # path relative to the manifest's base folder → (size, crc32c)


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself.

    `digest` is the identity of the *output* (equal outputs have equal digests, whatever they were made from);
    `parents` maps manifest paths, relative to the results folder, to the output digests that were read; `includes`
    does the same for the manifests of shared layers that the output refers to;
    `result` holds the small facts that later stages need without opening a store.
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
        # The manifest guards everything else, so it carries its own checksum on the first line.
        write_atomically(path, f'{{"crc32c": {crc32c(body.encode())},\n"manifest": {body}}}\n')

    @staticmethod
    def read(path: Path) -> "Manifest":
        """Read a manifest; a damaged one raises `MicrotomeError` that names it, a missing one `FileNotFoundError`."""
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
    """Size and crc32c of a file, as a manifest in `done/` beside it says; None where none does."""
    for path in sorted((file.parent / "done").glob("*.json")):
        files = Manifest.read(path).files
        if file.name in files:
            return files[file.name]
    return None


def recorded_files(store: Path) -> Files:
    """Size and crc32c of the files of a store, by name within it, as the manifests say that describe it.

    Manifests stand in `done/` beside the store or one folder further up; none is no error, and the result is empty.
    """
    found: Files = {}
    for base in (store.parent, store.parent.parent):
        inside = store.relative_to(base).as_posix() + "/"
        for path in sorted((base / "done").glob("*.json")):
            files = Manifest.read(path).files
            found |= {name.removeprefix(inside): files[name] for name in files if name.startswith(inside)}
    return found


def latest(done: Path, stage: str) -> Manifest | None:
    """The newest manifest of a stage in one `done` folder; damaged ones do not count."""
    found = []
    for path in done.glob(f"{stage}.*.json"):
        with contextlib.suppress(MicrotomeError, FileNotFoundError):
            found.append(Manifest.read(path))
    return max(found, key=lambda manifest: manifest.provenance["began"], default=None)


def remove_others(done: Path, stage: str, keep: str | None = None) -> None:
    """Remove the manifests of a stage in one `done` folder, except the one with id `keep`.

    Called before a store with a plain name is rewritten: none of the old manifests describes it any longer.
    """
    for path in done.glob(f"{stage}.*.json"):
        if path.name != f"{stage}.{keep}.json":
            path.unlink(missing_ok=True)


def write_file(folder: Path, name: str, data: bytes) -> Files:
    """Write a file whole, and return what a manifest says of it: its name, size and crc32c."""
    write_atomically(folder / name, data)
    return {name: (len(data), crc32c(data))}


def within(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """The same files, named from one folder further up."""
    return {f"{folder}/{name}": value for name, value in files.items()}


def below(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """The files of one folder, named from within it."""
    return {name[len(folder) + 1 :]: value for name, value in files.items() if name.startswith(folder + "/")}


def by_shard(files: Files, store: str, arrays: Sequence[str]) -> dict[int, Files]:
    """The chunk files of some arrays of a store, by shard: each holds the images of one."""
    found: dict[int, Files] = {}
    for name, value in below(store, files).items():
        parts = name.split("/")
        if parts[0] in arrays and parts[1] == "c":
            found.setdefault(int(parts[2]), {})[name] = value
    return found


def unnamed_stores(folder: Path, stage: str) -> list[Path]:
    """Return the stores in a folder that no manifest of a stage names; none while the stage has no manifest beside it.

    What was begun and not finished may still need all of them.
    """
    finished = [Manifest.read(path) for path in (folder.parent / "done").glob(f"{stage}.*.json")]
    named = {name.partition("/")[0] for manifest in finished for name in below(folder.name, manifest.files)}
    return [store for store in sorted(folder.glob("*.zarr")) if finished and store.name not in named]
