"""What extraction and dissection cost beside a bare forward over the same images: ratios, measured in one run.

    python -m tests.bench.bench_costs [--images 48]    measure, write build/bench.json, print the table
    python -m tests.bench.bench_costs --docs           put the table of build/bench.json into docs/performance.md

The network is torchvision's VGG-16 with random weights, at 224 x 224, to conv5_3 (`features.29`, after the ReLU): the
bare forward is `torch.inference_mode` over images in memory, in the micro-batches and the memory format that the
pipeline uses, and ends there. Everything runs on one thread, and CPU seconds are compared, so that other work on the
machine disturbs little. What is compared takes turns, A B A B A, and medians are taken.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pipeline.config.cluster import Cluster
from pipeline.config.networks import Network
from pipeline.data.images import Images
from pipeline.networks import forward
from pipeline.networks.build import load
from pipeline.networks.checkpoint import sha256, write_safetensors
from pipeline.stages.dissect import intersections, work
from pipeline.stages.dissect import thresholds as dissect_thresholds
from pipeline.stages.dissect.work import Concepts, CountedShard
from pipeline.stages.extract import layers as extract_layers
from pipeline.stages.extract import stage as extract
from pipeline.stages.extract import tasks as extract_tasks
from pipeline.storage.manifest import Files
from pipeline.storage.store import Array, StoreRef, create, metadata_files, write
from pipeline.workers.client import client
from pipeline.workers.pool import pool
from pipeline.workers.tasks import run_tasks
from tests.bench.made import activations

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "build" / "bench.json"
PAGE = ROOT / "docs" / "performance.md"
MARKS = "<!-- made by python -m tests.bench.bench_costs --docs -->", "<!-- end -->"
SIZE, SHARD, MICRO_BATCH = 224, 16, 16
LABELS = 56, 56
QUANTILE = 0.01
CONV5_3 = "features.29"
ALL = [f"features.{k}" for k in (1, 3, 6, 8, 11, 13, 15, 18, 20, 22, 25, 27, 29)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.peak[0], int(given.peak[1]))
        return
    if not given.docs:
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(measure(given.images), indent=1) + "\n")
    text = table(json.loads(RECORD.read_text()))
    print(text)
    if given.docs:
        page = PAGE.read_text()
        head, rest = page.split(MARKS[0])
        PAGE.write_text(f"{head}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.split(MARKS[1])[1]}")


def measure(images: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, Any] = {"machine": processor(), "images": images} | extraction(folder, images)
        found["dissection"] = dissection(folder, found["bare"])
        found["peak"] = {what: [child_peak(what, times) for times in (1, 4)] for what in ("extract", "dissect")}
        found["workers"] = on_workers(folder)
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


# Extraction -----------------------------------------------------------------------------------------------------------


def extraction(folder: Path, count: int) -> dict[str, Any]:
    """CPU seconds an image: the bare forward, extraction of conv5_3, of it pooled, and of all 13 layers."""
    import torch

    images = noise(folder / "images.zarr", count, SIZE)
    pixels = torch.from_numpy(images.reader()["image"][:])
    one, every = (network(folder, "vgg16", layers, MICRO_BATCH) for layers in ([CONV5_3], ALL))
    features = forward.network_of(one).features[: int(CONV5_3.split(".")[1]) + 1]

    def bare() -> None:
        with torch.inference_mode():
            for at in range(0, count, MICRO_BATCH):
                features(forward.normalise(pixels[at : at + MICRO_BATCH], one.spec))

    single, single_layers = tasks(folder / "single", one, images)
    _, pooled_layers = tasks(folder / "pooled", one, images, pooled=True)
    _, all_layers = tasks(folder / "every", every, images)
    logits = folder / "single" / "logits.zarr"
    kinds: dict[str, Callable[[], Any]] = {
        "extract": lambda: shards(one, images, single_layers, logits),
        "pooled": lambda: shards(one, images, pooled_layers, logits),
        "all": lambda: shards(every, images, all_layers, logits),
    }
    bare()  # the first forward sets things up
    spent: dict[str, list[float]] = {name: [] for name in ("bare", *kinds)}
    for name in ("extract", "all", "extract", "pooled", "extract"):
        spent["bare"].append(cpu(bare))
        spent[name].append(cpu(kinds[name]))
    spent["bare"].append(cpu(bare))
    values = single.parameters  # of the whole network
    stored = sum(path.stat().st_size for path in (folder / "every").rglob("*") if path.is_file())
    raw = 2 * count * sum(int(np.prod(layer.info.shape)) for layer in all_layers)
    return {name: median(seconds) / count for name, seconds in spent.items()} | {
        "parameters": values,
        "all_bytes": raw / count,
        "shrinks": stored / raw,
    }


def noise(store: Path, count: int, size: int, shard: int = SHARD) -> Images:
    """Images of smooth noise, ingested."""
    rng = np.random.default_rng(0)
    create(
        store,
        {"image": Array(("image", "channel", "y", "x"), (count, 3, size, size), np.uint8, (shard, 3, size, size))},
        {},
    )
    files: Files = {}
    for at in range(0, count, shard):
        coarse = rng.integers(0, 256, (min(shard, count - at), 3, size // 8, size // 8), np.uint8)
        files |= write(store, {"image": ((at, 0, 0, 0), coarse.repeat(8, axis=2).repeat(8, axis=3))})
    contents = [str(k) for k in range(-(-count // shard))]
    return Images(store, files | metadata_files(store), count, (size, size), shard, contents, {}, [])


def network(folder: Path, name: str, layers: list[str], micro_batch: int) -> forward.Model:
    spec = Network.model_validate(
        {"torchvision": name, "weights": "random", "layers": layers, "numerics": {"micro_batch": micro_batch}}
    )
    weights = folder / f"{name}.safetensors"
    if not weights.exists():
        write_safetensors(weights, load(spec).state_dict())
    return forward.Model(name, spec.model_dump_json(), weights, sha256(weights), name)


def tasks(
    folder: Path, model: forward.Model, images: Images, pooled: bool = False
) -> tuple[extract_tasks.Extraction, list[extract_layers.LayerStore]]:
    spec = model.spec
    prepared = extract_tasks.prepare_extraction(model, images.size, spec.layers, extract.VERSION)
    layers = []
    for info in prepared.layers:
        home = folder / prepared.ids[info.name] / "activations.zarr"
        scale = prepared.scales[info.name]
        layers.append(extract_layers.LayerStore(prepared.ids[info.name], home, info, scale, pooled))
    assert prepared.classes is not None
    extract_layers.open_logits(folder / "logits.zarr", images, prepared.classes)
    return prepared, [extract_layers.open_layer(layer, images) for layer in layers]


def shards(model: forward.Model, images: Images, layers: list[extract_layers.LayerStore], logits: Path) -> None:
    for k in range(len(images.contents)):
        extract_tasks.extract_shard(model, images.store, images.files_of(k), k, images.range(k), layers, logits)


# Dissection -----------------------------------------------------------------------------------------------------------


def dissection(folder: Path, bare: float) -> dict[str, Any]:
    """CPU seconds an image of thresholds and IoU, from stores on the disk: as it is, and with more of one thing."""
    dissect_once(folder / "warm", 8, 8, 10)  # compiles, or loads what was compiled

    def cost(name: str, images: int = 256, units: int = 512, concepts: int = 300) -> dict[str, float]:
        thresholds, iou = dissect_once(folder / name, images, units, concepts)
        return {"images": images, "units": units, "concepts": concepts, "thresholds": thresholds, "iou": iou}

    return {
        "base": cost("base"),
        "images": [cost(f"images-{n}", images=n) for n in (128, 512)],
        "units": [cost(f"units-{n}", units=n) for n in (128, 256)],
        "concepts": [cost(f"concepts-{n}", concepts=n) for n in (30, 1200)],
        "bare": bare,
    }


def dissect_once(
    folder: Path,
    images: int,
    units: int,
    concepts: int,
    shard: int = 64,
    seconds: Callable[[Callable[[], object]], float] = cpu,
) -> tuple[float, float]:
    """The tasks of the stage `dissect` on made activations of 14 x 14 positions: seconds an image of both parts."""
    layer, counted, labels = made(folder, images, units, concepts, shard)
    found: dict[str, np.ndarray] = {}

    def thresholds() -> None:
        sample = counted[: dissect_thresholds.SAMPLE_SHARDS]
        _, bracket = dissect_thresholds.sample_layer(layer.at(sample), sample, LABELS, "edge", QUANTILE)
        threshold, left = np.zeros(units, np.float16), np.arange(units)
        while len(left):
            _, tail = dissect_thresholds.tail_layer(layer, left, bracket, counted, LABELS, "edge")
            result = tail.result(QUANTILE)
            threshold[left[result.certified]] = result.threshold[result.certified]
            bracket, left = tail.refine(QUANTILE)[~result.certified], left[~result.certified]
        found["threshold"] = threshold

    def iou() -> None:
        wanted = [(layer, False, {one.shard for one in counted}, found["threshold"])]
        intersections.count_run(wanted, counted, labels, "edge")

    return tuple(min(seconds(call) for _ in range(2)) / images for call in (thresholds, iou))  # type: ignore[return-value]


def made(
    folder: Path, images: int, units: int, concepts: int, shard: int
) -> tuple[work.LayerSource, list[CountedShard], Concepts]:
    """Stores of activations and of label maps in three categories, patches of 7 x 7."""
    rng = np.random.default_rng(0)
    maps, size = folder / "activations.zarr", (images, units, 14, 14)
    whole = -(-units // 64) * 64
    block = min(64, units)
    shape = Array(
        ("image", "unit", "y", "x"), size, np.float16, (shard, block, 14, 14), (shard, max(whole, block), 14, 14)
    )
    if units < 64:
        shape = Array(("image", "unit", "y", "x"), size, np.float16, (shard, units, 14, 14), (shard, units, 14, 14))
    create(maps, {"activation": shape}, {"scale": 1.0})
    label = folder / "concepts.zarr"
    create(
        label,
        {"label_map": Array(("image", "category", "y", "x"), (images, 3, *LABELS), np.uint16, (shard, 1, *LABELS))},
        {},
    )
    edges = np.linspace(1, concepts + 1, 4).astype(int)
    files: Files = {}
    label_files: Files = {}
    counted = []
    for k, at in enumerate(range(0, images, shard)):
        count = min(shard, images - at)
        files |= write(maps, {"activation": ((at, 0, 0, 0), activations(k, count, units, 14))})
        patches = [rng.integers(low, high, (count, 1, 8, 8)) for low, high in itertools.pairwise(edges)]
        drawn = np.concatenate(patches, axis=1).repeat(7, axis=2).repeat(7, axis=3).astype(np.uint16)
        label_files |= write(label, {"label_map": ((at, 0, 0, 0), drawn)})
        rows = np.arange(count)
        counted.append(CountedShard(k, rows, rows % 20, np.roll(rows, 1)))
    activation = StoreRef(maps, files | metadata_files(maps))
    layer = work.LayerSource("conv5_3", "made", activation, (units, 14, 14), 1.0, "")
    numbers = tuple(range(1, concepts + 1))
    names = tuple(map(str, numbers))
    place = tuple(int(np.searchsorted(edges, number, side="right")) - 1 for number in numbers)
    labels = StoreRef(label, label_files | metadata_files(label))
    return layer, counted, Concepts(labels, ("a", "b", "c"), (0, 1, 2), names, numbers, place)


# Memory ---------------------------------------------------------------------------------------------------------------


def child_peak(what: str, times: int) -> float:
    """Peak memory in bytes of a process of its own that does a stage's tasks on so many times the images."""
    command = [sys.executable, "-m", "tests.bench.bench_costs", "--peak", what, str(times)]
    said = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    return float(said.split()[-1])


