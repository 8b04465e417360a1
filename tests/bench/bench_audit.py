"""CPU time of the tests of explanations, one thread, against bare forwards and against Quantus.

    python -m tests.bench.bench_audit [--images 4] [--methods 8] [--rounds 3] [--size 64]

A ResNet-18 has random weights, and the maps of so many methods are random. A test and as many bare forwards as it makes
take turns, and the ratio is the median over the rounds. Where the package quantus is installed, its tests of the same
images, maps, network and settings are timed too: seconds an image and method.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import torch
import torchvision
from torch import nn
from toy_batch import toy

from pipeline.stages.audit.faithful import Deletion, Infidelity, Road, SensitivityN
from pipeline.stages.audit.located import Localisation, Pointing
from pipeline.stages.audit.trials.place import localisation, pointing
from pipeline.stages.audit.trials.registry import FUNCTIONS
from tests.bench.timing import seconds

ALLOWED = {
    "deletion": (Deletion(steps=16), 1.25),
    "road": (Road(shares=[0.1, 0.3, 0.5, 0.7, 0.9]), 3.0),
    "sensitivity_n": (SensitivityN(shares=[0.1], sets=32), 1.25),
    "infidelity": (Infidelity(sets=16), 1.25),
}
"""Options, and how much longer than its bare forwards a test may take."""
OTHERS_LONGER = 5.0
MICRO = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--methods", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    size = (given.size, given.size)
    pixels = draw.integers(0, 256, (given.images, 3, *size), dtype=np.uint8)
    maps = draw.standard_normal((given.methods, given.images, *size)).astype(np.float32)
    network = torchvision.models.resnet18().eval()
    own: dict[str, float] = {}
    print("test             of its bare forwards   allowed   milliseconds an image and method")
    for name, (options, allowed) in ALLOWED.items():
        ratios, times = [], []
        for _ in range(given.rounds):
            forwards = counted(
                network, lambda name=name, options=options: of_methods(network, pixels, maps, name, options)
            )
            times.append(forwards.seconds)
            ratios.append(forwards.seconds / seconds(lambda made=forwards.made: bare(network, size, made)))
        own[name] = 1000 * statistics.median(times) / given.images / given.methods
        print(f"{name:16} {statistics.median(ratios):20.3f}   {allowed:7.2f}   {own[name]:10.1f}", flush=True)
    of_place(pixels, maps[0], network)
    if util.find_spec("quantus") is not None:
        of_quantus(network, pixels, maps, own)


@dataclass
class Counted:
    """CPU seconds of a call, and the images that went through the network in it."""

    seconds: float
    made: int


def counted(network: nn.Module, call: Callable[[], object]) -> Counted:
    found = [0]

    def count(module: nn.Module, given: Any, output: torch.Tensor) -> None:
        found[0] += len(output)

    hook = network.register_forward_hook(count)
    try:
        return Counted(seconds(call), found[0])
    finally:
        hook.remove()


def of_methods(network: nn.Module, pixels: np.ndarray, maps: np.ndarray, name: str, options: Any) -> None:
    """Put the maps of all methods to a test, as a task of the stage does: what they share is computed once."""
    first = toy(network, pixels, maps[0], batch=MICRO)
    for number, own in enumerate(maps):
        batch = first.of(f"method {number}", "", own, {})
        batch.__dict__["network"] = network
        FUNCTIONS[name](batch, options)


def bare(network: nn.Module, size: tuple[int, int], images: int) -> None:
    """Run a network on so many images in micro-batches."""
    inputs = torch.rand(MICRO, 3, *size)
    with torch.no_grad():
        for _ in range(-(-images // MICRO)):
            network(inputs)


def of_place(pixels: np.ndarray, maps: np.ndarray, network: nn.Module) -> None:
    """Time tests without a forward, by image."""
    size = pixels.shape[-1]
    boxes = {at: np.array([[of, 4, 4, size // 2, size // 2] for of in range(1000)], float) for at in range(len(pixels))}
    batch = toy(network, pixels, maps, given={"localisation": boxes, "pointing": boxes}, batch=MICRO)
    assert batch.logits.shape[0] == len(pixels)
    for name, call in (
        ("localisation", lambda: localisation(batch, Localisation(boxes="none"))),
        ("pointing", lambda: pointing(batch, Pointing(boxes="none"))),
    ):
        print(f"{name:16} {'':20}   {'':7}   {1000 * seconds(call) / len(pixels):10.1f}", flush=True)


def of_quantus(network: nn.Module, pixels: np.ndarray, maps: np.ndarray, own: Mapping[str, float]) -> None:
    """Time Quantus on the same images, maps, network and settings."""
    import quantus

    if not hasattr(np, "trapz"):  # its areas ask for what numpy 2.4 removed
        np.trapz = np.trapezoid  # type: ignore[attr-defined]
    inputs, side = pixels.astype(np.float32) / 255, pixels.shape[-1]
    with torch.no_grad():
        classes = network(torch.from_numpy(inputs)).argmax(1).numpy()
    common = {"disable_warnings": True, "display_progressbar": False}
    plain = {"normalise": False, "abs": False, "perturb_baseline": "black", **common}
    tests: dict[str, Callable[[], Any]] = {
        "deletion": lambda: quantus.PixelFlipping(
            features_in_step=side * side // 16, return_auc_per_sample=True, **plain
        ),
        "road": lambda: quantus.ROAD(percentages=[10, 30, 50, 70, 90], noise=0.01, **common),
        "sensitivity_n": lambda: quantus.FaithfulnessCorrelation(nr_runs=32, subset_size=side * side // 10, **plain),
        "infidelity": lambda: quantus.Infidelity(perturb_patch_sizes=[side // 4], n_perturb_samples=1, **plain),
    }
    print("\nQuantus          milliseconds an image and method   as long as here   wanted")
    for name, make in tests.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                test = make()
                took = seconds(lambda test=test: [whole(test, network, inputs, classes, each) for each in maps])
        except Exception as error:
            print(f"{name:16} does not run: {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        each = 1000 * took / len(pixels) / len(maps)
        print(f"{name:16} {each:32.1f}   {each / own[name]:15.2f}   {OTHERS_LONGER:6.1f}", flush=True)


def whole(test: Any, network: nn.Module, inputs: np.ndarray, classes: np.ndarray, maps: np.ndarray) -> None:
    test(network, inputs, classes, a_batch=maps[:, None], device="cpu", batch_size=MICRO)


if __name__ == "__main__":
    main()
