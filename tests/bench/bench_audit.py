"""CPU time of the tests of explanations, one thread, against bare forwards of as many images.

    python -m tests.bench.bench_audit [--images 4] [--rounds 3] [--size 64]

A ResNet-18 has random weights, and maps are random. A test and as many bare forwards as it costs take turns, and the
ratio is the median over the rounds. Where the package quantus is installed, its tests of the same images, maps and
network are timed too, per forward that they make: their settings are those of the test beside them.
"""

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable
from importlib import util
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import numpy as np
import torch
import torchvision
from torch import nn
from toy_batch import Toy, toy

from pipeline.stages.audit.faithful import TESTS, Deletion, Infidelity, Road, SensitivityN
from pipeline.stages.audit.located import Localisation, Pointing
from pipeline.stages.audit.trials.place import localisation, pointing
from pipeline.stages.audit.trials.registry import FUNCTIONS
from tests.bench.timing import seconds

ALLOWED = {
    "deletion": (Deletion(steps=16), 1.2),
    "road": (Road(shares=[0.1, 0.3, 0.5, 0.7, 0.9]), 1.6),
    "sensitivity_n": (SensitivityN(shares=[0.1, 0.5], sets=16), 1.3),
    "infidelity": (Infidelity(sets=16), 1.2),
}
"""Options, and how much longer than its bare forwards a test may take."""
OTHERS_LONGER = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 256, (given.images, 3, given.size, given.size), dtype=np.uint8)
    maps = draw.standard_normal((given.images, given.size, given.size)).astype(np.float32)
    network = torchvision.models.resnet18().eval()
    print("test             of its bare forwards   allowed   milliseconds an image")
    for name, (options, allowed) in ALLOWED.items():
        ratios, own = [], []
        for _ in range(given.rounds):
            batch = made(network, pixels, maps)
            own.append(seconds(lambda batch=batch, name=name, options=options: FUNCTIONS[name](batch, options)))
            forwards = round(TESTS[name].cost(options, 0.0, batch.size)) * given.images
            ratios.append(own[-1] / seconds(lambda batch=batch, forwards=forwards: bare(batch, forwards)))
        each = 1000 * statistics.median(own) / given.images
        print(f"{name:16} {statistics.median(ratios):20.3f}   {allowed:7.2f}   {each:10.1f}", flush=True)
    of_place(pixels, maps, network)
    if util.find_spec("quantus") is not None:
        of_quantus(network, pixels, maps, given.rounds)


def made(network: nn.Module, pixels: np.ndarray, maps: np.ndarray) -> Toy:
    batch = toy(network, pixels, maps, batch=8)
    assert batch.logits.shape[0] == len(pixels)
    return batch


def bare(batch: Toy, forwards: int) -> None:
    """Run a network on so many images in micro-batches."""
    inputs = batch.inputs.repeat(-(-8 // len(batch.inputs)), 1, 1, 1)[:8]
    with torch.no_grad():
        for _ in range(-(-forwards // 8)):
            batch.network(inputs)


def of_place(pixels: np.ndarray, maps: np.ndarray, network: nn.Module) -> None:
    """Time tests without a forward, by image."""
    size = pixels.shape[-1]
    boxes = {at: np.array([[of, 4, 4, size // 2, size // 2] for of in range(1000)], float) for at in range(len(pixels))}
    batch = toy(network, pixels, maps, given={"localisation": boxes, "pointing": boxes}, batch=8)
    assert batch.logits.shape[0] == len(pixels)
    for name, call in (
        ("localisation", lambda: localisation(batch, Localisation(boxes="none"))),
        ("pointing", lambda: pointing(batch, Pointing(boxes="none"))),
    ):
        print(f"{name:16} {'':20}   {'':7}   {1000 * seconds(call) / len(pixels):10.1f}", flush=True)


def of_quantus(network: nn.Module, pixels: np.ndarray, maps: np.ndarray, rounds: int) -> None:
    """Time Quantus on the same images, maps and network, with the number of forwards that each of its tests makes."""
    import quantus

    inputs, signed = pixels.astype(np.float32) / 255, maps[:, None].astype(np.float32)
    with torch.no_grad():
        classes = network(torch.from_numpy(inputs)).argmax(1).numpy()
    size = pixels.shape[-1]
    common = {"disable_warnings": True, "display_progressbar": False}
    plain = {"normalise": False, "abs": False, **common}
    tests: dict[str, Callable[[], object]] = {
        "deletion": lambda: quantus.PixelFlipping(
            features_in_step=size * size // 16, perturb_baseline="black", return_auc_per_sample=True, **plain
        ),
        "road": lambda: quantus.ROAD(percentages=[10, 30, 50, 70, 90], noise=0.01, **common),
        "sensitivity_n": lambda: quantus.FaithfulnessCorrelation(
            nr_runs=32, subset_size=size * size // 10, perturb_baseline="black", **plain
        ),
        "infidelity": lambda: quantus.Infidelity(
            perturb_baseline="black", perturb_patch_sizes=[size // 4], n_perturb_samples=1, **plain
        ),
    }
    print("\nQuantus          milliseconds an image   forwards an image   as long as here, per forward   wanted")
    for name, make in tests.items():
        counted = [0]
        hook = network.register_forward_hook(
            lambda _, given, out, counted=counted: counted.__setitem__(0, counted[0] + len(out))
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                test = make()
                theirs = seconds(
                    lambda test=test: test(network, inputs, classes, a_batch=signed, device="cpu", batch_size=8)
                )
        except Exception as error:
            print(f"{name:16} does not run: {type(error).__name__}: {str(error)[:80]}", flush=True)
            continue
        finally:
            hook.remove()
        options, _ = ALLOWED[name]
        own = []
        for _ in range(rounds):
            batch = made(network, pixels, maps)
            own.append(seconds(lambda batch=batch, name=name, options=options: FUNCTIONS[name](batch, options)))
        forwards = TESTS[name].cost(options, 0.0, (size, size)) * len(pixels)
        ratio = (theirs / counted[0]) / (statistics.median(own) / forwards)
        each, calls = 1000 * theirs / len(pixels), counted[0] / len(pixels)
        print(f"{name:16} {each:21.1f}   {calls:17.1f}   {ratio:28.2f}   {OTHERS_LONGER:6.1f}", flush=True)


if __name__ == "__main__":
    main()
