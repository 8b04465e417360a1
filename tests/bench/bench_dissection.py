"""CPU time of the dissection kernels, one thread, on made activations: smooth, ReLU, some units and images livelier.

    python tests/bench/bench_dissection.py [--images 256] [--units 512]

Prints milliseconds per image, and as a multiple of the floor: reading the activations once. CPU time is that of the
process, so other work on the machine disturbs little. "compile" is the first call with an empty cache of numba.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="numba-")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from numpy.typing import NDArray

from kernels.dissection.brackets import Bracket, Tail
from kernels.dissection.counts import label_columns
from kernels.dissection.iou import count_shard
from kernels.dissection.threshold import count_tail, sample_bracket
from kernels.dissection.upsample import Size
from tests.bench.made import activations

SHARD = 64
QUANTILE = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--units", type=int, default=512)
    arguments = parser.parse_args()
    compile_all()
    for h, size, images in ((14, 56, arguments.images), (13, 224, max(SHARD, arguments.images // 4))):
        bench(images, arguments.units, h, size)


def compile_all() -> None:
    maps, labels = np.ones((1, 1, 2, 2), np.float16), np.ones((1, 1, 4, 4), np.uint16)
    bracket = timed("compile: sample", 1, lambda: sample_bracket(maps, (4, 4), "edge", 0.5), 0)
    timed("compile: tail", 1, lambda: count_tail(maps, bracket, (4, 4), "edge"), 0)
    prepared = timed("compile: labels", 1, lambda: label_columns(labels, [1], [0]), 0)
    timed("compile: IoU", 1, lambda: count_shard(maps, np.float16([0]), prepared, [0], "edge"), 0)


def bench(images: int, units: int, h: int, size: int) -> None:
    print(f"\n{images} images, {units} units, {h} x {h} -> {size} x {size}, quantile {QUANTILE}; ms per image")
    shards = [activations(k, min(SHARD, images - k), units, h) for k in range(0, images, SHARD)]
    floor = timed_ms(images, lambda: [shard.view(np.int16).max() for shard in shards])
    print(f"  {'read the activations once':34}{floor:9.3f}{1:9.0f}x")
    out = (size, size)
    sample = np.concatenate([shard[::8] for shard in shards])
    bracket = timed(
        "bracket, from every eighth image", images, lambda: sample_bracket(sample, out, "edge", QUANTILE), floor
    )
    threshold, live = np.zeros(units, np.float16), np.arange(units)
    rounds = 0
    while len(live):
        rounds += 1
        chosen = [shard if len(live) == units else np.ascontiguousarray(shard[:, live]) for shard in shards]
        name = f"thresholds, pass {rounds}: {len(live)} units"
        tails = timed(name, images, partial(tails_of, chosen, bracket, out), floor)
        tail = tails[0]
        for other in tails[1:]:
            tail = tail.merge(other)
        print(f"  {'':34}{tails[0].count.nbytes / 2**20:9.2f} MB a shard")
        found = tail.result(QUANTILE)
        threshold[live[found.certified]] = found.threshold[found.certified]
        bracket, live = tail.refine(QUANTILE)[~found.certified], live[~found.certified]
    concept = np.arange(1, 84)
    category = np.repeat([0, 1, 2], [40, 20, 23])
    maps = label_maps(len(shards[0]), size)
    labels = timed("labels of 3 categories", SHARD, lambda: label_columns(maps, concept, category), floor)
    group = np.arange(SHARD) % 20
    counts = timed("IoU", SHARD, lambda: count_shard(shards[0], threshold, labels, group, "edge"), floor)
    print(f"  {'active':34}{counts.unit_area.sum() / (SHARD * units * size**2):9.4f}")
    print(f"  {'':34}{sum(array.nbytes for array in vars(counts).values()) / 2**20:9.2f} MB a shard")


def tails_of(shards: list[NDArray[np.float16]], bracket: Bracket, size: Size) -> list[Tail]:
    return [count_tail(shard, bracket, size, "edge") for shard in shards]


def timed(name: str, images: int, call: Callable, floor: float):  # type: ignore[no-untyped-def]
    """Print a line; the result of the call."""
    repeats = 3 if floor else 1
    results = []
    milliseconds = timed_ms(images, lambda: results.append(call()), repeats)
    print(f"  {name:34}{milliseconds:9.3f}" + (f"{milliseconds / floor:9.0f}x" if floor else ""))
    return results[-1]


def timed_ms(images: int, call: Callable, repeats: int = 3) -> float:
    """Milliseconds of CPU time per image, the least of some calls."""
    spent = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return 1e3 * min(spent) / images


def label_maps(images: int, size: int) -> NDArray[np.uint16]:
    """Patches of 8 x 8 to a map, in three categories."""
    rng = np.random.default_rng(0)
    patches = [rng.integers(low, high, (images, 8, 8)) for low, high in ((0, 41), (41, 61), (61, 84))]
    return np.stack(patches, axis=1).repeat(size // 8, axis=2).repeat(size // 8, axis=3).astype(np.uint16)


if __name__ == "__main__":
    main()
