"""What `sight` and `probes` cost beside a bare forward over the same images: CPU time, one thread, in one process.

    python -m tests.bench.bench_looking [--images 64]

Weights and images are random: torchvision's ResNet-18 at 64 x 64 pixels, 8 blocks, and the ViT of `config/cifar10.yaml`
at 32 x 32, 4 blocks. What is timed is what workers do, with what they read and write. Beside each ratio stands how many
forwards the measure takes as it is defined: one, one more for each skip connection that is left out, and for receptive
fields a forward and a backward pass (twice a forward) from each layer, of `gradients` images of a minibatch.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.config.networks import Network
from pipeline.data.images import Images
from pipeline.data.minibatches import Minibatch, pixels_of
from pipeline.networks import forward
from pipeline.networks.build import load
from pipeline.networks.checkpoint import sha256, write_safetensors
from pipeline.networks.layers import choose, survey
from pipeline.stages.probes import tasks
from pipeline.stages.sight import tasks as sight_tasks
from pipeline.storage.store import StoreRef, create
from tests.bench.bench_costs import noise
from tests.bench.timing import seconds

MINIBATCH, GRADIENTS = 32, 4
NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "ResNet-18": (64, {"torchvision": "resnet18", "layers": ["layer?.?"]}),
    "ViT": (32, {"module": "config/networks/cifar.py:vit", "layers": ["encoder.layers.*_?"]}),
}
"""Pixels of the images, and the network with its layers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("network     layers   what                 of a forward   forwards it takes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, (size, raw) in NETWORKS.items():
            images = noise(folder / f"{size}.zarr", given.images, size, MINIBATCH)
            spec = Network.model_validate({"weights": "random", **raw})
            weights = folder / f"{title}.safetensors"
            write_safetensors(weights, load(spec).state_dict())
            model = forward.Model(title, spec.model_dump_json(), weights, sha256(weights), title)
            looked(title, model, images, folder)
            probed(title, model, images, folder)


def bare(model: forward.Model, images: Images) -> float:
    """CPU seconds of the forward of all images in minibatches."""
    network, pixels = forward.network_of(model), torch.from_numpy(images.reader()["image"][:])

    def run() -> None:
        with torch.inference_mode():
            for part in pixels.split(MINIBATCH):
                network(forward.normalise(part, model.spec))

    run()
    return median(seconds(run) for _ in range(3))


def looked(title: str, model: forward.Model, images: Images, folder: Path) -> None:
    prepared = sight_tasks.prepare_seen(model, images.size, model.spec.layers)
    batches = [Minibatch(0, tuple(range(at, at + MINIBATCH))) for at in range(0, images.count, MINIBATCH)]
    layers, skips = len(prepared.layers), len(prepared.skips)
    floors = {
        "attention": 1.0,
        "localisation": 1.0,
        "skips": 1.0 + skips,
        "receptive_field": (1 + 2 * layers) * GRADIENTS / MINIBATCH,
    }
    for measure, floor in floors.items():
        if measure in prepared.absent:
            continue
        store = folder / f"{title}-{measure}.zarr"
        work = sight_tasks.Work(model, images.size, prepared, (measure,), GRADIENTS, store, MINIBATCH)
        create(store, sight_tasks.arrays(work, len(batches)), {})

        def run(work: sight_tasks.Work = work) -> None:
            for at, batch in enumerate(batches):
                sight_tasks.look(work, pixels_of(images, batch), str(at), batch)

        row(title, layers, f"sight: {measure}", model, images, run, floor)


def probed(title: str, model: forward.Model, images: Images, folder: Path) -> None:
    surveyed = survey(forward.network_of(model), (3, *images.size))
    layers = []
    for info in choose(forward.network_of(model), surveyed, model.spec.layers, title):
        vectors = tasks.vectors_of(info, ("pooled", "class_token", "spatial"), 3)
        layers.append(tasks.ProbedLayer(info, info.name, 1.0, folder / "features", vectors))
    shards = [images.range(at) for at in range(len(images.contents))]

    def run() -> None:
        for at, bounds in enumerate(shards):
            tasks.computed(model, StoreRef(images.store, images.files_of(at)), bounds, layers)

    row(title, len(layers), "probes: features", model, images, run, 1.0)


def row(
    title: str, layers: int, what: str, model: forward.Model, images: Images, run: Callable[[], None], floor: float
) -> None:
    run()
    ratios = [seconds(run) / bare(model, images) for _ in range(3)]
    print(f"{title:11} {layers:6}   {what:20} {median(ratios):12.2f}   {floor:17.2f}", flush=True)


if __name__ == "__main__":
    main()
