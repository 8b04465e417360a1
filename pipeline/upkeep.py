"""Looking after a results folder: find damage, have only that made again, say why something would run, sweep up.

python -m pipeline.upkeep verify RESULTS          every chunk file against its manifest
python -m pipeline.upkeep repair RESULTS          verify, then forget the damaged files: the next run makes them
python -m pipeline.upkeep gc RESULTS [--yes]      what no network refers to, and with --yes remove it
python -m pipeline.upkeep why CONFIG              what would run, and which part of which id changed
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.identity import crc32c
from pipeline.manifest import Manifest

SCRATCH = ".microtome"


@dataclass(frozen=True)
class Damage:
    """One file that is not what its manifest says."""

    manifest: Path
    file: Path
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def manifests(results: Path) -> Iterator[Path]:
    """Every manifest of a results folder."""
    return (
        path
        for path in sorted(results.rglob("done/*.json"))
        if SCRATCH not in path.relative_to(results).parts and not path.name.startswith(".")
    )


def verify(results: Path) -> list[Damage]:
    """Compare every file that a manifest names with the size and crc32c recorded there; report each file once."""
    if not results.is_dir():
        raise MicrotomeError(f"{results}: no such results folder")
    found: dict[Path, Damage] = {}
    good: set[tuple[Path, int, int]] = set()
    for path in manifests(results):
        try:
            manifest = Manifest.read(path)
        except MicrotomeError as error:
            found[path] = Damage(path, path, str(error))
            continue
        for name, (size, crc) in manifest.files.items():
            file = path.parent.parent / name
            if file in found or (file, size, crc) in good:
                continue
            what = _compare(file, size, crc)
            if what is None:
                good.add((file, size, crc))
            else:
                found[file] = Damage(path, file, what)
    return list(found.values())


def _compare(file: Path, size: int, crc: int) -> str | None:
    try:
        data = file.read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if len(data) != size:
        return f"{len(data)} bytes, {size} were written"
    if crc32c(data) != crc:
        return f"checksum {crc32c(data):08x}, {crc:08x} was written"
    return None


def repair(results: Path) -> list[Damage]:
    """Forget every damaged file: remove it, and each manifest that names it. The next run makes only these again.

    A ledger entry whose file is gone counts as absent, so the shard is made anew; what was made from it is checked by
    id and digest, and stays where the bytes come out the same.
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
    for file in files:
        file.unlink(missing_ok=True)
    return damaged


def unreferenced(results: Path) -> list[Path]:
    """Folders that no network of any configuration refers to: layers, dissections of layers, old trainings."""
    used: set[Path] = set()
    for path in manifests(results):
        manifest = Manifest.read(path)
        for name in manifest.includes:
            layer, stem = (results / name).parent.parent, Path(name).stem
            used |= {layer, layer / stem.replace(".", "-", 1)}
        if manifest.stage == "network":
            used.add(path.parent.parent / f"training-{manifest.id}")
    found = []
    for layer in sorted(results.glob("*/layers/*/")):
        parts = sorted(layer.glob("dissect-*/"))
        found += [part for part in parts if part not in used] if layer in used else [layer]
    return found + [folder for folder in sorted(results.glob("networks/*/training-*/")) if folder not in used]


def remove(folder: Path) -> None:
    """Remove an unreferenced folder, its manifest first."""
    if folder.name.startswith("dissect-"):
        (folder.parent / "done" / f"{folder.name.replace('-', '.', 1)}.json").unlink(missing_ok=True)
    shutil.rmtree(folder)


def why(config_file: Path) -> list[str]:
    """One line a step that would run: what is missing, and which settings differ from the nearest finished one."""
    from pipeline import config, plan

    wanted = plan.make(config.load(config_file))
    lines = [f"{line} (would be set aside)" for line in plan.settle(wanted, dry=True)]
    for step in wanted.steps.values():
        path = wanted.results / step.manifest
        if path.exists():
            continue
        before = _latest(path.parent, step.stage)
        if before is None:
            lines.append(f"{step.name}: never made")
        else:
            lines += [f"{step.name}: {change}" for change in _changes(before.settings, step.settings, step.parents)]
    return lines


def _latest(done: Path, stage: str) -> Manifest | None:
    found = []
    for path in done.glob(f"{stage}.*.json"):
        try:
            found.append(Manifest.read(path))
        except MicrotomeError:
            continue
    return max(found, key=lambda manifest: manifest.provenance["began"], default=None)


def _changes(before: Any, now: Any, parents: tuple[str, ...], name: str = "") -> Iterator[str]:
    """The leaves in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            yield from _changes(before.get(key), now.get(key), parents, f"{name}.{key}" if name else key)
    elif name == "parents" and before != now:
        yield from (
            f"reads {path}, made from something else before"
            for old, new, path in zip(before, now, parents, strict=False)
            if old != new
        )
    elif before != now:
        yield f"{name}: {before!r} → {now!r}"


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.upkeep", description=__doc__)
    parser.add_argument("command", choices=["verify", "repair", "gc", "why"])
    parser.add_argument("path", type=Path)
    parser.add_argument("--yes", action="store_true", help="gc: remove")
    given = parser.parse_args(arguments)
    if given.command == "why":
        print("\n".join(why(given.path)) or "nothing would run")
        return 0
    from pipeline.lock import RunLock

    if given.command == "verify":
        damaged = verify(given.path)
        print("\n".join(map(str, damaged)) or "every file is what was written")
        return 1 if damaged else 0
    RunLock(given.path).acquire()
    if given.command == "repair":
        damaged = repair(given.path)
        print("\n".join(map(str, damaged)) or "every file is what was written")
        return 0
    total = 0
    for folder in unreferenced(given.path):
        total += (size := size_of(folder))
        print(f"{size / 1e9:8.3f} GB  {folder}")
        if given.yes:
            remove(folder)
    print(f"{total / 1e9:8.3f} GB in all {'removed' if given.yes else '(add --yes, or YES=1 with make, to remove)'}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except MicrotomeError as error:
        sys.exit(f"error: {error}")
