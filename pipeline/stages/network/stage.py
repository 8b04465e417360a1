"""The stage `network`: load, draw or train weights, check them, and write them to `networks/<network>/`.

Writes
    model.safetensors  the state dict, tensors only
    model.json         architecture, sha256 of the weights, preprocessing, parameters, accuracy and training curve
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.networks import Network, Train
from pipeline.data.images import Ingested
from pipeline.data.kinds import Summary
from pipeline.errors import MicrotomeError, about
from pipeline.networks.identity import architecture, weights_digest
from pipeline.plan.job import Job
from pipeline.plan.stage import Draft, Stage, Wanted
from pipeline.plan.step import Key, Step
from pipeline.stages.network.results import Weights
from pipeline.stages.network.settings import Settings
from pipeline.stages.network.tasks import Training, make
from pipeline.stages.randomize.results import run_settings, weights_of
from pipeline.storage.identity import FileDigests, crc32c, digest
from pipeline.storage.manifest import Manifest
from pipeline.storage.store import StoreRef
from pipeline.workers.tasks import run_tasks

VERSION = 1
REMEDY = "lower `batch_size` of the recipe, or the number of images"
CODE = (
    "kernels/calibration/reliability.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/libraries",
    "pipeline/networks/returned.py",
    "pipeline/networks/training/loop.py",
    "pipeline/networks/training/repeatable.py",
    "pipeline/stages/network/results.py",
    "pipeline/stages/network/settings.py",
    "pipeline/stages/network/stage.py",
    "pipeline/stages/network/tasks.py",
)


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, spec in draft.networks.items():
        copied = name not in draft.config.networks and spec.weights == "train"
        if not draft.config.datasets_of(spec) and not copied:  # `only` left it no data set
            continue
        parents: tuple[Step, ...] = ()
        read = None
        if spec.train is not None:
            summary = draft.summaries[spec.train.dataset]
            summary.require(spec.train.dataset, spec.train.split)
            check_fraction(name, spec.train, summary)
            parents = (draft.step("ingest", spec.train.dataset),)
        if spec.run is not None:
            experiment, run = spec.run
            parents = (next(step for step in draft.of_stage("randomize") if step.experiment == experiment),)
            read = (digest(run_settings(parents[0].settings, run)),)
        with about(f"network {name!r}"):
            settings = settings_of(spec, draft.digests)
        yield Wanted(Key(network=name), settings, parents, read)


def settings_of(spec: Network, digests: FileDigests) -> Settings:
    """Return the content of the network's id."""
    weights: dict[str, Any]
    match spec.weights:
        case "train":
            assert spec.train is not None
            train = spec.train.model_dump(exclude={"recipe": {"checkpoint_every"}}) | {"seed": spec.seed}
            if spec.train.fraction == 1:
                del train["fraction"]
            weights = {"train": train}
        case "random":
            weights = {"random": spec.seed}
        case _ if spec.run is not None:
            weights = {"weights": "of a run"}
        case _:
            weights = {"checkpoint": weights_digest(spec, digests)}
            if not spec.published:
                weights["prefix"] = spec.prefix
            if spec.within is not None:
                weights["within"] = spec.within
    return Settings(architecture=architecture(spec, digests), preprocessing=spec.preprocessing, **weights)


def check_fraction(name: str, train: Train, found: Summary) -> None:
    """Refuse a fraction of a data set's images that is smaller than the number of classes."""
    images = found.splits[train.split]
    part = int(train.fraction * images)
    if train.fraction < 1 and part < max(2, found.classes):
        raise MicrotomeError(
            f"network {name!r}: {train.fraction:g} of the {images:,} images of split {train.split!r} of data set "
            f"{train.dataset!r} are {part}, and they are of {found.classes} classes: take a larger fraction"
        )


def run(job: Job[Settings]) -> None:
    job.begin()
    spec, folder = job.network_spec, job.folder
    folder.mkdir(parents=True, exist_ok=True)
    training = None
    if spec.train is not None:
        ingest, manifest = job.parent_job("ingest"), job.parent("ingest")
        ingested = Ingested.read(manifest.result)
        recipe = digest({key: value for key, value in job.identity.items() if key != "parents"})
        training = Training(StoreRef.of_manifest(ingest.folder, "images.zarr", manifest.files), recipe)
        job.refers_to([folder])
        held = ingested.images * 3 * math.prod(ingested.size)
        job.check_memory(held, "give the data set fewer images", f"{job.name}, which holds all images,")
    taken = weights_of(job.parent_job("randomize"), spec.run[1]) if spec.run is not None else None
    with job.workers() as workers:
        (made,) = run_tasks(workers, make, [(spec, folder, training, taken)], 1, job.name, REMEDY)
    files = {}
    for name in ("model.safetensors", "model.json"):
        data = (folder / name).read_bytes()
        files[name] = (len(data), crc32c(data))
    job.finish(made.weights_sha256, files, made)


def made(job: Job) -> list[Path]:
    """Return the network's files, with the checkpoints from which its training can resume."""
    folder = job.folder
    return [folder / "model.safetensors", folder / "model.json", *folder.glob("training-*")]


def owned(manifest: Manifest, path: Path) -> set[Path]:
    """Return the training folder of a network's weights."""
    training = Weights.of(manifest).training
    return {path.parent.parent / training} if training is not None else set()


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Yield the folders of trainings that no network comes from."""
    trainings = sorted(results.glob("networks/*/training-*/"))
    yield from (folder for folder in trainings if folder not in used and folder.parent not in used)


STAGE = Stage(
    name="network",
    version=VERSION,
    says="Weights of {wildcards.network}",
    place="network",
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    explains="weights loaded, drawn or trained; trained only if the recipe or the training images changed",
    made=made,
    owned=owned,
    unreferenced=unreferenced,
    priority=1,  # training is the longest chain: first
)
