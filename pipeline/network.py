"""The stage `network`: weights are read, drawn or trained, checked, and written as `networks/<network>/`.

Writes
    model.safetensors  the state dict, tensors only
    model.json         architecture, sha256 of the weights, preprocessing, parameters, accuracy and training curve
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import stage
from pipeline.cluster import client, device, run_tasks
from pipeline.config import Network
from pipeline.errors import MicrotomeError
from pipeline.identity import FileDigests, crc32c
from pipeline.manifest import write_atomically
from pipeline.networks import published_file
from pipeline.published import installed, weight_files

if TYPE_CHECKING:
    from pipeline.plan import Plan, Step

VERSION = 1
CODE = (
    "kernels/grey.py",
    "pipeline/checkpoint.py",
    "pipeline/libraries",
    "pipeline/network.py",
    "pipeline/networks.py",
    "pipeline/training.py",
)


def settings(spec: Network, digests: FileDigests) -> dict[str, Any]:
    """What the network's id is made of; for a trained one its recipe, since its weights are not known before."""
    made_of: dict[str, Any] = {"architecture": architecture(spec, digests)}
    match spec.weights:
        case "train":
            assert spec.train is not None
            # How often it is saved changes no weight.
            made_of["train"] = spec.train.model_dump(exclude={"recipe": {"checkpoint_every"}}) | {
                "preprocessing": spec.preprocessing.model_dump(),
                "seed": spec.seed,
            }
        case "random":
            made_of["random"] = spec.seed
        case _ if spec.published:
            made_of["checkpoint"] = _published_digest(spec, digests)
        case path:
            made_of["checkpoint"] = digests(path)
            made_of["prefix"] = spec.prefix
    return made_of


def architecture(spec: Network, digests: FileDigests) -> dict[str, Any]:
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


def _published_digest(spec: Network, digests: FileDigests) -> str | dict[str, str]:
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
            "folder": folder / f"training-{step.id}",
        }
    with client(plan.config.cluster, plan.scratch) as workers:
        (facts,) = run_tasks(workers, make, [(spec, folder, training)], 1, step.name)
    files = {}
    for name in ("model.safetensors", "model.json"):
        data = (folder / name).read_bytes()
        files[name] = (len(data), crc32c(data))
    stage.finish(plan, step, began, facts["weights_sha256"], files, facts)


def make(spec: Network, folder: Path, training: dict[str, Any] | None) -> dict[str, Any]:
    """On a worker: build, load or train; write the two files; return the small facts."""
    from pipeline.checkpoint import sha256, write_safetensors
    from pipeline.networks import load

    if spec.train is not None:
        assert training is not None
        network, facts = _train(spec, f"network {folder.name}", **training)
    else:
        network, facts = load(spec), {}
    path = folder / "model.safetensors"
    write_safetensors(path, network.state_dict())
    facts |= {
        "weights_sha256": sha256(path),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    described = {
        "architecture": spec.module or spec.architecture,
        "library": f"{spec.library} {installed(spec.library)}" if spec.library else None,
        "arguments": spec.arguments,
        "weights": spec.weights if spec.weights_file is None else spec.weights_file.name,
        "seed": spec.seed,
        "preprocessing": spec.preprocessing.model_dump(),
        "recipe": spec.train.recipe.model_dump() if spec.train else None,
    }
    write_atomically(folder / "model.json", json.dumps(described | facts, indent=1))
    return {key: facts[key] for key in ("weights_sha256", "parameters", "accuracy") if key in facts}


def _train(spec: Network, name: str, store: Path, files: dict, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Train, or take up a training that was cut short; the finished weights stay in `folder` for the same recipe."""
    from pipeline.networks import load
    from pipeline.store import Reader
    from pipeline.training import CURVE_POINTS, fit

    assert spec.train is not None
    reader = Reader(store, files)
    split, valid, label = reader["split"][:], reader["valid"][:], reader["label"][:]
    chosen = {part: (split == part) & valid for part in (spec.train.split, "validation")}
    if not chosen[spec.train.split].any():
        raise MicrotomeError(
            f"data set {spec.train.dataset!r} has no valid images in split {spec.train.split!r} to train on"
        )
    images = reader["image"][:]

    def progress(done: int, steps: int, loss: float, accuracy: float) -> None:
        if done % max(1, steps // 10) < max(1, steps // CURVE_POINTS):
            print(f"  {name}: step {done}/{steps}, loss {loss:.2f}, accuracy {accuracy:.0%}", file=sys.stderr)

    network = load(spec.model_copy(update={"weights": "random"}))
    parts = {part: (images[mask], label[mask]) for part, mask in chosen.items() if mask.any()}
    facts = fit(
        network,
        train=parts[spec.train.split],
        validation=parts.get("validation"),
        mean=spec.preprocessing.mean,
        std=spec.preprocessing.std,
        recipe=spec.train.recipe,
        folder=folder,
        progress=progress,
        device=device(),
    )
    return network, facts
