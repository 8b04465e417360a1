"""Estimate a run before it starts: disk space, throughput, time, memory per worker, tasks.

Sizes come from the layers that the inspection found. The speed of networks comes from a probe
(`pipeline.networks.speed`). The speed of other stages comes from rates that `make bench` measured; those of decoding
and label maps are assumed. If a stage has run before, its recorded time takes precedence. If the disk cannot hold the
results, the run is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import MicrotomeError
from pipeline.plan.cost import SHRINKS, Cost, Store, duration
from pipeline.plan.job import Job
from pipeline.plan.settle import outdated
from pipeline.plan.step import Plan
from pipeline.stages.registry import jobs
from pipeline.workers import memory

SHARE = 0.95  # the share of the free bytes that a run may plan to fill
LITTLE = 50e6  # bytes that never cause a refusal before the disk is full: such estimates say little


def lines(plan: Plan, estimates: Sequence[Estimate]) -> list[str]:
    """Return the forecast as text: one line per step, one per layer below its network, and the totals."""
    workers, allowed = memory.workers(plan.config.cluster), memory.memory(plan.config.cluster)
    head = ("", "GB", "on disk", "missing", "images", "images/s", "time", "tasks", "GB/worker")
    rows: list[tuple[str, ...]] = [head]
    for each in estimates:
        cost = each.cost
        if cost.stores or cost.seconds is not None or cost.memory is not None:
            rows.append(_row(each, workers, allowed))
        if len(cost.stores) > 1 and not each.job.is_control:
            rows += [_layer(store) for store in cost.stores]
    stores = [store for each in estimates for store in each.cost.stores]
    missing = sum(store.missing for store in stores)
    known = [each.cost.seconds for each in estimates if each.cost.seconds is not None and not each.done]
    room = plan.config.stores or f"{_gb(_free(plan.results))} GB free"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    found = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    found.append(
        f"{_gb(missing)} GB to write, {room}; about {duration(sum(known) / workers)} on {workers} "
        f"worker{'s' * (workers > 1)} of {allowed / 1e9:.1f} GB, besides steps that were never timed"
    )
    left_out = {store.name for store in stores if store.kept == "pooled"}
    if left_out:
        found.append(f"stored pooled, without maps, and left out of dissect: {', '.join(sorted(left_out))}")
    streamed = {store.name for store in stores if store.kept == "none"}
    if streamed:
        saved = sum(store.unstored for store in stores)
        found.append(
            f"not stored, and counted in two forward passes in place of one: {', '.join(sorted(streamed))}; saves "
            f"{_gb(saved * SHRINKS['maps'])} GB on disk"
        )
    return found


def check_disk(plan: Plan, estimates: Sequence[Estimate]) -> None:
    """Refuse a run whose results do not fit on the file system beside what is already there.

    Raises
    ------
    MicrotomeError
        With both figures and what to change.
    """
    if plan.config.stores is not None:
        return
    stores = [store for each in estimates for store in each.cost.stores]
    missing, free = sum(store.missing for store in stores), _free(plan.results)
    if missing > max(SHARE * free, LITTLE):
        largest = max(stores, key=lambda store: store.missing)
        raise MicrotomeError(
            f"the results need about {_gb(missing)} GB more, {_gb(largest.missing)} GB of it for {largest.name}, and "
            f"the file system of {plan.results} has {_gb(free)} GB free: name fewer layers, have some counted "
            f"without being stored (`store: {{{largest.name.split(' ')[0]}: none}}`), bound the data set with "
            "`max_images`, or put `results` on a larger disk"
        )


@dataclass(frozen=True)
class Estimate:
    """The cost of one job: its stage's estimate, or the time of the last run if that is more precise."""

    job: Job
    cost: Cost
    done: bool

    @property
    def name(self) -> str:
        return self.job.name


def forecast(plan: Plan) -> list[Estimate]:
    """Estimate each job's cost, in plan order; a stage without an estimate uses its last run."""
    gone = outdated(plan)
    workers = memory.workers(plan.config.cluster)
    found = []
    for job in jobs(plan):
        done = job.manifest.exists() and job.manifest.relative_to(job.results).as_posix() not in gone
        estimate, before = job.stage.cost, job.before()
        cost = estimate(job, done) if estimate is not None else Cost()
        provenance = before.provenance if before is not None else {}
        seconds = cost.seconds
        if provenance.get("made") and provenance.get("shards"):  # wall-clock time, with that run's workers
            seconds = provenance["seconds"] / provenance["made"] * cost.tasks * workers
        elif estimate is None and provenance:
            seconds = provenance["seconds"] * workers
        need = None if cost.memory is None else cost.memory * memory.threads(plan.config.cluster)
        found.append(Estimate(job, replace(cost, seconds=seconds, memory=need), done))
    return found


def _free(folder: Path) -> float:
    """Return the free bytes of the file system that holds a folder, or will hold it."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return float(shutil.disk_usage(there).free)


def _row(estimate: Estimate, workers: int, allowed: int) -> tuple[str, ...]:
    cost = estimate.cost
    raw, expected = sum(s.raw for s in cost.stores), sum(s.expected for s in cost.stores)
    need = "" if cost.memory is None else f"{(memory.WORKER_BASE + cost.memory) / 1e9:.2f}"
    if cost.memory is not None and memory.WORKER_BASE + cost.memory > allowed:
        need += "!"
    spent = "done" if estimate.done else "" if cost.seconds is None else duration(cost.seconds / workers)
    sizes = (_gb(raw), _gb(expected), _gb(sum(s.missing for s in cost.stores))) if cost.stores else ("", "", "")
    counts = (f"{cost.images:,}" if cost.images else "", cost.rate, spent, f"{cost.tasks:,}", need)
    return (estimate.name, *sizes, *counts)


def _layer(store: Store) -> tuple[str, ...]:
    name = f"  {store.name}" + {"pooled": " (pooled)", "none": " (not stored)"}.get(store.kept, "")
    return (name, _gb(store.raw), _gb(store.expected), _gb(store.missing), "", "", "", "", "")


def _aligned(row: tuple[str, ...], widths: list[int]) -> Iterator[str]:
    yield row[0].ljust(widths[0])
    yield from (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))


def _gb(count: float) -> str:
    value = count / 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.001 or not value else "<0.001"
