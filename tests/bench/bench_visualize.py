"""CPU time of activation maximisation, one thread, against bare forwards and backwards of the same batch.

    python -m tests.bench.bench_visualize [--images 8] [--steps 8] [--rounds 3]

Networks have random weights. The ascent of a layer's units and as many bare forwards and backwards to the input, ending
at the same layer, take turns, and the ratio is the median over the rounds, so that other work on the machine decides
little. Steps alone are compared: what comes once (starts, looks, the last score) is told beside, in forwards. At least
0.9 is allowed without augmentations.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision
from torch import nn

from kernels.visualization.priors import Spectrum
from pipeline.config.networks import Network
from pipeline.networks.graph.call_sites import frozen
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import resolve
from pipeline.stages.visualize.climbing import Climb
from pipeline.stages.visualize.settings import Maximise
from pipeline.stages.visualize.subject import Strongest
from tests.bench.timing import seconds

SIZE = 128
ALLOWED = 0.9
STILL = {"shift": 0.0, "turn": 0.0, "zoom": 1.0}
WAYS = {
    "pixels, no augmentation": ("pixels", STILL),
    "pixels": ("pixels", {}),
    "maco": ("maco", {"expert": ["maco"]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("network       way                        bare / ascent, of a step   allowed")
    measure("resnet18", torchvision.models.resnet18().eval(), "layer3", given)
    measure("squeezenet1_0", torchvision.models.squeezenet1_0().eval(), "features.12", given)


def measure(name: str, network: nn.Module, layer: str, given: argparse.Namespace) -> None:
    (info,) = resolve(network, [layer], (3, SIZE, SIZE))
    spec = Network(torchvision=name, weights="random", numerics={"channels_last": False})
    target = Strongest(info, torch.arange(given.images))
    inputs = torch.randn(given.images, 3, SIZE, SIZE)
    spectrum = Spectrum.of(torch.rand(4, 3, SIZE, SIZE).numpy())
    for way, (kind, options) in WAYS.items():
        ratios = []
        for _ in range(given.rounds):
            bare = seconds(lambda: [forward_and_backward(network, inputs, target) for _ in range(given.steps)])
            once, all_of_it = (
                seconds(partial(climb, network, spec, info, kind, options, spectrum, given.images, steps))
                for steps in (1, 1 + given.steps)
            )
            # The ascent of one step looks once less often: its four looks fall together.
            looks = 3 * seconds(lambda: forward(network, inputs, target))
            ratios.append(bare / (all_of_it - once - looks))
        allowed = f"{ALLOWED:.2f}" if options == STILL else ""
        print(f"{name:13} {way:26} {statistics.median(ratios):24.3f}   {allowed}", flush=True)


def climb(
    network: nn.Module,
    spec: Network,
    info: LayerInfo,
    way: str,
    options: dict[str, object],
    spectrum: Spectrum,
    images: int,
    steps: int,
) -> None:
    asked = Maximise.model_validate({"steps": steps, "restarts": 1, **options})
    target, size = Strongest(info, torch.arange(images)), (3, SIZE, SIZE)
    seeds = [(0, unit, 0) for unit in range(images)]
    Climb(network, spec, target, torch.ones(images), seeds, size, asked, spectrum).run(way)


def reached(network: nn.Module, inputs: torch.Tensor, target: Strongest) -> torch.Tensor:
    """Return the scores of inputs by a bare forward, which ends at the layer as the ascent's does."""
    kept: list[torch.Tensor] = []

    def end(_: nn.Module, __: object, output: torch.Tensor) -> None:
        kept.append(output)
        raise StopIteration

    handle = network.get_submodule(target.layer).register_forward_hook(end)
    try:
        network(inputs)
    except StopIteration:
        pass
    finally:
        handle.remove()
    return target(kept[0])


def forward(network: nn.Module, inputs: torch.Tensor, target: Strongest) -> None:
    with torch.no_grad():
        reached(network, inputs, target)


def forward_and_backward(network: nn.Module, inputs: torch.Tensor, target: Strongest) -> None:
    with frozen(network):
        given = inputs.clone().requires_grad_()
        torch.autograd.grad(reached(network, given, target).sum(), given)


if __name__ == "__main__":
    main()
