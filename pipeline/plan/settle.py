"""Set aside stale manifests: those whose recorded parents differ from the present ones."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from pipeline.errors import MicrotomeError
from pipeline.plan.step import Plan, Step
from pipeline.storage.manifest import Manifest


def settle(plan: Plan, dry: bool = False) -> list[str]:
    """Set aside every wanted manifest that is stale.

    Stores stay as they are: the shard ledgers decide what is recomputed. Returns one line per manifest; with `dry`,
    nothing moves.
    """
    found = outdated(plan)
    for path in found if not dry else ():
        aside = plan.scratch / "aside" / path
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(plan.results / path, aside)
    return [f"{plan.steps[path].name}: {reason}" for path, reason in found.items()]


def outdated(plan: Plan) -> dict[str, str]:
    """Return the stale manifests among the wanted ones, and why each is stale.

    A parent makes its children stale if it is missing, damaged, itself stale, or has another output digest than the
    recorded one (for example, a retrained network).
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
    """Return why a manifest is stale; None if it is not."""
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
