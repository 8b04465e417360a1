"""(To be said.)"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import MicrotomeError
from pipeline.plan.step import Plan, Step
from pipeline.storage.manifest import Manifest


def settle(plan: Plan, dry: bool = False) -> list[str]:
    """Set aside every wanted manifest that was made from other parents than those that stand there now.

    No store is touched: the shard ledgers decide what is done again. Returns one line a manifest; with `dry` nothing is
    moved.
    """
    found = outdated(plan)
    for path in found if not dry else ():
        aside = plan.scratch / "aside" / path
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(plan.results / path, aside)
    return [f"{plan.steps[path].name}: {reason}" for path, reason in found.items()]


def outdated(plan: Plan) -> dict[str, str]:
    """The wanted manifests that are there and no longer stand for what a run would make now, and why.

    A parent that is missing, damaged, outdated, or has another output digest than the one recorded (a network trained
    again, say) takes its children with it.
    """
    gone: set[str] = set()
    digests: dict[str, str] = {}
    found: dict[str, str] = {}
    for step in plan.steps.values():
        path = plan.results / step.manifest
        try:
            manifest = Manifest.read(path)
            reason = _outdated(plan.results, step, manifest, digests, gone)
        except FileNotFoundError:
            gone.add(step.manifest)
            continue
        except MicrotomeError as error:
            reason = str(error)
        if reason is None:
            digests[step.manifest] = manifest.digest
            continue
        gone.add(step.manifest)
        found[step.manifest] = reason
    return found


def _outdated(results: Path, step: Step, manifest: Manifest, digests: Mapping[str, str], gone: set[str]) -> str | None:
    """Why a manifest no longer stands for what a run would make now; None where it does."""
    for parent in step.parents:
        if parent in gone:
            return f"{parent} is not there"
        if manifest.parents.get(parent) != digests[parent]:
            return f"{parent} has another output than the one that was read"
    for path, output in manifest.includes.items():
        try:
            if Manifest.read(results / path).digest != output:
                return f"{path} has another output than the one that was written"
        except FileNotFoundError:
            return f"{path} is not there"
    return None
