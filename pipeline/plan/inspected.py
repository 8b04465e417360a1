"""Inspect networks before any work.

The inspection builds each network on the meta device, lists its layers, and checks its checkpoint's names and shapes.
Stages also have other networks inspected: those that runs train, and segmenters. The inspection needs torch, so it runs
in a process of its own, once per network, image size and choice of layers. Its answer is cached under an id of these.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config.base import UNTRAINED
from pipeline.config.networks import GeneratorNetwork, Network, NetworkSpec, Segmenter
from pipeline.errors import MicrotomeError
from pipeline.networks.layer import Inspection
from pipeline.networks.prepare import input_shape
from pipeline.plan.job import Job
from pipeline.plan.question import Question
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import digest
from pipeline.workers.processes import in_own_process

VERSION = 7
LIBRARIES = ("torch", "torchvision", "timm", "transformers")  # other versions may build other networks
PAIRS = "extract"  # the stage with one job per network and data set


def say(line: str) -> None:
    """Print a line for the person who waits."""
    print(line, file=sys.stderr)


def ask(unknown: list[Question]) -> None:
    """Have questions answered in a separate process, and cache the answers.

    Raises `MicrotomeError` with everything that is wrong.
    """
    requests = [question.request for question in unknown]
    answers = in_own_process("pipeline.networks.inspection", requests, "the inspection of the networks")
    errors = []
    for question, answer in zip(unknown, answers, strict=True):
        if "error" in answer:
            errors.append(f"{question.name}: {answer['error']}")
        else:
            write_atomically(question.kept, json.dumps(answer["result"], indent=1))
    if errors:
        raise MicrotomeError("\n  ".join(errors))


def pairs(jobs: Iterable[Job]) -> Iterator[Job]:
    """Yield the jobs among these that stand for a network on a data set.

    An untrained control has its network's architecture: one inspection covers both.
    """
    return (job for job in jobs if job.stage.name == PAIRS and not job.is_control)


def found(job: Job) -> Inspection:
    """Return what the inspection found of a job's network, or of its original if it is a control or a copy."""
    return Inspection.read(question(_pair(job)).answer)


def notices(job: Job) -> list[str]:
    """Return what the inspection says of the network of an extraction; nothing of other jobs, or if it is gone."""
    if not any(pairs([job])) or not (asked := question(job)).answered:
        return []
    return Inspection.read(asked.answer).notices


def speed(job: Job) -> dict[str, Any]:
    """Return the speed probe's answer for a job's network; empty if it has not run."""
    return speed_question(_pair(job)).answer


def _pair(job: Job) -> Job:
    pair = job.beside(PAIRS, job.original)
    assert pair is not None
    return pair


def question(job: Job) -> Question:
    """Return the inspection's question about a network on a data set, for a job from `pairs`."""
    asked = _request(job)
    by = {key: value for key, value in asked.items() if key not in ("network", "images")}
    kept = inspected(job.scratch, [job.parent_job("network").id, by])
    return Question(f"network {job.network!r} on {job.dataset!r}", kept, asked)


def inspected(scratch: Path, made_of: list[Any]) -> Path:
    """Return the cache file of the answer to a question."""
    return scratch / "inspected" / f"{digest([VERSION, versions(), *made_of])}.json"


def speed_question(job: Job) -> Question:
    """Return the speed probe's question about a network, for a job from `pairs`."""
    random = job.network_spec.model_copy(
        update={"weights": "random", "train": None, "prefix": None, "within": None, "seed": 0}
    )
    return speed_of(job, random, _request(job)["input_shape"], f"{job.network!r} on {job.dataset!r}")


def speed_of(job: Job, spec: Network | Segmenter, input_shape: list[int], whose: str) -> Question:
    """Return the speed probe's question about a network with random weights.

    Speed does not depend on the weights, and the answer holds for this machine alone.
    """
    request = {
        "network": NetworkSpec.of(spec).model_dump(),
        "input_shape": input_shape,
        "micro_batch": spec.numerics.micro_batch,
        "channels_last": spec.numerics.channels_last,
        "device": "cuda" if job.cluster.on_gpus else "cpu",
    }
    here = [VERSION, versions(), platform.node(), platform.machine()]
    return Question(f"the speed of {whose}", job.scratch / "probed" / f"{digest([*here, request])}.json", request)


def _request(job: Job) -> dict[str, Any]:
    ingested, network = job.parent_job("ingest").settings, job.network_spec
    request = {
        "network": NetworkSpec.of(network).model_dump(),
        "input_shape": list(input_shape(network, ingested.size)),
        "layers": network.layers,
        "reading": network.reading.model_dump(mode="json"),
        "images": ingested.images,
        "classes": job.classes or None,
    }
    if isinstance(network, GeneratorNetwork):
        request["image"] = list(ingested.size)
    for stage in job.stages.values():
        if stage.requests is None:
            continue
        other = job.beside(stage.name) or job.beside(stage.name, job.network + UNTRAINED)
        if other is not None:
            request |= stage.requests(other)
    return request


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of the installed libraries that build networks."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
