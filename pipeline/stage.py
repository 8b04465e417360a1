"""What every stage does at its end: write the manifest that proves it finished."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.manifest import Files, Manifest, remove_others

if TYPE_CHECKING:
    from pipeline.plan import Plan, Step

PACKAGES = ("torch", "torchvision", "numpy", "numba", "zarr", "dask", "snakemake")


def begin(plan: Plan, step: Step) -> float:
    """Remove the manifests that describe what this step is about to rewrite; return the time it began."""
    remove_others((plan.results / step.manifest).parent, step.stage)
    return time.time()


def finish(
    plan: Plan,
    step: Step,
    began: float,
    digest: str,
    files: Files,
    result: Mapping[str, Any] | None = None,
    includes: Mapping[str, str] | None = None,
) -> Manifest:
    """Write the manifest of a finished step. `files` are relative to the folder that holds `done/`."""
    manifest = Manifest(
        stage=step.stage,
        id=step.id,
        digest=digest,
        parents={path: plan.manifest(plan.steps[path]).digest for path in step.parents},
        files=files,
        includes=includes or {},
        result=result or {},
        settings=step.settings,
        provenance=provenance() | {"began": began, "seconds": round(time.time() - began, 3)},
    )
    manifest.write(plan.results / step.manifest)
    return manifest


def within(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """The same files, named from one folder further up."""
    return {f"{folder}/{name}": value for name, value in files.items()}


def below(folder: str, files: Mapping[str, tuple[int, int]]) -> Files:
    """The files of one folder, named from within it."""
    return {name[len(folder) + 1 :]: value for name, value in files.items() if name.startswith(folder + "/")}


@functools.cache
def provenance() -> dict[str, Any]:
    """Versions and the git revision, for a reader of the result; no id depends on them."""
    root = Path(__file__).parent.parent
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
