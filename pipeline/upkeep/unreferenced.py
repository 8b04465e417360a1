"""Find what nothing in a results folder refers to: layers, dissections of layers, trainings, runs, manifests."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.config.core import Core
from pipeline.errors import MicrotomeError
from pipeline.plan.job import UNFINISHED, noted_in
from pipeline.run import planner
from pipeline.stages.registry import STAGES, jobs
from pipeline.storage import SCRATCH, store
from pipeline.storage.manifest import Manifest
from pipeline.upkeep.damage import manifests

OURS = re.compile(r"(?:^|-)[0-9a-f]{20}(?:\.zarr)?$")


def folders(results: Path) -> list[Path]:
    """Return our folders that nothing refers to: no manifest, and no interrupted step that will resume.

    A folder is ours if its name has an id or a ledger stands beside it, and no link leads to it: a person may keep
    folders of his own beside them.
    A damaged manifest or note raises `MicrotomeError`, since its references are unknown.
    """
    used = _begun(results)
    for path in manifests(results):
        manifest = Manifest.read(path)
        stage = STAGES.get(manifest.stage)
        if stage is not None and stage.owned is not None:
            used |= stage.owned(manifest, path)
    found = [folder for stage in STAGES.values() for folder in stage.unreferenced(results, used)]
    found = [folder for folder in found if _ours(folder) and not _linked(folder, results)]
    lost = ["aside"] if list((results / SCRATCH / UNFINISHED).glob("*.json")) else ["aside", "blocks"]
    return found + [folder for name in lost if (folder := results / SCRATCH / name).is_dir()]


def experiments(results: Path, configs: Sequence[Core]) -> list[Path]:
    """Return the folders of experiments on networks, such as attributions, that none of these configurations names.

    What an interrupted run has begun is spared. All configurations that share the folder have to be given.

    Raises
    ------
    MicrotomeError
        If a configuration has another results folder.
    """
    planned: set[Path] = set()
    for config in configs:
        if Path(config.results).resolve() != results.resolve():
            raise MicrotomeError(
                f"configuration {config.name!r} has the results folder {config.results}, not {results}"
            )
        planned |= {job.folder.resolve() for job in jobs(planner.make(config, dry=True))}
    begun = {folder.resolve() for folder in _begun(results)}
    found = []
    for stage in STAGES.values():
        if stage.place != "experiment":
            continue
        for folder in sorted(results.glob(f"*/*/{stage.folder}/*/")):
            ours = next(folder.glob(f"done/{stage.name}.*.json"), None) or next(folder.glob("*.ledger"), None)
            if ours and folder.resolve() not in planned | begun and not _linked(folder, results):
                found.append(folder)
    return found


def _ours(folder: Path) -> bool:
    return OURS.search(folder.name) is not None or folder.with_suffix(".ledger").is_file()


def _linked(folder: Path, results: Path) -> bool:
    """Return whether a link below the results folder leads to this folder."""
    below = folder.relative_to(results)
    return any((results / part).is_symlink() for part in (below, *below.parents) if part.parts)


def _begun(results: Path) -> set[Path]:
    """Return the folders of steps that began and have not finished."""
    found: set[Path] = set()
    for note in (results / SCRATCH / UNFINISHED).glob("*.json"):
        found |= {results / name for name in noted_in(note)}
    return found


def remove(folder: Path) -> None:
    """Remove an unreferenced folder, its manifest first: `done/<stage>.<id>.json` is that of `<stage>-<id>/`."""
    (folder.parent / "done" / f"{folder.name.replace('-', '.', 1)}.json").unlink(missing_ok=True)
    folder.with_suffix(".ledger").unlink(missing_ok=True)
    store.remove(folder)
