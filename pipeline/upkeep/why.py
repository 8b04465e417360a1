"""What a run would do, and why: which part of which id changed, and what that costs, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.core import Config
from pipeline.plan import step as plan
from pipeline.plan.step import Plan, Step
from pipeline.storage.manifest import Manifest, latest

WHAT = {
    "ingest": "shards of images to decode",
    "concepts": "shards of label maps to make",
    "extract": "shards to put through the network",
    "probes": "shards of features to keep",
    "grams": "minibatches to put through the network",
}
DOES = {
    "network": "weights read, drawn or trained; trained only where recipe or training images are others",
    "dissect": "counted from the stores, without a forward",
    "calibrate": "methods fitted again on the splits that are missing, from stored logits",
    "similarity": "compared from the Gram matrices, without a forward",
    "randomize": "trained are runs whose own line of the configuration, or whose images, changed",
    "ablate": "units removed again only on shards of images that changed",
}
DIGEST_LENGTHS = (20, 32, 64)  # of ids and checksums, which say nothing to a reader


def explain(wanted: Config) -> list[str]:
    """One line a step that would run, one below for each reason, and one with its cost."""
    made = plan.make(wanted)
    outdated = plan.outdated(made)
    names = {step.manifest: step.name for step in made.steps.values()}
    lines: list[str] = []
    seconds: list[float | None] = []
    for step in made.steps.values():
        if _stands(made, step, outdated):
            continue
        before = latest((made.results / step.manifest).parent, step.stage)
        lines.append(step.name)
        if step.manifest in outdated:
            lines.append(f"    {_named(outdated[step.manifest], names)}")
        elif before is None:
            lines.append("    not made yet, or not finished")
        else:
            parents = [made.steps[path].name for path in step.parents]
            lines += [f"    {change}" for change in _changes(before.settings, step.settings, parents)]
        work, cost = _cost(made, step, before, outdated)
        seconds.append(cost)
        lines.append(f"    → {work}" + ("" if cost is None else f", about {cost:.0f} s"))
    if lines:
        known = [cost for cost in seconds if cost is not None]
        unknown = len(seconds) - len(known)
        lines.append(
            f"{len(seconds)} steps" + (f", about {sum(known):.0f} s" if known else "")
            + (f" and {unknown} that were never timed" if unknown else "")
        )  # fmt: skip
    return lines


def _named(reason: str, names: Mapping[str, str]) -> str:
    """A reason with the steps' names in place of their manifests' paths."""
    for path, name in names.items():
        reason = reason.replace(path, name)
    return reason


def _cost(made: Plan, step: Step, before: Manifest | None, outdated: Mapping[str, str]) -> tuple[str, float | None]:
    """What the step would do, and in how many seconds going by the last time; None where there was none."""
    last: Mapping[str, Any] = before.provenance if before is not None else {}
    parents = [made.steps[path] for path in step.parents]
    if step.stage not in WHAT:
        if step.stage == "dissect" and any(parent.stage == "network" for parent in parents):
            return "counted in a forward of the layers that are not stored, the others from the stores", last.get(
                "seconds"
            )
        return DOES.get(step.stage, "made anew"), last.get("seconds")
    to_come = [parent for parent in parents if not _stands(made, parent, outdated)]
    if not to_come:
        count, total = plan.STAGES[step.stage].pending(made, step)
        said = f"{count} of {total} {WHAT[step.stage]}"
    elif [parent.stage for parent in to_come] == ["ingest"] and "shards" in last:
        # What was made from the images that stay is kept.
        count = min(plan.STAGES["ingest"].pending(made, to_come[0])[0], last["shards"])
        said = f"at most {count} {WHAT[step.stage]}"
    elif "shards" in last:
        count = last["shards"]
        said = f"at most {count} {WHAT[step.stage]}"
    else:
        return f"all {WHAT[step.stage]}", None
    if not last.get("made"):
        return said, None if count else 0
    return said, last["seconds"] / last["made"] * count


def _stands(made: Plan, step: Step, outdated: Mapping[str, str]) -> bool:
    return (made.results / step.manifest).exists() and step.manifest not in outdated


def _changes(before: Any, now: Any, parents: list[str], name: str = "") -> Iterator[str]:
    """The leaves in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            yield from _changes(before.get(key), now.get(key), parents, f"{name}.{key}" if name else key)
    elif name == "parents":
        if len(before) != len(now):
            yield "reads other steps than before"
        else:
            yield from (
                f"reads {parent}, which is to be made from something else"
                for parent, old, new in zip(parents, before, now, strict=True)
                if old != new
            )
    elif before != now:
        yield f"{name} changed" if _is_digest(now) else f"{name}: {before!r} → {now!r}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) in DIGEST_LENGTHS and not set(value) - set("0123456789abcdef")
