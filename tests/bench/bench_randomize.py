"""Steps a second of runs on corrupted data, against bare forward + backward + update of the same network.

    python -m tests.bench.bench_randomize [--images 2048] [--networks mlp-1x512 alexnet]        one thread of the CPU
    python -m tests.bench.bench_randomize --device cuda --images 50000 --together 4             on a GPU

The bare step has its minibatch ready, whitened and in the network's memory format, and the same precision; ours takes
it from the bytes of the data set, and counts loss and accuracy. On a CPU the two take turns and the shorter of each
is told, in CPU seconds; on a GPU a whole epoch of ours is timed by the clock, with its test and its one wait for the
device, and floating-point operations a second are told too, for one run and for several side by side.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import load
from pipeline.stages.randomize.settings import How
from pipeline.stages.randomize.training import Sets, Training, repeatable, train
from tests.bench.timing import seconds

MODULE = "config/networks/zhang2017.py"
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp-1x512": ("mlp", {}),
    "mlp-3x512": ("mlp", {"hidden": 3}),
    "alexnet": ("alexnet", {}),
    "inception": ("inception", {}),
}
TURNS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--together", type=int, default=4, help="runs side by side, on a GPU")
    given = parser.parse_args()
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (given.images + 256, 3, 32, 32), np.uint8)
    labels = draw.integers(0, 10, len(images))
    sets = Sets(images[256:], labels[256:], images[:256], labels[:256])
    with repeatable(given.device):
        for name in given.networks:
            function, arguments = NETWORKS[name]
            spec = NetworkSpec(module=f"{MODULE}:{function}", arguments=arguments)
            on_cpu(name, spec, sets) if given.device == "cpu" else on_gpu(name, spec, sets, given.together)


def on_cpu(name: str, spec: NetworkSpec, sets: Sets) -> None:
    for crop in (False, True):
        training = started(spec, sets, "cpu", crop)
        bare = bare_step(load(spec).to(memory_format=training.format), training)
        ours = partial(each_step, training)
        bare(), ours()
        found = [(seconds(partial(repeated, bare, training.steps)), seconds(ours)) for _ in range(TURNS)]
        plain, own = (min(each) for each in zip(*found, strict=True))
        plain, own = plain / training.steps, own / training.steps
        how = f"{name}{', random crop' if crop else ''}, {'bfloat16' if training.bfloat16 else 'float32'}"
        print(
            f"{how:38s} bare {plain * 1e3:7.1f} ms a step, ours {own * 1e3:7.1f}, ratio {plain / own:.2f}", flush=True
        )


def on_gpu(name: str, spec: NetworkSpec, sets: Sets, together: int) -> None:
    with FlopCounterMode(display=False) as counter:
        bare_step(load(spec), started(spec, sets, "cpu", False))()
    flops = counter.get_total_flops()
    for count in (1, together):
        trainings = [started(spec, sets, "cuda", True, seed) for seed in range(count)]
        begin = time.perf_counter()
        train(trainings)
        spent = time.perf_counter() - begin
        steps = sum(one.steps * len(one.curve) for one in trainings)
        print(
            f"{name}, {count} side by side on {torch.cuda.get_device_name()}: {steps / spent:,.0f} steps a second, "
            f"{steps * flops / spent / 1e12:.1f} TFLOP/s, {spent / len(trainings[0].curve):.2f} s an epoch",
            flush=True,
        )


def started(spec: NetworkSpec, sets: Sets, device: str, crop: bool, seed: int = 0) -> Training:
    how = How(seed=seed, crop=28, random_crop=crop, epochs=3)
    return Training(load(spec), sets, how, device=device)


def repeated(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def each_step(training: Training) -> None:
    training.begin_epoch()
    for number in range(training.steps):
        training.step(number)


def bare_step(network: nn.Module, training: Training) -> Callable[[], None]:
    network.train()
    images = torch.randn(training.size, 3, 28, 28).contiguous(memory_format=training.format)
    labels = torch.randint(0, 10, (training.size,))
    optimiser = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)

    def step() -> None:
        optimiser.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=training.bfloat16):
            logits = network(images)
        cross_entropy(logits.float(), labels).backward()
        optimiser.step()

    return step


if __name__ == "__main__":
    main()
