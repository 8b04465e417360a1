"""Check a plan before any work starts: inspect new networks, then ask each stage for problems."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pipeline.errors import MicrotomeError
from pipeline.networks import published
from pipeline.plan import inspected
from pipeline.plan.inspected import say
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.plan.step import Plan
from pipeline.stages.registry import jobs
from pipeline.workers import tls


def check(plan: Plan, probe: bool = False) -> None:
    """Inspect what has not been inspected yet; raise `MicrotomeError` with everything that is wrong.

    With `probe`, also measure the speed of networks where it is unknown.
    """
    if plan.config.cluster.tls is not None:
        tls.check(plan.config.cluster.tls.model_dump())
    every = list(jobs(plan))
    asked = [*questions(every), *(speeds(every) if probe else [])]
    unknown = list({question.kept: question for question in asked if not question.answered}.values())
    if unknown:
        say(f"inspecting {', '.join(question.name for question in unknown)}")
        inspected.ask(unknown)
        _advise(every, {question.kept for question in unknown})
    errors = [said for job in every for said in job.stage.check(job)]
    if errors:
        raise MicrotomeError("\n  ".join(errors))


def questions(every: Iterable[Job]) -> Iterator[Question]:
    """Yield what the inspection has to answer: networks on their data sets, then the requests of stages."""
    every = list(every)
    yield from map(inspected.question, inspected.pairs(every))
    for job in every:
        yield from job.stage.questions(job)


def speeds(every: Iterable[Job]) -> Iterator[Question]:
    """Yield what the probe has to time, for unfinished jobs."""
    every = [job for job in every if not job.manifest.exists()]
    for job in every:
        yield from job.stage.speeds(job)
    yield from map(inspected.speed_question, inspected.pairs(every))


def sizes(plan: Plan) -> list[str]:
    """Return lines on each network's layers and parameters, and what stages add about sizes."""
    every = list(jobs(plan))
    lines = []
    for job in inspected.pairs(every):
        known = inspected.found(job)
        layers, count = [layer.name for layer in known.layers], len(known.layers)
        named = ", ".join(layers if count <= 4 else [*layers[:2], "...", layers[-1]])
        which = f"{count} layers ({named})" if count else "no layers"
        lines.append(f"{job.network} on {job.dataset}: {known.parameters:,} parameters, {which}")
        lines += [f"{job.network} on {job.dataset}: {notice}" for notice in known.notices]
    return lines + [line for job in every for line in job.stage.sizes(job)]


def _advise(every: Iterable[Job], new: set) -> None:
    """Print notices and the libraries' advice on image sizes, for networks that were just inspected."""
    for job in inspected.pairs(every):
        if inspected.question(job).kept in new:
            for notice in inspected.found(job).notices:
                say(f"{job.network} on {job.dataset}: {notice}")
            size = job.parent_job("ingest").settings.size
            if said := published.advice(job.network_spec, size, job.scratch):
                say(f"{job.network} on {job.dataset}: {said}")
