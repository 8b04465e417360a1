"""The speed of a network here: one micro-batch of noise with random weights, on the device that tasks use.

The plan requests it in the process that inspects networks, with one thread. The answer depends on the architecture, the
size, the numerics and the machine, and is cached under them. A network that would take longer than `LONGEST` does not
run: its speed is estimated from its floating-point operations and the speed of a matrix product.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import build
from pipeline.networks.layers import one_attention_path

LONGEST = 4.0  # seconds of a probe, besides building the network
SLOWEST = 2e10  # floating-point operations per second that any thread reaches
EFFICIENCY = 0.5  # of a network's operations, relative to a matrix product
MOST_PARAMETERS = 500_000_000  # for which random weights are drawn


class Probe(BaseModel):
    """One network to run, with random weights."""

    model_config = ConfigDict(extra="forbid")

    network: NetworkSpec
    input_shape: tuple[int, ...]
    micro_batch: int
    channels_last: bool
    device: str


def measure(wanted: Probe) -> dict[str, Any]:
    """Return `images_per_second` and the number of `images` measured (0: estimated), or `skipped`, the reason.

    Also return `flops`, the floating-point operations of one image, where they can be counted.
    Times are CPU time, or wall-clock time on a GPU, so that other work on the machine has little effect.
    """
    spec = wanted.network
    counted: dict[str, Any] = {}
    try:
        sketch = build(spec, device="meta")
        flops = _flops(sketch, wanted.input_shape)
    except Exception:  # a network that cannot run on the meta device; each fails in its own way
        flops = 0
    else:
        counted = {"flops": flops}
        if sum(parameter.numel() for parameter in sketch.parameters()) > MOST_PARAMETERS:
            return {"skipped": "too many parameters for a probe"}
    if wanted.device == "cpu" and flops / SLOWEST > LONGEST:
        return {"images_per_second": EFFICIENCY * _matrix_speed() / flops, "images": 0} | counted
    if wanted.device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "torch sees no GPU here"}
    network = build(spec).to(wanted.device)
    if wanted.channels_last:
        network = network.to(memory_format=torch.channels_last)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), one_attention_path():
            single = _seconds(network, wanted, 1)
            if single > LONGEST:
                return {"images_per_second": 1 / single, "images": 1} | counted
            single = min(single, _seconds(network, wanted, 1))  # the first forward pass includes setup
            count = max(1, min(wanted.micro_batch, int(LONGEST / single)))
            return {"images_per_second": count / _seconds(network, wanted, count), "images": count} | counted
    except Exception as error:
        return {"skipped": f"{type(error).__name__} in the probe"}
    finally:
        torch.set_num_threads(threads)


def _flops(network: nn.Module, input_shape: tuple[int, ...]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros((1, *input_shape), device="meta"))
    return counter.get_total_flops()


def _matrix_speed() -> float:
    """Return the floating-point operations per second of one thread here, in a matrix product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    a = torch.rand(1024, 1024, generator=torch.Generator().manual_seed(0))
    seconds = []
    for _ in range(4):
        began = time.process_time()
        a @ a
        seconds.append(time.process_time() - began)
    torch.set_num_threads(threads)
    return 2 * 1024**3 / max(min(seconds), 1e-6)


def _seconds(network: nn.Module, wanted: Probe, count: int) -> float:
    clock: Callable[[], float] = time.process_time if wanted.device == "cpu" else time.perf_counter
    noise = torch.rand((count, *wanted.input_shape), generator=torch.Generator().manual_seed(0)).to(wanted.device)
    if wanted.channels_last:
        noise = noise.contiguous(memory_format=torch.channels_last)
    began = clock()
    network(noise)
    if wanted.device == "cuda":
        torch.cuda.synchronize()
    return max(clock() - began, 1e-6)
