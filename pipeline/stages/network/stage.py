"""The stage `network`: weights are read, drawn or trained, checked, and written as `networks/<network>/`.

Writes
    model.safetensors  the state dict, tensors only
    model.json         architecture, sha256 of the weights, preprocessing, parameters, accuracy and training curve
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.core import Network, Train
from pipeline.errors import MicrotomeError
from pipeline.networks.build import NetworkSpec, published_file
from pipeline.networks.published import installed, weight_files
from pipeline.plan import job as stage
from pipeline.stages.randomize import stage as randomize
from pipeline.storage.identity import FileDigests, crc32c, digest
from pipeline.storage.manifest import write_atomically
from pipeline.storage.redact import without_home
from pipeline.workers.pool import check_memory, client, device, run_tasks

if TYPE_CHECKING:
    import numpy as np

    from pipeline.data.kinds import Summary
    from pipeline.plan.step import Plan, Step

VERSION = 1
REMEDY = "lower `batch_size` of the recipe, or the number of images"
CODE = (
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/libraries",
    "pipeline/stages/network/stage.py",
    "pipeline/networks/build.py",
    "pipeline/networks/training/repeatable.py",
    "pipeline/networks/training/loop.py",
)


def settings(spec: Network, digests: FileDigests) -> dict[str, Any]:
    """What the network's id is made of; for a trained one its recipe, since its weights are not known before."""
    made_of: dict[str, Any] = {
        "architecture": architecture(spec, digests),
        "preprocessing": spec.preprocessing.model_dump(),  # model.json tells it, and a training depends on it
    }
    match spec.weights:
        case "train":
            assert spec.train is not None
            # How often it is saved changes no weight.
            made_of["train"] = spec.train.model_dump(exclude={"recipe": {"checkpoint_every"}}) | {
                "seed": spec.seed,
            }
            if spec.train.fraction == 1:
                del made_of["train"]["fraction"]
        case "random":
            made_of["random"] = spec.seed
        case _ if spec.run is not None:
            made_of["weights"] = "of a run"  # which, the parents say
        case _:
            made_of["checkpoint"] = weights_digest(spec, digests)
            if not spec.published:
                made_of["prefix"] = spec.prefix
    return made_of


def check_fraction(name: str, train: Train, found: Summary) -> None:
    """Refuse a part of the images of a data set that has fewer images than there are classes."""
    images = found.splits[train.split]
    part = int(train.fraction * images)
    if train.fraction < 1 and part < max(2, found.classes):
        raise MicrotomeError(
            f"network {name!r}: {train.fraction:g} of the {images:,} images of split {train.split!r} of data set "
            f"{train.dataset!r} are {part}, and they are of {found.classes} classes: take a larger fraction"
        )


def architecture(spec: NetworkSpec, digests: FileDigests) -> dict[str, Any]:
    """The builder and its arguments; for a module or a model of transformers, the digest of the file it is made by."""
    if spec.torchvision is not None:
        return {"torchvision": spec.torchvision, "arguments": spec.arguments}
    if spec.timm is not None:
        return {"timm": spec.timm, "arguments": spec.arguments}
    if spec.transformers is not None:
        return {"transformers": digests(published_file(spec) / "config.json"), "arguments": spec.arguments}
    assert spec.module is not None
    path, _, function = spec.module.rpartition(":")
    return {"module": digests(path), "function": function, "arguments": spec.arguments}


def weights_digest(spec: NetworkSpec, digests: Callable[[Path], str]) -> str | dict[str, str]:
    """sha256 of the checkpoint or the published file; where published weights are in several files, of each."""
    if not spec.published:
        return digests(Path(spec.weights))
    path = published_file(spec)
    if spec.transformers is None:
        return digests(path)
    return {file.name: digests(file) for file in weight_files(path)}


