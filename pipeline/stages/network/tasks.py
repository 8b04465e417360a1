"""Worker task of the stage `network`: build, load or train a network, and write its files."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks.published import installed
from pipeline.stages.network.results import Weights
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import digest
from pipeline.storage.redact import without_home
from pipeline.storage.store import StoreRef
from pipeline.workers.devices import device

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Training:
    """The images that a network is trained on, and the digest of all else that decides its weights."""

    images: StoreRef
    recipe: str


def make(
    spec: Network,
    folder: Path,
    training: Training | None,
    taken: tuple[Path, Mapping[str, Any]] | None = None,
) -> Weights:
    """Build, load or train a network, on a worker; write its two files; return the small facts.

    `taken` holds the file and facts of a run, if the weights are those of a run.
    """
    from pipeline.networks.build import load
    from pipeline.networks.checkpoint import sha256, write_safetensors

    if spec.train is not None:
        assert training is not None
        network, facts = _train(spec, folder, training)
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
        **({} if spec.within is None else {"within": spec.within}),
    }
    write_atomically(folder / "model.json", json.dumps(described | facts, indent=1))
    return Weights.read(facts)


def _train(spec: Network, folder: Path, given: Training) -> tuple[Any, dict[str, Any]]:
    """Train, or resume an interrupted training.

    The recipe and the training images name its folder, which stays: when other images arrive, only the accuracy is
    measured again.
    """
    import numpy as np

    from pipeline.data.images import pixels as pixels_of
    from pipeline.networks.build import load
    from pipeline.networks.training.loop import CURVE_POINTS, fit

    assert spec.train is not None
    reader = given.images.open()
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
    training = f"training-{digest([given.recipe, hashlib.blake2b(pixels.data).hexdigest(), labels.tolist()])}"
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
    """Select a fraction of each class in a mask, at least one image, as (image) bool; drop images without a class.

    Images are taken in an order of their ids that `seed` decides, so a smaller fraction lies within a larger one.
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
