"""A results folder from outside: what its files hold, which work is finished, and how to forget some of it."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c

SCRATCH = ".microtome"


def files(results: Path) -> Iterator[Path]:
    """Every file of a results folder but caches and logs."""
    for path in results.rglob("*"):
        parts = path.relative_to(results).parts
        if path.is_file() and parts[0] != SCRATCH and "logs" not in parts:
            yield path


def beside(results: Path, pattern: str) -> Iterator[Path]:
    """Logs or manifests of jobs: those of data sets, and of networks and reports."""
    yield from results.glob(f"*/{pattern}")
    yield from results.glob(f"*/*/{pattern}")


def contents(results: Path) -> dict[str, str]:
    """Digest of every file, report included, but for what tells times.

    Of a manifest: all but times and versions; of a ledger: its shards, which stand in the order in which they were
    finished, and twice where they were made twice, when the last line counts; of a page: all but durations, which its
    manifest does not see either; of a training run: all but its seconds.
    """
    return {
        path.relative_to(results).as_posix(): hashlib.sha256(_timeless(path)).hexdigest() for path in files(results)
    }


def _tells_time(name: str) -> bool:
    return name.endswith("/seconds.json") or "/seconds/c/" in name


def _timeless(path: Path) -> bytes:
    if _tells_time(path.as_posix()):
        return b""
    if path.suffix == ".html":
        return re.sub(rb"\b[\d.,]+ (ms|s|min|h)\b", b"(a time)", path.read_bytes())
    if path.suffix == ".ledger":
        return json.dumps(entries(path), sort_keys=True).encode()
    if path.parent.name != "done" or path.suffix != ".json":
        return path.read_bytes()
    found = manifest(path) | {"provenance": None}
    pages = [name for name in found["files"] if name.endswith(".html")]
    if pages:
        found |= {"digest": None, "files": found["files"] | dict.fromkeys(pages)}
    found["files"] |= dict.fromkeys(filter(_tells_time, found["files"]))
    return json.dumps(found, sort_keys=True).encode()


def manifest(path: Path) -> dict:
    return json.loads(path.read_text())["manifest"]


def manifests(results: Path) -> dict[str, dict]:
    """Every manifest by its path in the results folder."""
    return {
        path.relative_to(results).as_posix(): manifest(path)
        for path in sorted(files(results))
        if path.parent.name == "done" and path.suffix == ".json"
    }


def revisions(results: Path) -> set[str]:
    """The revisions of the code that made the results."""
    return {found["provenance"]["revision"] for found in manifests(results).values()}


def entries(ledger: Path) -> dict[str, dict]:
    """The last whole line of every shard."""
    found = {}
    for line in ledger.read_bytes().splitlines():
        body, _, crc = line.rpartition(b"\t")
        if crc.isdigit() and google_crc32c.value(body) == int(crc):
            entry = json.loads(body)
            found[entry["shard"]] = entry
    return found


@dataclass
class Finished:
    """The work that is finished at one moment: manifests and shards, each with what shows that it was not made again.

    `shards` maps (ledger, shard) to inode and time of every file of it. `manifests` maps a path to its digest: it holds
    when its step began, and Snakemake changes its time once more when the job has ended.
    """

    manifests: dict[str, str] = field(default_factory=dict)
    shards: dict[tuple[str, str], tuple] = field(default_factory=dict)

    @staticmethod
    def of(results: Path) -> "Finished":
        found = Finished()
        for path in files(results):
            name = path.relative_to(results).as_posix()
            if path.suffix == ".ledger":
                store = path.with_suffix(".zarr")
                for shard, entry in entries(path).items():
                    found.shards[name, shard] = tuple(_state(store / file) for file in sorted(entry["files"]))
            elif path.parent.name == "done" and path.suffix == ".json":
                found.manifests[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        return found

    def lost(self, later: "Finished") -> list[str]:
        """What was finished at this moment and is another file, or none, later."""
        said = [name for name, state in self.manifests.items() if later.manifests.get(name) != state]
        return said + [
            f"{key[0]} shard {key[1]}" for key, state in self.shards.items() if later.shards.get(key) != state
        ]

    def __str__(self) -> str:
        return f"{len(self.manifests)} manifests, {len(self.shards)} shards"


def _state(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def leftovers(results: Path) -> list[str]:
    """Temporary files, and folders and addresses of workers, that no run should leave behind."""
    found = list(results.rglob("*.partial"))
    scratch = results / SCRATCH
    found += [*scratch.glob("pool-*"), *scratch.glob("dask/dask-scratch-space/*/")]
    return sorted(path.relative_to(results).as_posix() for path in found)


def copy(source: Path, target: Path) -> None:
    """Replace a results folder by a copy of another one. Times of files stay, inodes do not."""
    remove(target)
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, target, dirs_exist_ok=True)


def remove(results: Path) -> None:
    """Remove what is in a results folder; the folder itself may be a mount point."""
    for path in results.glob("*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def steps(results: Path) -> list[str]:
    """The stages whose jobs made this folder, in the order in which the first job of each began."""
    began: dict[str, float] = {}
    for found in manifests(results).values():
        if "began" in found["provenance"]:
            time = found["provenance"]["began"]
            began[found["stage"]] = min(time, began.get(found["stage"], time))
    return sorted(began, key=began.__getitem__)


def seconds(results: Path, stage: str) -> float:
    """How long the longest job of a stage took."""
    jobs = (found for found in manifests(results).values() if found["stage"] == stage)
    return max(found["provenance"].get("seconds", 0.0) for found in jobs)


def forget(results: Path, stages: Iterable[str], stores: bool = True) -> None:
    """Remove the manifests of these stages and of all that was made from them; with `stores`, their files as well.

    So the next run begins with the first of these stages.
    """
    known = manifests(results)
    gone = {name for name, found in known.items() if found["stage"] in set(stages)}
    while more := {name for name, found in known.items() if gone & {*found["parents"]}} - gone:
        gone |= more
    # Manifests of shared layers belong to whoever includes them.
    gone |= {name for one in gone for name in known[one]["includes"]}
    for name in gone:
        base = (results / name).parent.parent
        if stores:
            for file in known[name]["files"]:
                top = base / Path(file).parts[0]
                top = base / Path(*Path(file).parts[:2]) if top.name.startswith("dissect-") else top
                if top.is_dir():
                    shutil.rmtree(top)
                else:
                    top.unlink(missing_ok=True)
                top.with_suffix(".ledger").unlink(missing_ok=True)
            if known[name]["stage"] == "network":
                for training in base.glob("training-*"):
                    shutil.rmtree(training)
        (results / name).unlink(missing_ok=True)