def run(plan: Plan, step: Step) -> None:
    assert step.network is not None
    began = stage.begin(plan, step)
    spec = plan.networks[step.network]
    folder = plan.results / "networks" / step.network
    folder.mkdir(parents=True, exist_ok=True)
    training = None
    if spec.train is not None:
        ingest, manifest = plan.parent(step, "ingest")
        assert ingest.dataset is not None
        training = {
            "store": plan.results / ingest.dataset / "images.zarr",
            "files": stage.below("images.zarr", manifest.files),
            "recipe": digest({key: value for key, value in step.settings.items() if key != "parents"}),
        }
        stage.refers_to(plan, step, [folder])
        held = manifest.result["images"] * 3 * math.prod(manifest.result["size"])
        what = f"{step.name}, which holds all images,"
        check_memory(plan.config.cluster, held, what, "give the data set fewer images")
    taken = None
    if spec.run is not None:
        taken = randomize.weights_of(plan, plan.steps[step.parents[0]], spec.run[1])
    with client(plan.config.cluster, plan.scratch) as workers:
        (facts,) = run_tasks(workers, make, [(spec, folder, training, taken)], 1, step.name, REMEDY)
    files = {}
    for name in ("model.safetensors", "model.json"):
        data = (folder / name).read_bytes()
        files[name] = (len(data), crc32c(data))
    stage.finish(plan, step, began, facts["weights_sha256"], files, facts)


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made, with what a training left to be taken up again."""
    assert step.network is not None
    folder = plan.results / "networks" / step.network
    return [folder / "model.safetensors", folder / "model.json", *folder.glob("training-*")]


def make(
    spec: Network,
    folder: Path,
    training: dict[str, Any] | None,
    taken: tuple[Path, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """On a worker: build, load or train; write the two files; return the small facts.

    `taken` are file and facts of a run's weights, where it is one whose weights they are.
    """
    from pipeline.networks.build import load
    from pipeline.networks.checkpoint import sha256, write_safetensors

    if spec.train is not None:
        assert training is not None
        network, facts = _train(spec, folder, **training)
    elif taken is not None:
        path, found = taken
        network, facts = load(spec, path), {"accuracy": found["test_accuracy"], "run": dict(found)}
    else:
        network, facts = load(spec), {}
    path = folder / "model.safetensors"
    write_safetensors(path, network.state_dict())
    facts |= {
        "weights_sha256": sha256(path),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    described = {
        "architecture": without_home(spec.module or spec.architecture),
        "library": f"{spec.library} {installed(spec.library)}" if spec.library else None,
        "arguments": spec.arguments,
        "weights": spec.weights if spec.weights_file is None else spec.weights_file.name,
        "seed": spec.seed,
        "preprocessing": spec.preprocessing.model_dump(),
        "recipe": spec.train.recipe.model_dump() if spec.train else taken[1]["how"] if taken else None,
    }
    write_atomically(folder / "model.json", json.dumps(described | facts, indent=1))
    return {key: facts[key] for key in ("weights_sha256", "parameters", "accuracy", "training") if key in facts}


def _train(spec: Network, folder: Path, store: Path, files: dict, recipe: str) -> tuple[Any, dict[str, Any]]:
    """Train, or take up a training that was cut short.

    Its folder is named after the recipe and the images that are trained on, and stays: when other images come, only the
    accuracy is measured again.
    """
    import numpy as np

    from pipeline.data.images import pixels as pixels_of
    from pipeline.networks.build import load
    from pipeline.networks.training.loop import CURVE_POINTS, fit
    from pipeline.storage.store import Reader

    assert spec.train is not None
    reader = Reader(store, files)
    split, valid, label = reader["split"][:], reader["valid"][:], reader["label"][:]
    chosen = {part: (split == part) & valid for part in (spec.train.split, "validation")}
    own = chosen[spec.train.split]
    if spec.train.fraction < 1:
        own = part_of(own, label, reader["image_id"][:], spec.train.fraction, spec.train.recipe.seed)
    if not own.any():
        raise MicrotomeError(
            f"data set {spec.train.dataset!r} has no valid images in split {spec.train.split!r} to train on"
        )

    def progress(done: int, steps: int, loss: float, accuracy: float) -> None:
        if done % max(1, steps // 10) < max(1, steps // CURVE_POINTS):
            so_far = f"step {done}/{steps}, loss {loss:.2f}, accuracy {accuracy:.0%}"
            print(f"  network {folder.name}: {so_far}", file=sys.stderr)

    network = load(spec.model_copy(update={"weights": "random"}))
    pixels, labels = pixels_of(reader, np.flatnonzero(own)), label[own]
    judging = chosen["validation"]
    validation = None
    if own is judging:
        validation = pixels, labels
    elif judging.any():
        validation = pixels_of(reader, np.flatnonzero(judging)), label[judging]
    training = f"training-{digest([recipe, hashlib.blake2b(pixels.data).hexdigest(), labels.tolist()])}"
    facts = fit(
        network,
        train=(pixels, labels),
        validation=validation,
        mean=spec.preprocessing.mean,
        std=spec.preprocessing.std,
        recipe=spec.train.recipe,
        folder=folder / training,
        progress=progress,
        device=device(),
        per_image=spec.preprocessing.per_image,
    )
    return network, facts | {"training": training}


def part_of(mask: np.ndarray, label: np.ndarray, image_id: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """(image) bool: a fraction of the images of a mask, of each class, one image at least; those without a class not.

    In an order of the ids that `seed` changes, so that a smaller part lies within a larger one.
    """
    import numpy as np

    slots = np.flatnonzero(mask & (label >= 0))
    names = (f"{seed}/part/{name}".encode("utf-8", "surrogateescape") for name in image_id[slots])
    key = np.frombuffer(b"".join(hashlib.blake2b(name, digest_size=8).digest() for name in names), "<u8")
    order = np.lexsort((key, label[slots]))
    there = np.bincount(label[slots])
    place = np.arange(len(slots)) - (np.cumsum(there) - there)[label[slots][order]]
    wanted = np.maximum(1, np.rint(fraction * there))
    found = np.zeros(len(mask), bool)
    found[slots[order[place < wanted[label[slots][order]]]]] = True
    return found
