"""What every stage does at its beginning and its end, where the manifest is written that proves it finished."""

from __future__ import annotations

import functools
import json
import platform
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, remove_others, write_atomically

if TYPE_CHECKING:
    from pipeline.plan.step import Plan, Step

UNFINISHED = "unfinished"  # folder of the scratch folder: what steps that were begun refer to
PACKAGES = ("torch", "torchvision", "numpy", "numba", "zarr", "dask", "snakemake")


def begin(plan: Plan, step: Step) -> float:
    """Remove the manifests that describe what this step is about to rewrite; return the time it began."""
    remove_others((plan.results / step.manifest).parent, step.stage)
    return time.time()


def refers_to(plan: Plan, step: Step, folders: Iterable[Path]) -> None:
    """Note the folders that a step fills, so that they are not swept up before it is finished."""
    names = sorted({folder.relative_to(plan.results).as_posix() for folder in folders})
    write_atomically(_note(plan, step), json.dumps({"step": step.name, "folders": names}))


def noted(plan: Plan, step: Step) -> list[str]:
    """The folders, relative to the results, that a step had begun to fill when it was interrupted."""
    try:
        return json.loads(_note(plan, step).read_text())["folders"]
    except (OSError, ValueError):
        return []


def _note(plan: Plan, step: Step) -> Path:
    of = [step.dataset, step.network, *([step.comparison] if step.comparison else [])]
    return plan.scratch / UNFINISHED / f"{step.stage}.{digest(of)}.json"


def finish(
    plan: Plan,
    step: Step,
    began: float,
    output: str,
    files: Files,
    result: Mapping[str, Any] | None = None,
    includes: Mapping[str, str] | None = None,
    made: tuple[int, int] | None = None,
) -> Manifest:
    """Write the manifest of a finished step.

    Parameters
    ----------
    began : as `begin` returned it.
    output : digest of the output.
    files : size and crc32c of its files, relative to the folder that holds `done/`.
    result, includes : as in `Manifest`.
    made : how many shards were made now, of how many; the others were there.
    """
    manifest = Manifest(
        stage=step.stage,
        id=step.id,
        digest=output,
        parents={path: plan.manifest(plan.steps[path]).digest for path in step.parents},
        files=files,
        includes=includes or {},
        result=result or {},
        settings=step.settings,
        provenance=provenance()
        | {"began": began, "seconds": round(time.time() - began, 3)}
        | ({"made": made[0], "shards": made[1]} if made else {}),
    )
    manifest.write(plan.results / step.manifest)
    _note(plan, step).unlink(missing_ok=True)
    return manifest


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


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions and the git revision, for a reader of the result; no id depends on them."""
    root = Path(__file__).parents[2]
    try:
        git = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        git = ""
    return {
        "revision": git or "unknown",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
