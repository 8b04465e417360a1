"""CPU time of attacks, one thread, against bare forwards and backwards of the same batch.

    python -m tests.bench.bench_attack [--images 8] [--steps 8] [--rounds 3]

Networks have random weights. An attack and as many bare forwards and backwards to the input take turns, and the ratio
is the median over the rounds, so that other work on the machine decides little. Steps alone are compared: what comes
once (the start, the roundings and what the network says of them) is subtracted. At least 0.9 is allowed.
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

from pipeline.config.networks import Network
from pipeline.networks.graph.call_sites import frozen
from pipeline.stages.attack.attacking import Attempt, Effort
from pipeline.stages.attack.settings import Attack
from tests.bench.timing import seconds

SIZE = 128
ALLOWED = 0.9
ATTACKS = (Attack("pgd", "linf", 4.0), Attack("apgd_ce", "l2", 1.0), Attack("cw_l2", "l2"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("network       attack           bare / attack, of a step   allowed")
    measure("resnet18", torchvision.models.resnet18().eval(), given)
    measure("squeezenet1_0", torchvision.models.squeezenet1_0().eval(), given)


def measure(name: str, network: nn.Module, given: argparse.Namespace) -> None:
    spec = Network(torchvision=name, weights="random", numerics={"channels_last": False})
    pixels = torch.randint(0, 256, (given.images, 3, SIZE, SIZE), dtype=torch.uint8)
    attempt = Attempt(
        network, spec, "", pixels, torch.zeros(given.images, dtype=torch.int64), None, range(given.images)
    )
    inputs = torch.randn(given.images, 3, SIZE, SIZE)
    for attack in ATTACKS:
        ratios = []
        for _ in range(given.rounds):
            bare = seconds(lambda: [forward_and_backward(network, inputs) for _ in range(given.steps)])
            once, all_of_it = (
                seconds(partial(attempt.run, attack, Effort(steps, 1, 1, 2, 0))) for steps in (1, 1 + given.steps)
            )
            ratios.append(bare / (all_of_it - once))
        print(f"{name:13} {attack.name:16} {statistics.median(ratios):24.3f}   {ALLOWED:.2f}", flush=True)


def forward_and_backward(network: nn.Module, inputs: torch.Tensor) -> None:
    with frozen(network):
        given = inputs.clone().requires_grad_()
        torch.autograd.grad(network(given).sum(), given)


if __name__ == "__main__":
    main()