def peak(what: str, times: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "extract":
            images = noise(folder / "images.zarr", 32 * times, 64, shard=16)
            model = network(folder, "squeezenet1_1", [f"features.{k}" for k in range(13)], MICRO_BATCH)
            _, layers = tasks(folder, model, images)
            shards(model, images, layers, folder / "logits.zarr")
        else:
            dissect_once(folder, 64 * times, 256, 300, shard=32)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


# Workers --------------------------------------------------------------------------------------------------------------


def on_workers(folder: Path, count: int = 64, of: Sequence[int] = (1, 2)) -> list[dict[str, float]]:
    """ResNet-18 at 224 x 224 on 1 and 2 workers, or `of` others: CPU seconds an image of the workers, and images a
    second of the clock, beside a bare forward on one thread of this process."""
    import torch

    images = noise(folder / "workers.zarr", count, SIZE, shard=8)
    pixels = torch.from_numpy(images.reader()["image"][:])
    model = network(folder, "resnet18", ["layer4"], 8)
    _, layers = tasks(folder / "workers", model, images)
    logits = folder / "workers" / "logits.zarr"
    plain = forward.network_of(model)

    def bare() -> None:
        with torch.inference_mode():
            for at in range(0, count, 8):
                plain(forward.normalise(pixels[at : at + 8], model.spec))

    bare()
    found = []
    for workers in of:
        cluster = Cluster(workers=workers)
        every = [
            (model, images.store, images.files_of(k), k, images.range(k), layers, logits)
            for k in range(len(images.contents))
        ]
        with pool(cluster, folder) as address:
            os.environ["MICROTOME_POOL"] = str(address)
            with client(cluster, folder) as there:
                there.wait_for_workers(workers, timeout=120)
                list(run_tasks(there, extract_tasks.extract_shard, every[:2], 2, "first"))  # loads the network
                there.run(forward.network_of, model)
                began = time.perf_counter()
                spent = cpu(bare)
                clock = time.perf_counter() - began
                before, began = sum(there.run(time.process_time).values()), time.perf_counter()
                list(run_tasks(there, extract_tasks.extract_shard, every, len(every), f"{workers} workers"))
                took = time.perf_counter() - began
                used = sum(there.run(time.process_time).values()) - before
            del os.environ["MICROTOME_POOL"]
        found.append(
            {
                "workers": workers,
                "cpu": used / count,
                "bare_cpu": spent / count,
                "rate": count / took,
                "bare_rate": count / clock,
            }
        )
    return found


# The table ------------------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    bare, part = found["bare"], found["dissection"]
    base = part["base"]

    def added(seconds: float) -> str:
        return f"{100 * seconds / bare:+.1f} %"

    rows = [
        ("bare forward to conv5_3, one thread", f"{1e3 * bare:.0f} ms of CPU an image", ""),
        ("extraction of conv5_3 with its store and logits", added(found["extract"] - bare), "at most +15 %"),
        ("the same, `store: pooled`", added(found["pooled"] - bare), ""),
        (f"extraction of all 13 layers, {found['all_bytes'] / 1e6:.0f} MB an image", added(found["all"] - bare), ""),
        ("thresholds of 512 units at 56 x 56", added(base["thresholds"]), ""),
        ("IoU with 300 concepts", added(base["iou"]), ""),
        ("thresholds and IoU", added(base["thresholds"] + base["iou"]), "at most +5 %"),
    ]
    for what, (once, four) in found["peak"].items():
        rows.append((f"peak memory of {what} on 4 times the images", f"{four / once:.2f} times", "1"))
    for one in found["workers"]:
        rows.append(
            (
                f"ResNet-18, layer4, {one['workers']} worker{'s' * (one['workers'] > 1)}: CPU an image",
                f"{one['cpu'] / one['bare_cpu']:.2f} of a bare forward",
                "",
            )
        )
        rows.append(
            ("images a second of the clock, against one bare thread", f"{one['rate'] / one['bare_rate']:.2f} times", "")
        )
    for what, unit in (("images", "an image"), ("units", "a unit and image"), ("concepts", "an image")):

        def each(one: dict[str, float], per: str = what) -> float:
            return (one["thresholds"] + one["iou"]) / (one["units"] if per == "units" else 1)

        for one in part[what]:
            name = f"dissection {unit}, {one[what]:,.0f} {what} for {base[what]:,.0f}"
            rows.append((name, f"{each(one) / each(base):.2f} times", ""))
    widths = [max(len(row[at]) for row in (*rows, ("what", "measured", "wanted"))) for at in range(3)]
    lines = [("what", "measured", "wanted"), tuple("-" * width for width in widths), *rows]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


if __name__ == "__main__":
    main()
