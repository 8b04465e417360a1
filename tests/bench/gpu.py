"""Extraction and dissection on a GPU against a bare forward, and where the rest of the time goes.

    CUDA_VISIBLE_DEVICES=0 python -m tests.bench.gpu [--images 512] [--networks vgg16 ...]    writes build/gpu.json
    python -m tests.bench.gpu --tiny            the same on the cores, a small network on a few images: that it runs

The bare forward is `torch.inference_mode` over images that are on the device already, in micro-batches; in float32 as
the pipeline computes, without TF32, and in bfloat16, which it does not, to see what that would bring. Extraction reads
images.zarr and writes the stores of one layer and the logits; `dissection` adds thresholds and IoU of as many units as
that layer has, at 14 x 14 positions, with 300 concepts at 56 x 56; with `store: none` it is the two passes over all
images, of true labels and permuted ones. Seconds are those of the clock, with the device idle before and after; on the
cores, of the CPU.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import pstats
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from pipeline.networks import forward
from pipeline.workers.devices import device
from tests.bench.bench_costs import dissect_once, network, noise, shards, tasks
from tests.bench.bench_stream import labelled, none

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "build" / "gpu.json"
LAYERS = {"vgg16": "features.29", "resnet50": "layer4", "vit_b_16": "encoder.layers.encoder_layer_11"}
TINY = {"squeezenet1_1": "features.12"}
CONCEPTS, SHARD, MICRO_BATCH = 300, 64, 32
SHOWN = 12  # lines of a profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--networks", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    if not given.tiny and device() != "cuda":
        parser.error("set CUDA_VISIBLE_DEVICES to the GPU to measure, or give --tiny")
    if given.tiny:
        found = measure(TINY, images=8, size=64, shard=4, micro_batch=2)
    else:
        found = measure({name: LAYERS[name] for name in given.networks}, given.images, 224, SHARD, MICRO_BATCH)
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
    print(report(found))


def measure(layers: dict[str, str], images: int, size: int, shard: int, micro_batch: int) -> dict[str, Any]:
    on = torch.cuda.get_device_name() if device() == "cuda" else "the cores"
    with tempfile.TemporaryDirectory() as name:
        return {
            "on": on,
            "torch": torch.__version__,
            "images": images,
            "networks": {
                each: one(Path(name) / each, each, layer, images, size, shard, micro_batch)
                for each, layer in layers.items()
            },
        }


def seconds(call: Callable[[], object]) -> float:
    """Of the clock with an idle device before and after, or on the cores of the CPU."""
    if device() == "cuda":
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return time.perf_counter() - began
    began = time.process_time()
    call()
    return time.process_time() - began


def one(folder: Path, name: str, layer: str, count: int, size: int, shard: int, micro_batch: int) -> dict[str, Any]:
    """Images a second of each kind, and profiles of the extraction on the device and of its Python."""
    folder.mkdir()
    images = noise(folder / "images.zarr", count, size, shard)
    pixels = torch.from_numpy(images.reader()["image"][:])
    model = network(folder, name, [layer], micro_batch)
    net = forward.network_of(model)
    batches = [forward.normalise(pixels[at : at + micro_batch], model.spec) for at in range(0, count, micro_batch)]

    def bare(dtype: torch.dtype) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode(), torch.autocast(device(), dtype, enabled=dtype is not torch.float32):
                for batch in batches:
                    net(batch)

        return run

    _, full = tasks(folder / "full", model, images)
    _, pooled = tasks(folder / "pooled", model, images, pooled=True)
    calls: dict[str, Callable[[], Any]] = {
        "bare forward, float32": bare(torch.float32),
        "bare forward, bfloat16": bare(torch.bfloat16),
        "extraction, `store: full`": lambda: shards(model, images, full, folder / "full" / "logits.zarr"),
        "extraction, `store: pooled`": lambda: shards(model, images, pooled, folder / "pooled" / "logits.zarr"),
    }
    spent: dict[str, list[float]] = {key: [] for key in calls}
    for call in calls.values():
        call()  # the first sets things up
    for _ in range(3):  # in turns: what else the machine does meets all of them
        for key, call in calls.items():
            spent[key].append(seconds(call))
    rates = {key: count / median(each) for key, each in spent.items()}
    units = full[0].info.shape[0]
    counted = sum(dissect_once(folder / "dissect", count, units, CONCEPTS, shard, seconds))
    concepts, labels = labelled(folder / "concepts.zarr", count, shard)
    passes = [none(folder / f"none-{k}", model, images, labels, concepts, seconds) for k in range(2)][-1]
    rates["extraction, `store: none`"] = count / passes["none: first pass"]
    rates["dissection, `store: none`"] = count / sum(passes.values())
    rates["dissection, all of it"] = 1 / (1 / rates["extraction, `store: full`"] + counted)
    extract_full = calls["extraction, `store: full`"]
    return {
        "layer": layer,
        "units": units,
        "images a second": rates,
        "on the device": device_profile(extract_full),
        "in Python": python_profile(extract_full),
    }


def device_profile(call: Callable[[], Any]) -> str:
    """The operations of torch that take longest."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device() == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        call()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return found.key_averages().table(sort_by=by, row_limit=SHOWN, max_name_column_width=50)


def python_profile(call: Callable[[], Any]) -> str:
    """The functions that take longest, without what they call: waiting for the device shows where it is waited for."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(SHOWN)
    return text.getvalue()


def report(found: dict[str, Any]) -> str:
    lines = [f"{found['images']} images, on {found['on']}, torch {found['torch']}"]
    for name, one in found["networks"].items():
        bare = one["images a second"]["bare forward, float32"]
        lines.append(f"\n{name}, {one['layer']}, {one['units']} units")
        lines += [
            f"  {key:28}  {rate:10,.1f} images/s  {100 * rate / bare:6.1f} % of the bare forward"
            for key, rate in one["images a second"].items()
        ]
        lines += [one["on the device"], one["in Python"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
