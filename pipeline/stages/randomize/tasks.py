"""What workers do for the stage `randomize`: read the images, corrupt them, train, and write what came out.

Each run has a folder named after its id:
    run.json           outcome, curve and facts
    seconds.json       of each epoch, by the clock: in no digest
    model.safetensors  the weights at the end; none of a run that diverged
    checkpoint.pt      while it is not finished
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kernels.images import corruption as kernels
from pipeline.data.images import pixels
from pipeline.errors import about
from pipeline.networks.build import load
from pipeline.networks.checkpoint import sha256, write_safetensors
from pipeline.networks.training.repeatable import stream
from pipeline.stages.randomize import expressivity
from pipeline.stages.randomize.results import Expressivity
from pipeline.stages.randomize.runs import EXPRESSIVITY, LABELS, PIXELS, SECONDS, Data, Run
from pipeline.stages.randomize.training import DIVERGED, FINISHED, Sets, Training, repeatable, train
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c
from pipeline.storage.manifest import Files, write_file
from pipeline.workers.devices import device


@functools.lru_cache(maxsize=1)
def read(data: Data) -> Sets:
    """Read the true images and labels, verified; a worker reads them once."""
    reader = data.images.open()
    return Sets(pixels(reader, data.rows), data.labels, pixels(reader, data.test_rows), data.test_labels)


def corrupted(sets: Sets, classes: int, corruption: str, share: float | None, seed: int) -> Sets:
    """Return the data that a run is trained and tested on; `share` is that of `corrupted_labels`.

    Test labels stay true; test images are treated as training images.
    """
    images, labels, test_images = sets.images, sets.labels, sets.test_images

    def draw(number: int) -> np.random.Generator:
        return stream(seed, PIXELS, number)

    match corruption:
        case "corrupted_labels" | "random_labels":
            part = 1.0 if share is None else share
            labels = kernels.corrupted_labels(labels, classes, part, stream(seed, LABELS, 0))
        case "shuffled_pixels":
            images, test_images = (kernels.shuffled(each, draw(0)) for each in (images, test_images))
        case "random_pixels":
            images, test_images = (kernels.shuffled_each(each, draw(n)) for n, each in ((1, images), (2, test_images)))
        case "gaussian":
            mean, deviation = kernels.moments(images)
            images, test_images = (
                kernels.gaussian(each.shape, mean, deviation, draw(n)) for n, each in ((1, images), (2, test_images))
            )
    return Sets(images, labels, test_images, sets.test_labels)


def express(data: Data, crop: int, folder: Path) -> Files:
    """On a worker: have the theorem's network give the labels, and write what it comes to.

    Where images differ too little for any network of this form, the file says so. Return what a manifest says of it.
    """
    true = read(data)
    try:
        built = expressivity.build(true.images, true.labels, data.classes, crop)
    except ValueError as error:
        built = expressivity.Built(Expressivity(refused=str(error)), {})
    write_atomically(folder / SECONDS, json.dumps(built.seconds))
    return write_file(folder, EXPRESSIVITY, json.dumps(built.found.written(), indent=1).encode())


def train_runs(data: Data, runs: Sequence[Run]) -> list[tuple[str, Files]]:
    """On a worker: train these runs to their end, side by side where there are several; return their ids and files."""
    true, here = read(data), device()
    with repeatable(here):
        trainings, labels = [], []
        for run in runs:
            with about(f"run {run.name!r}"):
                how = run.how
                sets = corrupted(true, data.classes, how.corruption, how.share, how.seed)
                labels.append(sets.labels)
                trainings.append(prepared(run, sets, here))
        train(trainings)
        return [
            (run.id, written(run, one, own, data.labels)) for run, one, own in zip(runs, trainings, labels, strict=True)
        ]


def prepared(run: Run, sets: Sets, device: str) -> Training:
    """Return a run at its beginning, or where its checkpoint left it."""
    run.folder.mkdir(parents=True, exist_ok=True)
    network = load(run.network.model_copy(update={"seed": run.how.seed}))
    return Training(network, sets, run.how, run.id, run.folder, device, run.checkpoint_seconds)


def written(run: Run, training: Training, labels: np.ndarray, true: np.ndarray) -> Files:
    """Write what came out of a run; the checkpoint stays until the run is noted as finished."""
    curve, network = training.curve, training.network
    facts: dict[str, Any] = {
        "outcome": DIVERGED if curve.diverged else FINISHED,
        "curve": {
            name: [value if np.isfinite(value) else None for value in getattr(curve, name)]
            for name in ("loss", "accuracy", "test_accuracy", "test_loss", "test_ece")
        },
        "epochs_to_90": curve.reaches(0.9),
        "epochs_to_fit": curve.fitted,
        "train_accuracy": None if curve.diverged else training.train_accuracy(),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "batch_norm": any(name.endswith("running_var") for name in network.state_dict()),
        "labels_changed": int((labels != true).sum()),
        "labels": labels.tolist(),
        "precision": "bfloat16" if training.bfloat16 else "float32",
        "device": training.device.type,
        "steps": training.steps,
    }
    files: Files = {}
    if not curve.diverged:
        path = run.folder / "model.safetensors"
        write_safetensors(path, {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()})
        facts["weights_sha256"] = sha256(path)
        files["model.safetensors"] = (path.stat().st_size, crc32c(path.read_bytes()))
    files |= write_file(run.folder, "run.json", json.dumps(facts).encode())
    write_atomically(run.folder / SECONDS, json.dumps(curve.seconds))
    return {f"{run.folder.name}/{name}": value for name, value in files.items()}
