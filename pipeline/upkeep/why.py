"""Explain what a run would do and why, before it starts: which part of which id changed, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config.core import Core
from pipeline.plan.job import Job
from pipeline.plan.settle import outdated
from pipeline.run import planner
from pipeline.stages.registry import jobs
from pipeline.storage.manifest import Manifest

DIGEST_LENGTHS = (20, 32, 64)  # lengths of ids and checksums, which mean nothing to a reader


def explain(config: Core) -> list[str]:
    """Return one line per step that would run; below it, one line per reason and one with its cost."""
    plan = planner.make(config, dry=True)
    stale = outdated(plan)
    names = {step.manifest: step.name for step in plan.steps.values()}
    lines: list[str] = []
    seconds: list[float | None] = []
    for job in jobs(plan):
        if _stands(job, stale):
            continue
        before = job.before()
        lines.append(job.name)
        if _path(job) in stale:
            lines.append(f"    {_named(stale[_path(job)], names)}")
        elif before is None:
            lines.append("    not made yet, or not finished")
        else:
            parents = [parent.name for parent in job.parents]
            lines += [f"    {change}" for change in _changes(before.settings, job.identity, parents)]
        work, cost = _cost(job, before, stale)
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
    """Return a reason with step names in place of manifest paths."""
    for path, name in names.items():
        reason = reason.replace(path, name)
    return reason


def _cost(job: Job, before: Manifest | None, stale: Mapping[str, str]) -> tuple[str, float | None]:
    """Return what the step would do, and its seconds by the last run; None if there was none."""
    last: Mapping[str, Any] = before.provenance if before is not None else {}
    pending, counts, explains = job.stage.pending, job.stage.counts, job.stage.explains
    if pending is None:
        return explains if isinstance(explains, str) else explains(job.step), last.get("seconds")
    to_come = [parent for parent in job.parents if not _stands(parent, stale)]
    if not to_come:
        count, total = pending(job)
        said = f"{count} of {total} {counts}"
    elif [parent.stage.name for parent in to_come] == ["ingest"] and "shards" in last:
        # Outputs from unchanged images are kept.
        ingest = to_come[0]
        assert ingest.stage.pending is not None
        count = min(ingest.stage.pending(ingest)[0], last["shards"])
        said = f"at most {count} {counts}"
    elif "shards" in last:
        count = last["shards"]
        said = f"at most {count} {counts}"
    else:
        return f"all {counts}", None
    if not last.get("made"):
        return said, None if count else 0
    return said, last["seconds"] / last["made"] * count


def _stands(job: Job, stale: Mapping[str, str]) -> bool:
    return job.manifest.exists() and _path(job) not in stale


def _path(job: Job) -> str:
    return job.manifest.relative_to(job.results).as_posix()


def _changes(before: Any, now: Any, parents: list[str], name: str = "") -> Iterator[str]:
    """Yield the leaves in which two settings differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(set(before) | set(now)):
            yield from _changes(before.get(key), now.get(key), parents, f"{name}.{key}" if name else key)
    elif name == "parents":
        if len(before) != len(now):
            yield "reads other steps than before"
        else:
            yield from (
                f"reads {parent}, whose inputs change"
                for parent, old, new in zip(parents, before, now, strict=True)
                if old != new
            )
    elif before != now:
        yield f"{name} changed" if _is_digest(now) else f"{name}: {before!r} → {now!r}"


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) in DIGEST_LENGTHS and not set(value) - set("0123456789abcdef")
