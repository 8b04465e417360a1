"""A generator with known units: what it paints without some of them has a closed form."""

from pathlib import Path
from typing import Any

import torch
from experiments import tiny

from pipeline.config.networks import NetworkSpec
from pipeline.data.scenes import KINDS
from pipeline.data.scenes.composed import SHAPE
from pipeline.networks.build import build
from pipeline.networks.checkpoint import write_safetensors

SIZE = 48
MODULE = f"""
import torch
from torch import nn

KINDS = {len(KINDS)}


class Painter(nn.Module):
    '''The stage, and on it one unit for each kind of object: its colour around each object's middle.'''

    def __init__(self):
        super().__init__()
        self.kinds = nn.Conv2d(8 * KINDS, KINDS, 3, padding=1, bias=False)
        self.mixed = nn.Conv2d(KINDS, 24, 1, bias=False)
        self.colours = nn.Conv2d(KINDS, 3, 1, bias=False)
        with torch.no_grad():
            self.kinds.weight.zero_()
            for kind in range(KINDS):
                self.kinds.weight[kind, 8 * kind] = 0.3
                self.kinds.weight[kind, 8 * kind, 1, 1] = 0.6
                self.kinds.weight[kind, 8 * kind + 3 : 8 * kind + 5, 1, 1] = 0.2
            generator = torch.Generator().manual_seed(1)
            self.colours.weight.copy_(torch.rand(3, KINDS, 1, 1, generator=generator) - 0.5)
            self.mixed.weight.copy_(torch.rand(24, KINDS, 1, 1, generator=generator))

    def forward(self, x):
        units = self.kinds(x[:, :-3])
        self.mixed(units)
        made = 0.3 + 0.4 * x[:, -3:] + 0.5 * self.colours(units)
        return nn.functional.interpolate(made, scale_factor=4, mode="nearest")


class Noisy(Painter):
    def forward(self, x):
        return super().forward(x) + 0.1 * torch.rand(())


class Plain(nn.Module):
    '''Images of normal latents.'''

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.ConvTranspose2d(5, 6, 4), nn.ReLU())
        self.second = nn.Sequential(nn.ConvTranspose2d(6, 3, 4, 4), nn.Tanh())

    def forward(self, z):
        return self.second(self.first(z))


def painter():
    return Painter()


def noisy():
    return Noisy()


def plain():
    return Plain()
"""


def written(folder: Path, function: str = "painter") -> dict[str, Any]:
    """Write the module and weights of a generator; return its section of a configuration."""
    module, weights = folder / "generator.py", folder / f"{function}.safetensors"
    if not module.exists():
        module.write_text(MODULE)
    if not weights.exists():
        write_safetensors(weights, build(NetworkSpec(module=f"{module}:{function}")).state_dict())
    found = {"module": f"{module}:{function}", "weights": str(weights), "numerics": {"micro_batch": 8}}
    if function == "plain":
        latent: dict[str, Any] = {"kind": "normal", "shape": [5, 1, 1]}
        return found | {"latent": latent, "output": [-1, 1], "layers": ["first"]}
    return found | {"latent": {"kind": "scenes", "shape": list(SHAPE)}, "layers": ["kinds"]}


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """A configuration with one data set of the painter's images and interventions in its units."""
    trees = {
        "generator": "painter",
        "layer": "kinds",
        "concept": "truth/object: tree",
        "units": [1, 2],
        "replace": ["zero", "mean"],
        "insert": {"quantile": 0.99, "at": "grid"},
        "rank_images": 6,
        "draws": 2,
        "pictures": 2,
    }
    return {
        "name": "mini",
        "results": str(folder / "results"),
        "datasets": {
            "painted": {
                "kind": "generated",
                "generator": "painter",
                "size": [SIZE, SIZE],
                "images": {"validation": 36},
                "shard_images": 12,
                "concepts": ["truth", "pixels"],
            }
        },
        "networks": {"tiny": tiny(folder)},
        "generators": {"painter": written(folder)},
        "intervene": {"trees": trees},
    } | changes


def closed_form(inputs: torch.Tensor, network: torch.nn.Module, removed: list[int]) -> torch.Tensor:
    """Return what the painter paints without some units, as its arithmetic says: their colours are taken off."""
    units = network.kinds(inputs[:, :-3])
    whole = network(inputs)
    colours = torch.einsum("ck,nkyx->ncyx", network.colours.weight[:, removed, 0, 0], units[:, removed])
    return whole - 0.5 * torch.nn.functional.interpolate(colours, scale_factor=4, mode="nearest")
