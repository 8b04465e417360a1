"""Faults in files: what a failing disk, an interrupted copy or a careless hand do to stores, manifests and ledgers."""

import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import folder
from case import BrokenPromiseError, Case, Outcome, some


def flipped(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if data:
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    _replace(path, bytes(data))


def truncated(path: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    _replace(path, data[: draw.randrange(len(data))] if data else data)


def emptied(path: Path, _: random.Random) -> None:
    _replace(path, b"")


def deleted(path: Path, _: random.Random) -> None:
    path.unlink()


def garbled(path: Path, draw: random.Random) -> None:
    """Other bytes, as many as there were."""
    _replace(path, draw.randbytes(path.stat().st_size))


def _replace(path: Path, data: bytes) -> None:
    """New bytes under the old time: what damages silently changes no time."""
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


KINDS: dict[str, Callable[[Path, random.Random], None]] = {
    kind.__name__: kind for kind in (flipped, truncated, emptied, deleted, garbled)
}
SWAPPED = "swapped"


def groups(results: Path) -> dict[str, list[str]]:
    """The files that manifests name, by what they are: `images.zarr/image`, `iou.zarr zarr.json`, `units.csv`, ...

    Arrays in groups of a store, those of a layer each, are of one kind (`ablation.zarr/all`), and so are the pictures
    of units; a store that is called by the id of a layer is named by its folder.
    """
    found: dict[str, set[str]] = {}
    for name, manifest in folder.manifests(results).items():
        base = Path(name).parent.parent
        for file in manifest["files"]:
            parts = Path(file).parts
            at = next((i for i, part in enumerate(parts) if part.endswith(".zarr")), None)
            if at is None:
                suffix = Path(file).suffix
                group = parts[-1]
                if parts[0] in ("figures", "tables") or suffix == ".jpg":
                    group = f"{parts[0]} all{suffix}"
            else:
                store = parts[at - 1] if at and re.fullmatch("[0-9a-f]{20}.*", parts[at]) else parts[at]
                if parts[-1] == "zarr.json":
                    group = f"{store} zarr.json"
                else:
                    array = parts[at + 1 : parts.index("c", at)]
                    group = f"{store}/{array[0] if len(array) == 1 else 'all'}"
            found.setdefault(group, set()).add((base / file).as_posix())
    return {group: sorted(files) for group, files in sorted(found.items())}


def damage(case: Case, kind: str, files: Sequence[str]) -> list[str]:
    """Damage one of these files, or exchange two of them that differ; return which."""
    chosen = [case.random.choice(files)]
    if kind == SWAPPED:
        own = (case.results / chosen[0]).read_bytes()
        chosen.append(case.random.choice([name for name in files if (case.results / name).read_bytes() != own]))
    paths = [case.results / name for name in chosen]
    if kind == SWAPPED:
        first, second = (path.read_bytes() for path in paths)
        _replace(paths[0], second)
        _replace(paths[1], first)
    else:
        KINDS[kind](paths[0], case.random)
    return [name for name in chosen if _differs(case, name)]


def _differs(case: Case, name: str) -> bool:
    """Whether a file is not there or holds other bytes than the undisturbed one."""
    path = case.results / name
    return not path.exists() or path.read_bytes() != (case.undisturbed / name).read_bytes()


def kind_for(results: Path, files: Sequence[str], number: int) -> str:
    """One kind of damage after another; files are only exchanged where two of them differ."""
    kinds = [*KINDS, SWAPPED]
    kind = kinds[number % len(kinds)]
    if kind == SWAPPED and len({(results / name).read_bytes() for name in files}) == 1:
        return kinds[0]
    return kind


def refused(case: Case, group: str, kind: str) -> Outcome:
    """A damaged file, when what reads it runs again"""
    files = groups(case.undisturbed)[group]
    folder.copy(case.undisturbed, case.results)
    readers = _forget_readers(case, files[0])
    damaged = damage(case, kind, files)
    running = case.start()
    said = case.end(running)
    left = [name for name in damaged if _differs(case, name)]
    _verified(case, left)
    if running.process.returncode:
        if "Traceback" in said:
            raise BrokenPromiseError(f"a traceback in place of an error:\n{said[-3000:]}")
        # A store's name and the chunk's, or the file's.
        words = [(store, re.sub(r".*/(?=[^/]+/c/)", "", chunk)) for store, chunk in map(_store_and_chunk, damaged)]
        if not any(all(word in said for word in pair) for pair in words):
            raise BrokenPromiseError(f"the error names none of {words}:\n{said[-3000:]}")
        happened = f"refused by name when {readers} ran again"
    else:
        found = folder.contents(case.results)
        other = sorted(name for name in case.truth if found.get(name) != case.truth[name] and name not in damaged)
        if other:
            raise BrokenPromiseError(f"damage in {damaged} was used in silence: {some(other)} differ")
        if not left:
            return Outcome(f"written again when {readers} ran again", "", case.same())
        happened = "nothing reads it"
    return Outcome(f"{happened}; verify found {', '.join(map(_short, damaged))} and nothing else", "", "see `repair`")


def _forget_readers(case: Case, file: str) -> str:
    """Remove what was made from this file, as far as manifests tell; return which stages that is."""
    known = folder.manifests(case.results)
    owners = {n for n, m in known.items() if file in {(Path(n).parent.parent / f).as_posix() for f in m["files"]}}
    including = {name for name, m in known.items() if owners & {*m["includes"]}}
    readers = {name for name, m in known.items() if (owners | including) & {*m["parents"]}}
    stages = [stage for stage in folder.steps(case.undisturbed) if stage in {known[name]["stage"] for name in readers}]
    folder.forget(case.results, stages)
    for name in including:
        (case.results / name).unlink(missing_ok=True)
    return ", ".join(stages)


def _store_and_chunk(name: str) -> tuple[str, str]:
    parts = Path(name).parts
    at = next((i for i, part in enumerate(parts) if part.endswith(".zarr")), len(parts) - 1)
    return parts[at], "/".join(parts[at + 1 :])


def _short(name: str) -> str:
    return " ".join(filter(None, _store_and_chunk(name)))


def _verified(case: Case, damaged: Sequence[str]) -> None:
    """`verify` must find these files and no other."""
    code, lines = case.upkeep("verify")
    missed = [name for name in damaged if not any(str(case.results / name) in line for line in lines)]
    wrong = [line for line in lines if not any(str(case.results / name) in line for name in damaged)]
    if damaged and (missed or wrong or code == 0):
        raise BrokenPromiseError(f"verify (exit status {code}) missed {missed} and reports {wrong}")


def repair(case: Case, _: str) -> Outcome:
    """One file of every kind damaged, each in another way; `make repair`"""
    return _repair(case, [files for group, files in groups(case.undisturbed).items() if "zarr.json" not in group])


def repair_metadata(case: Case, _: str) -> Outcome:
    """One zarr.json of every store damaged, each in another way; `make repair`"""
    return _repair(case, [files for group, files in groups(case.undisturbed).items() if "zarr.json" in group])


def _repair(case: Case, chosen: Sequence[Sequence[str]]) -> Outcome:
    folder.copy(case.undisturbed, case.results)
    damaged = []
    for at, files in enumerate(chosen):
        damaged += damage(case, kind_for(case.undisturbed, files, at), files)
    _verified(case, damaged)
    before = folder.Finished.of(case.results)
    case.upkeep("repair")
    case.end(case.start(), 0)
    after = folder.Finished.of(case.results)
    same = case.same()
    again = {key for key in before.shards if after.shards.get(key) != before.shards[key]}
    broken = {key for key in before.shards if _of_shard(case, key) & set(damaged)}
    if unneeded := again - broken:
        raise BrokenPromiseError(f"made again without need: {some(sorted(map(str, unneeded)))}")
    code, lines = case.upkeep("verify")
    if code:
        raise BrokenPromiseError(f"verify after repair: {lines}")
    return Outcome(
        f"verify found these {len(damaged)} files and no other; {len(again)} shards were made again",
        f"{len(before.shards) - len(again)} of {len(before.shards)} shards: all others",
        same,
    )


def _of_shard(case: Case, key: tuple[str, str]) -> set[str]:
    ledger, shard = key
    store = Path(ledger).with_suffix(".zarr")
    return {(store / name).as_posix() for name in folder.entries(case.undisturbed / ledger)[shard]["files"]}


def manifest(case: Case, stage: str, kind: str) -> Outcome:
    """A damaged manifest"""
    folder.copy(case.undisturbed, case.results)
    names = [name for name, found in folder.manifests(case.results).items() if found["stage"] == stage]
    (name,) = damage(case, kind, names)
    _verified(case, [name] if (case.results / name).exists() else [])
    before = folder.Finished.of(case.results)
    running = case.start()
    said = case.end(running)
    happened = "it counted as absent; its step was done again"
    if running.process.returncode:
        if "Traceback" in said or Path(name).name not in said:
            raise BrokenPromiseError(f"exit status {running.process.returncode} does not name {name}:\n{said[-3000:]}")
        case.upkeep("repair")
        case.end(case.start(), 0)
        happened = "refused by name; then `make repair`"
    elif kind != "deleted" and Path(name).name not in said:
        raise BrokenPromiseError(f"nothing was said of {name}, which was {kind}")
    after = folder.Finished.of(case.results)
    again = {key for key, state in before.shards.items() if after.shards.get(key) != state}
    if again:
        raise BrokenPromiseError(f"shards were made again: {some(sorted(map(str, again)))}")
    return Outcome(happened, f"all {len(before.shards)} shards", case.same())


def ledger(case: Case, name: str, kind: str) -> Outcome:
    """A damaged ledger, when its stage runs again"""
    names = [path.relative_to(case.undisturbed).as_posix() for path in case.undisturbed.rglob(f"{name}.ledger")]
    chosen = case.random.choice(sorted(names))
    of = chosen.removesuffix(".ledger")  # a store, or a folder with one for each entry
    owners = [m for n, m in folder.manifests(case.undisturbed).items() if _owns(n, m, (f"{of}.zarr/", f"{of}/"))]
    stage = {"activations": "extract"}.get(owners[0]["stage"], owners[0]["stage"])
    case.without(stage, stores=False)
    damage(case, kind, [chosen])
    before = folder.Finished.of(case.results)
    outcome = case.goes_on(before)
    outcome.happened = "what the ledger has lost was made again"
    outcome.kept = f"{len(before.shards)} of {len(folder.Finished.of(case.undisturbed).shards)} shards"
    return outcome


def _owns(name: str, found: dict, below: tuple[str, ...]) -> bool:
    return any((Path(name).parent.parent / file).as_posix().startswith(below) for file in found["files"])


def after_power_cut(case: Case, stage: str) -> Outcome:
    """Power cut: everything gone, and the files written last are empty"""
    case.without(stage)
    running = case.start()
    case.moment(running, stage)
    running.kill_all()
    kept = folder.Finished.of(case.results)
    chunks = [path for path in folder.files(case.results) if "/c/" in path.as_posix()]
    chunks = sorted(chunks, key=lambda path: path.stat().st_mtime_ns)[-6:]
    for path in chunks:
        emptied(path, case.random)
    lost = {path.relative_to(case.results).as_posix() for path in chunks}
    finished = {
        name
        for name, found in folder.manifests(case.results).items()
        if lost & {(Path(name).parent.parent / file).as_posix() for file in found["files"]}
    }
    kept.shards = {key: state for key, state in kept.shards.items() if not _of_shard(case, key) & lost}
    kept.manifests = {name: state for name, state in kept.manifests.items() if name not in finished}
    if finished:  # they were written to the disk before their chunks were
        case.upkeep("repair")
    outcome = case.goes_on(kept)
    after = "`make repair` and the next run" if finished else "the next run"
    outcome.happened = f"{len(chunks)} chunk files were empty; {after} made them again"
    return outcome
