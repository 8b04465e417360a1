"""What data sets of a million images take: bytes, tasks, CPU and GPU hours, load of a scheduler, and what gives first.

    python -m tests.bench.bench_scheduler      first: what a scheduler does, into build/bench-scheduler.json
    python -m tests.bench.scale_plan           writes the tables of docs/scale.md, with the rates they go by

Shapes and operations come from the networks on torch's meta device, CPU rates from the stages, whose rates `make bench`
measures, and the speed of forwards on a core from the probe of `make plan`. No GPU was at hand: how fast one is, is an
assumption, named in the table.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.networks import Network
from pipeline.networks import prepare
from pipeline.networks.layer import LayerInfo
from pipeline.plan import cost
from pipeline.stages.dissect import stage
from pipeline.stages.extract import layers as extract_layers
from pipeline.stages.extract import stage as extract_stage
from pipeline.stages.extract import tasks as extract_tasks
from pipeline.stages.ingest import stage as ingest_stage
from tests.bench.bench_scheduler import RECORD

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
MARKS = "<!-- made by python -m tests.bench.scale_plan -->", "<!-- end -->"
SIZE, SHARD, LABELS, CONCEPTS, CATEGORIES = (224, 224), 64, (56, 56), 300, 3
GPU_FLOPS = 1e13  # float32 operations a second that a GPU is assumed to reach
FILES = 3  # of a shard of a layer: maps, maximum and mean; one more where there are special tokens

IMAGES = {
    "ImageNet-1k, validation": 50_000,
    "ImageNet-1k, train": 1_281_167,
    "Places365, validation": 36_500,
    "Places365, train": 1_803_460,
}
LAYERS = {
    "vit_l_16": [f"encoder.layers.encoder_layer_{k}" for k in (0, *range(1, 24, 2))],
    "resnet152": [
        *("layer1", "layer2.3", "layer2"),
        *(f"layer3.{k}" for k in range(4, 30, 5)),
        *("layer3", "layer4.0", "layer4.1", "layer4"),
    ],
}


@dataclass(frozen=True)
class Sketch:
    """A network of which no weight was made: its layers, the floating-point operations of an image, and its sizes."""

    name: str
    layers: Sequence[LayerInfo]
    flops: float
    parameters: int
    largest: int

    @property
    def values(self) -> int:
        """Of the maps of all layers, for one image."""
        return sum(math.prod(layer.shape) for layer in self.layers)

    @property
    def units(self) -> int:
        return sum(layer.shape[0] for layer in self.layers)


@dataclass(frozen=True)
class Need:
    """What one data set takes with one network. Hours are CPU hours of one core, or hours of one GPU."""

    images: int
    tasks: int
    files: int
    stored: float
    pixels: float
    labels: float
    decoding: float
    storing: float
    counting: float
    forward: float

    @property
    def gpu_task(self) -> float:
        """Seconds that a worker with a GPU, which has one core, spends on a task of `extract`."""
        return 3600 * (self.forward + self.storing) / self.tasks


def sketch(name: str) -> Sketch:
    import torch

    from pipeline.networks.build import build
    from pipeline.networks.layers import choose, survey
    from pipeline.networks.speed import _flops

    network = build(Network.model_validate({"torchvision": name, "weights": "random"}), device="meta")
    surveyed = survey(network, (3, *SIZE), None)
    layers = choose(network, surveyed, LAYERS[name], name)
    with torch.no_grad():
        flops = _flops(network, (3, *SIZE))
    return Sketch(name, layers, flops, sum(p.numel() for p in network.parameters()), surveyed.largest)


def need(one: Sketch, images: int) -> Need:
    """The arithmetic, all of it."""
    tasks = -(-images // SHARD)
    constant, position = stage.COUNTED
    files = sum(FILES + (layer.special > 0) for layer in one.layers)
    hour = 3600
    return Need(
        images,
        tasks,
        files=tasks * files,
        stored=images * one.values * 2 * cost.SHRINKS["maps"],
        pixels=images * 3 * SIZE[0] * SIZE[1] * cost.SHRINKS["pixels"],
        labels=images * 2 * CATEGORIES * LABELS[0] * LABELS[1] * cost.SHRINKS["labels"],
        decoding=images * ingest_stage.IMAGE / hour,
        storing=images * one.values * extract_stage.STORED / hour,
        counting=images * one.units * (constant + position * LABELS[0] * LABELS[1]) / hour,
        forward=images * one.flops / GPU_FLOPS / hour,
    )


def worker_bytes(one: Sketch) -> int:
    """What a task of `extract` needs of a worker."""
    spec = Network.model_validate({"torchvision": one.name, "weights": "random"})
    layers = [extract_layers.LayerStore("", Path(), layer, 1.0) for layer in one.layers]
    prepared = prepare.Prepared([], one.parameters, one.largest)
    return extract_tasks.memory_need(layers, prepared, spec, SHARD, SIZE)


def networks(sketches: Sequence[Sketch], speeds: Sequence[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = [("network", "GFLOP an image", "units", "MB an image in the stores", "images/s of a core", "GB a worker")]
    for one, speed in zip(sketches, speeds, strict=True):
        rate = speed.get("images_per_second")
        shown = "" if rate is None else f"{'' if speed['images'] else '~'}{rate:.2g}"
        mb = one.values * 2 * cost.SHRINKS["maps"] / 1e6
        rows.append(
            (one.name, f"{one.flops / 1e9:.1f}", f"{one.units:,}", f"{mb:.1f}", shown, f"{worker_bytes(one) / 1e9:.1f}")
        )
    return rows


def needs(one: Sketch) -> list[tuple[str, ...]]:
    rows = [
        ("data set", "images", "stores", "files", "tasks", "forward, GPU h", "storing, core h", "counting, core h",
         "decoding, core h")
    ]  # fmt: skip
    for name, images in IMAGES.items():
        found = need(one, images)
        hours = (found.forward, found.storing, found.counting, found.decoding)
        rows.append(
            (
                *(name, f"{images:,}", f"{found.stored / 1e12:.2f} TB", f"{found.files:,}", f"{found.tasks:,}"),
                *(f"{each:.3g}" for each in hours),
            )
        )
    return rows


def loads(sketches: Sequence[Sketch], scheduler: dict[str, Any]) -> list[tuple[str, ...]]:
    """Tasks a second that workers finish, and the share of a scheduler's thread that this is."""
    most = scheduler["most tasks a second of the scheduler's thread"]
    rows = [("network", "workers", "seconds a task", "tasks a second", "share of the scheduler")]
    for one in sketches:
        found = need(one, IMAGES["ImageNet-1k, train"])
        for kind, seconds in (
            ("GPU, stores written", found.gpu_task),
            ("GPU, nothing written", 3600 * found.forward / found.tasks),
        ):
            for workers in (8, 1000):
                rate = workers / seconds
                rows.append(
                    (
                        f"{one.name}, {kind}",
                        f"{workers:,}",
                        f"{seconds:.2g}",
                        f"{rate:,.1f}",
                        f"{100 * rate / most:,.1f} %",
                    )
                )
    return rows


def table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in lines
    )


def main() -> None:
    from pipeline.networks.speed import Probe, measure

    scheduler = json.loads(RECORD.read_text())
    sketches = [sketch(name) for name in LAYERS]
    speeds = []
    for one in sketches:
        asked = Network.model_validate({"torchvision": one.name, "weights": "random"})
        probe = Probe(
            network=asked, input_shape=(3, *SIZE), micro_batch=4, channels_last=asked.numerics.channels_last,
            device="cpu",
        )  # fmt: skip
        speeds.append(measure(probe))
    parts = [table(networks(sketches, speeds))]
    parts += [f"{one.name}, {len(one.layers)} layers:\n\n{table(needs(one))}" for one in sketches]
    parts.append(table(loads(sketches, scheduler)))
    parts.append(
        "The scheduler, measured:\n\n"
        + table([("what", "measured"), *((key, f"{value:,}") for key, value in scheduler.items())])
    )
    text = "\n\n".join(parts)
    page = PAGE.read_text()
    head, rest = page.split(MARKS[0])
    PAGE.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}")
    print(text)


if __name__ == "__main__":
    main()
