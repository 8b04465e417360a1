"""The files of a folder with their sizes and times, walked once and cached until a folder changes.

Walking 1.3 million files takes seconds, so it happens once and not at every start.
"""

import hashlib
import json
import os
import stat
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.errors import MicrotomeError

CACHE_FROM = 20_000  # fewer files are listed again every time: it takes a moment and also sees files changed in place
CACHE_VERSION = 3
SYSTEM = frozenset(  # folders and files that systems, editors and disk stations put beside images; no user named them
    (
        "__MACOSX", "@eaDir", "@Recycle", "@Recently-Snapshot", "@tmp", "#recycle", "#snapshot", "#SynoRecycle",
        "$RECYCLE.BIN", "RECYCLER", "System Volume Information", "lost+found", "Thumbs.db", "ehthumbs.db",
        "desktop.ini", "Icon\r", "Network Trash Folder", "Temporary Items", "__pycache__",
    )
)  # fmt: skip
CACHE_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error)
SETTLED_NS = 2_000_000_000  # a folder changed just before it was listed may change again within one tick of its clock
ABSENT = (-1, -1)


@dataclass
class Files:
    """Files below a folder, in the order of their names (relative, with `/`), and the folders they lie in.

    size, mtime_ns: int64; -1 if a file is a broken link, a pipe, or the like, or is missing.
    folders: relative name ("" for the folder itself) -> (mtime_ns, inode), read before the folder was.
    hidden: number of skipped names: those that start with a dot, and those of `SYSTEM`.
    """

    names: list[str]
    size: np.ndarray
    mtime_ns: np.ndarray
    folders: dict[str, tuple[int, int]]
    hidden: int


@dataclass(frozen=True)
class Named:
    """The files of a folder that `table` lists, in order; all others are ignored."""

    table: Path
    names: Sequence[str]


def snapshot(root: Path | str, cache: Path | None = None, rescan: bool = False, named: Named | None = None) -> Files:
    """Return the files below `root`, from `cache` if it holds more than 20,000 and no folder has changed since.

    A folder changes when a name in it is added, removed or replaced. A file that is written in place, or behind a link,
    changes no folder: `rescan` lists again in any case.

    cache: a folder with one file per root (and table), or None. A cache that is damaged or cannot be written counts as
        None.
    """
    table = named.table if named else None
    wanted = _digest_of_names(named)
    if not rescan and unchanged(root, cache, table) is not None:
        known = _read_cache(_cache_path(root, cache, table), wanted)
        if known is not None:
            return known
    started = time.time_ns()
    files = scan(root) if named is None else look_up(root, named.names)
    settled = all(mtime_ns < started - SETTLED_NS for mtime_ns, _ in files.folders.values())
    if cache is not None and len(files.names) > CACHE_FROM and settled:
        _write_cache(_cache_path(root, cache, table), files, wanted)
    return files


def unchanged(root: Path | str, cache: Path | None, table: Path | None = None) -> str | None:
    """Return a digest of the files that `snapshot` would take from its cache; None if it would list again.

    It reads the folders' times and no names, so a result that is cached under this digest makes starting fast. With
    `table`, the caller has to know whether the table still names the same files.
    """
    try:
        with _cache_path(root, cache, table).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
        same = header["version"] == CACHE_VERSION and all(
            _folder_stamp(root, name) == tuple(stamp) for name, stamp in header["folders"].items()
        )
        return header["sha256"] if same else None
    except CACHE_ERRORS:
        return None


