"""Make the plan of a configuration: collect the steps that every stage asks for, and compute their ids."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from pipeline.config.base import UNTRAINED
from pipeline.config.core import Core
from pipeline.config.networks import Network, planned
from pipeline.data import kinds
from pipeline.data.kinds import Summary
from pipeline.errors import about
from pipeline.networks import published
from pipeline.plan.stage import Copy, Draft, Stage, Wanted
from pipeline.plan.step import Key, Plan, Step, scratch_of
from pipeline.run import experiment
from pipeline.stages.registry import STAGES
from pipeline.storage import dry_cache, object_storage
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import FileDigests, digest


def make(config: Core, rescan: bool = False, arguments: Sequence[str] = (), dry: bool = False) -> Plan:
    """Compute every step of a configuration, from listings, checkpoints and module files (read through caches).

    With `dry`, nothing is written but these caches, and a results folder that does not exist is not made.
    """
    if not dry:
        dry_cache.take_over(Path(config.results))
    scratch = dry_cache.place(Path(config.results)) if dry else scratch_of(config)
    digests = FileDigests(scratch / "files.json")
    object_storage.settle(Path(config.results), config.stores, dry)
    config = published.resolve(config, scratch, digests)
    draft = Draft(config, summaries(config, scratch, rescan), digests, stages=STAGES)
    add_networks(draft, STAGES.values())
    for stage in STAGES.values():
        for wanted in stage.steps(draft):
            step = step_of(stage, wanted, config.name)
            draft.steps[step.manifest] = step
    digests.save()
    splits = {name: summary.splits for name, summary in draft.summaries.items()}
    described = [
        line for name, made in draft.summaries.items() for line in kinds.described(name, config.datasets[name], made)
    ]
    notices = [f"{name}: {notice}" for name, made in draft.summaries.items() for notice in made.notices]
    classes = {name: summary.classes for name, summary in draft.summaries.items()}
    return Plan(
        config,
        draft.steps,
        draft.networks,
        draft.originals,
        splits,
        tuple(arguments),
        classes,
        tuple(described),
        tuple(notices),
        scratch if dry else None,
    )


def summaries(config: Core, scratch: Path, rescan: bool) -> dict[str, Summary]:
    """Return a summary of each data set's listing."""
    found = {}
    for name, dataset in config.datasets.items():
        with about(f"data set {name!r}"):
            found[name] = kinds.summary(dataset, scratch, STAGES["ingest"].version, rescan)
    return found


def step_of(stage: Stage, wanted: Wanted, config: str) -> Step:
    """Return a step with its id: the digest of its settings, its stage's version and its parents."""
    read = [parent.id for parent in wanted.parents] if wanted.read is None else list(wanted.read)
    settings = wanted.settings.written() | {"version": stage.version, "parents": read}
    settings = json.loads(json.dumps(settings))  # as a manifest will hold them
    id = digest(settings)
    parents = tuple(parent.manifest for parent in wanted.parents)
    return Step(stage.name, id, stage.manifest(wanted.key, config, id), wanted.key, parents, settings)


def add_networks(draft: Draft, stages: Iterable[Stage]) -> None:
    """Add every network, followed by its untrained control, then the copies that stages ask for."""
    for name, spec in {**draft.config.networks, **draft.config.generating()}.items():
        draft.networks[name] = spec
        if (control := control_of(spec)) is not None:
            draft.networks[name + UNTRAINED] = control
            draft.originals[name + UNTRAINED] = name
    for stage in stages:
        copies: dict[str, Copy] = dict(stage.networks(draft)) if stage.networks is not None else {}
        draft.networks |= {name: copy.network for name, copy in copies.items()}
        draft.originals |= {name: copy.original for name, copy in copies.items()}


def control_of(spec: Network) -> Network | None:
    """Return the untrained control of a network; None if the network is itself random."""
    if spec.weights == "random":
        return None
    # A transformers model needs its folder for the architecture too.
    local = spec.local if spec.transformers is not None else None
    untrained = {"weights": "random", "train": None, "prefix": None, "within": None, "ablate": None, "local": local}
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
            "classes": dict(plan.classes),
        }
    )
    path = plan.scratch / "plans" / f"{plan.config.name}.{digest(body)}.json"
    if not path.exists():
        write_atomically(path, body)
        path.chmod(0o600)  # it holds paths as configured, including those of keys
    return path


def read(path: Path) -> Plan:
    """Read a saved plan."""
    value = json.loads(path.read_text())
    steps = [Step(**{**step, "key": Key(**step["key"]), "parents": tuple(step["parents"])}) for step in value["steps"]]
    return Plan(
        experiment.parse(value["config"]),
        {step.manifest: step for step in steps},
        {name: planned(spec) for name, spec in value["networks"].items()},
        value["originals"],
        value["splits"],
        tuple(value["arguments"]),
        value["classes"],
    )
