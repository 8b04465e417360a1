"""Make the plan of a configuration: every stage of the registry asks for its steps, and each gets its id."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.config.base import UNTRAINED
from pipeline.config.core import Core
from pipeline.config.networks import Network
from pipeline.data import kinds
from pipeline.data.kinds import Summary
from pipeline.errors import about
from pipeline.networks import published
from pipeline.plan.stage import Copy, Draft, Stage, Wanted
from pipeline.plan.step import Key, Plan, Step, scratch_of
from pipeline.run import experiment
from pipeline.stages.registry import STAGES
from pipeline.storage import object_storage
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import FileDigests, digest


def make(config: Core, rescan: bool = False, arguments: Sequence[str] = ()) -> Plan:
    """Compute every step of a configuration. Reads listings, checkpoints and module files (through memories)."""
    scratch = scratch_of(config)
    digests = FileDigests(scratch / "files.json")
    object_storage.settle(Path(config.results), config.stores)
    config = published.resolve(config, scratch, digests)
    draft = Draft(config, summaries(config, rescan), digests, stages=STAGES)
    add_networks(draft, STAGES.values())
    for stage in STAGES.values():
        for wanted in stage.steps(draft):
            step = step_of(stage, wanted, config.name)
            draft.steps[step.manifest] = step
    digests.save()
    splits = {name: summary.splits for name, summary in draft.summaries.items()}
    return Plan(config, draft.steps, draft.networks, draft.originals, splits, tuple(arguments))


def summaries(config: Core, rescan: bool) -> dict[str, Summary]:
    """Return what the listing of each data set says."""
    found = {}
    for name, dataset in config.datasets.items():
        with about(f"data set {name!r}"):
            found[name] = kinds.summary(dataset, scratch_of(config), STAGES["ingest"].version, rescan)
    return found


def step_of(stage: Stage, wanted: Wanted, config: str) -> Step:
    """Return a step with its id: the digest of its settings, the stage's version and what it reads."""
    read = [parent.id for parent in wanted.parents] if wanted.read is None else list(wanted.read)
    settings = wanted.settings.written() | {"version": stage.version, "parents": read}
    settings = json.loads(json.dumps(settings))  # as a manifest will hold it
    id = digest(settings)
    parents = tuple(parent.manifest for parent in wanted.parents)
    return Step(stage.name, id, stage.manifest(wanted.key, config, id), wanted.key, parents, settings)


def add_networks(draft: Draft, stages: Iterable[Stage]) -> None:
    """Add every network, followed by its untrained control, and the copies that stages ask for."""
    for name, spec in draft.config.networks.items():
        draft.networks[name] = spec
        if (control := control_of(spec)) is not None:
            draft.networks[name + UNTRAINED] = control
            draft.originals[name + UNTRAINED] = name
    for stage in stages:
        copies: dict[str, Copy] = dict(stage.networks(draft)) if stage.networks is not None else {}
        draft.networks |= {name: copy.network for name, copy in copies.items()}
        draft.originals |= {name: copy.original for name, copy in copies.items()}


def control_of(spec: Network) -> Network | None:
    """Return the untrained control of a network; one that is random already is its own."""
    if spec.weights == "random":
        return None
    # A model of transformers needs its folder for the architecture, too.
    local = spec.local if spec.transformers is not None else None
    untrained = {"weights": "random", "train": None, "prefix": None, "ablate": None, "local": local}
    return spec.model_copy(update=untrained)


def save(plan: Plan) -> Path:
    """Write a plan for the jobs of a run; return its file."""
    body = json.dumps(
        {
            "config": plan.config.model_dump(),
            "steps": [asdict(step) for step in plan.steps.values()],
            "networks": {name: spec.model_dump() for name, spec in plan.networks.items()},
            "originals": dict(plan.originals),
            "splits": {name: dict(counts) for name, counts in plan.splits.items()},
            "arguments": plan.arguments,
        }
    )
    path = plan.scratch / "plans" / f"{plan.config.name}.{digest(body)}.json"
    if not path.exists():
        write_atomically(path, body)
        path.chmod(0o600)  # it holds paths as they were configured, of keys too
    return path


def read(path: Path) -> Plan:
    """Read a plan that was saved."""
    value = json.loads(path.read_text())
    steps = [Step(**{**step, "key": Key(**step["key"]), "parents": tuple(step["parents"])}) for step in value["steps"]]
    return Plan(
        experiment.parse(value["config"]),
        {step.manifest: step for step in steps},
        {name: Network.model_validate(spec) for name, spec in value["networks"].items()},
        value["originals"],
        value["splits"],
        tuple(value["arguments"]),
    )
