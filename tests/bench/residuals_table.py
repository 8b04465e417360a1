"""Print how well DeepLIFT and LRP keep their laws on stock networks, as the tables of docs/attribution.md.

    python -m tests.bench.residuals_table

Inputs have 64 pixels, weights are random. DeepLIFT: the larger residual of a shared baseline and of one for each image.
LRP: the largest of three rules and, for transformers, two presets.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

import torch
from stock_networks import CNNS, NETWORKS, SIZE, stock
from torch import nn

from kernels.attribution.relevance import Rule
from pipeline.networks.contributions import contributions
from pipeline.networks.gradients import Logit, scores
from pipeline.networks.graph.propagated import Plan
from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.relevance import Relevance, relevance

TYPES = (torch.float64, torch.float32)
RULES = {
    "alpha_beta": Rule(),
    "alpha 2": Rule(alpha=2.0),
    "epsilon": Rule("epsilon"),
    "gamma": Rule("gamma"),
}


def rescale(network: nn.Module, images: int, reference: torch.Tensor) -> Rescale:
    """Make the call sites of the rescale rule."""
    return Rescale(network, images)


def of_deeplift(
    network: nn.Module, rules: Callable[[nn.Module, int, torch.Tensor], Any], dtype: torch.dtype, references: int
) -> float:
    """Return the residual of summation-to-delta for two images, with so many baselines; forwards are those of torch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator).to(dtype)
    x0 = torch.randn(references, 3, SIZE, SIZE, generator=generator).to(dtype) * (0.3 if references == 2 else 0)
    target = Logit(torch.tensor([1, 3]))
    found = contributions(network, x, x0, target, lambda images: rules(network, images, x0))
    difference = found.score.double() - found.reference_score.double()
    score, base = scores(network, x, target).double(), scores(network, x0, target, 2).double()
    rounded = 1e-12 if dtype == torch.float64 else 1e-4
    assert ((score - base - difference).abs() <= rounded * torch.maximum(score.abs(), difference.abs())).all()
    lacking = found.values.double().flatten(1).sum(1) - (score - base)
    return float((lacking.abs() / torch.maximum(score.abs(), (score - base).abs())).max())


def images(dtype: torch.dtype, count: int = 2) -> torch.Tensor:
    """Return images of noise, the same in both types."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn((count, 3, SIZE, SIZE), generator=generator, dtype=torch.float64).to(dtype)


def of_lrp(found: Relevance) -> float:
    """Return the residual of conservation: of what relevance, biases and leaks leave of the score."""
    values = found.values.double().flatten(1)
    lacking = found.score.double() - values.sum(1) - found.bias - found.leak
    return float((lacking.abs() / torch.maximum(found.score.double().abs(), values.abs().sum(1))).max())


def plans(name: str) -> list[Plan]:
    """Return the rules and presets that a network is tried with."""
    presets = ("cp_lrp",) if name in CNNS else ("cp_lrp", "attn_lrp")
    return [Plan(RULES[rule], preset=preset) for preset in presets for rule in ("alpha_beta", "epsilon", "gamma")]


def main() -> None:
    print("| network | DeepLIFT, float64 | float32 | LRP, float64 | float32 |\n|---|---|---|---|---|")
    for name in NETWORKS:
        found = []
        for method in ("deeplift", "lrp"):
            for dtype in TYPES:
                network = stock(name, dtype)
                if method == "deeplift":
                    found.append(max(of_deeplift(network, rescale, dtype, count) for count in (1, 2)))
                    continue
                target = Logit(stock(name, torch.float32)(images(torch.float32)).argmax(1))
                found.append(max(of_lrp(relevance(network, images(dtype), target, plan)) for plan in plans(name)))
        print(f"| {name} | {' | '.join(f'{each:.0e}' for each in found)} |", flush=True)


if __name__ == "__main__":
    main()