def stamp(path: Path) -> list[int] | None:
    """Return size, time and inode of a file, or None if it is missing. While they stay, so does the content."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def look_up(root: Path | str, names: Sequence[str]) -> Files:
    """Return the named files below `root`, whatever their type; a missing one has size and time -1.

    Raises `MicrotomeError` if the root itself cannot be read.
    """
    base = os.fspath(root)
    try:
        Path(base).stat()
    except OSError as error:
        raise MicrotomeError(f"cannot read the folder {base}: {error.strerror or error}") from error
    folders = {folder: _folder_stamp(base, folder) for folder in sorted({name.rpartition("/")[0] for name in names})}
    stamps = np.empty((len(names), 2), np.int64)
    for at, name in enumerate(names):
        stamps[at] = _path_stamp(f"{base}/{name}")
    return Files(list(names), stamps[:, 0].copy(), stamps[:, 1].copy(), folders, 0)


def scan(root: Path | str) -> Files:
    """Walk `root` and return its files, whatever their type; follow links, skip hidden names and those of `SYSTEM`.

    Raises `MicrotomeError` if a folder is missing or cannot be read, and if links lead to one folder twice: images
    would be counted twice, or the walk would never end.
    """
    base = os.fspath(root)
    names: list[str] = []
    stamps: list[tuple[int, int]] = []
    folders: dict[str, tuple[int, int]] = {}
    seen: dict[tuple[int, int], str] = {}
    hidden = 0
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        try:
            status = Path(base, folder).stat()
            first = seen.setdefault((status.st_dev, status.st_ino), folder)
            if first != folder:
                raise MicrotomeError(
                    f"links in {base} lead to one folder twice: {first!r} and {folder!r}; remove one of them"
                )
            entries = os.scandir(f"{base}/{folder}")
        except OSError as error:
            raise MicrotomeError(f"cannot read the folder {base}/{folder}: {error.strerror or error}") from error
        folders[folder] = (status.st_mtime_ns, status.st_ino)
        prefix = f"{folder}/" if folder else ""
        with entries:
            for entry in entries:
                name = entry.name
                if name[0] == "." or name in SYSTEM:
                    hidden += 1
                elif _is_folder(entry):
                    waiting.append(prefix + name)
                else:
                    names.append(prefix + name)
                    stamps.append(_file_stamp(entry))
    order = sorted(range(len(names)), key=names.__getitem__)
    columns = np.array(stamps, np.int64).reshape(-1, 2)[order]
    return Files([names[i] for i in order], columns[:, 0].copy(), columns[:, 1].copy(), folders, hidden)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _file_stamp(entry: os.DirEntry) -> tuple[int, int]:
    try:
        if entry.is_file():
            status = entry.stat()
            return status.st_size, status.st_mtime_ns
    except OSError:  # removed since, or a loop of links
        pass
    return -1, -1


def _path_stamp(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)  # noqa: PTH116 - 1.3 million of them
    except (OSError, ValueError):  # missing, a loop of links, a null character
        return ABSENT
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ABSENT


def _folder_stamp(root: Path | str, name: str) -> tuple[int, int]:
    try:
        status = Path(root, name).stat()
    except OSError:
        return ABSENT
    return status.st_mtime_ns, status.st_ino


def _cache_path(root: Path | str, cache: Path | None, table: Path | None = None) -> Path:
    if cache is None:
        raise FileNotFoundError("no cache")
    key = os.fsencode(Path(root).absolute())
    if table is not None:
        key += b"\0" + os.fsencode(table.absolute())
    return cache / f"{hashlib.sha256(key).hexdigest()[:20]}.listing.npz"


def _digest_of_names(named: Named | None) -> str:
    """Return a digest that tells two contents of one table apart; without a table, the folders' times do."""
    return "" if named is None else hashlib.sha256("\0".join(named.names).encode()).hexdigest()


def _write_cache(path: Path, files: Files, wanted: str) -> None:
    names = json.dumps(files.names).encode("ascii")  # its escapes keep names that are not UTF-8
    content = hashlib.sha256(names)
    for numbers in (files.size, files.mtime_ns):
        content.update(numbers.astype("<i8").tobytes())
    header = {
        "version": CACHE_VERSION,
        "sha256": content.hexdigest(),
        "names": wanted,
        "folders": files.folders,
        "hidden": files.hidden,
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(
                file,
                header=np.frombuffer(json.dumps(header).encode("ascii"), np.uint8),
                names=np.frombuffer(names, np.uint8),
                size=files.size,
                mtime_ns=files.mtime_ns,
            )
        temporary.replace(path)
    except OSError:
        return  # the next run lists again


def _read_cache(path: Path, wanted: str) -> Files | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if header["names"] != wanted:
                return None
            names = json.loads(stored["names"].tobytes())
            size, mtime_ns = stored["size"], stored["mtime_ns"]
        folders = {name: (mtime, inode) for name, (mtime, inode) in header["folders"].items()}
        hidden = header["hidden"]
    except CACHE_ERRORS:
        return None
    return Files(names, size, mtime_ns, folders, hidden) if len(names) == len(size) == len(mtime_ns) else None
