"""A network's outputs depend on the image and the weights alone, or it is refused."""

import pytest
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.independence import check_independence

NETWORK = """
import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

AT_IMPORT = float(np.random.default_rng().random())


class Net(nn.Module):
    def __init__(self, kind, norm=nn.BatchNorm2d):
        super().__init__()
        self.kind = kind
        self.conv, self.norm, self.head = nn.Conv2d(3, 6, 3, padding=1), norm(6), nn.Linear(6, 4)
        self.gain, self.seen = 1.0, 0
        if kind == "numpy":
            self.gain = float(np.random.rand())
        if kind == "random":
            self.gain = random.random()
        if kind == "import":
            self.gain = AT_IMPORT
        if kind == "numpy_parameter":
            self.conv.bias.data += float(np.random.rand())
        if kind == "seeded":
            self.gain = float(np.random.default_rng(3).random())

    def forward(self, x):
        kind, out = self.kind, self.norm(self.conv(x)) * self.gain
        if kind == "mean":
            out = out - out.mean(0, keepdim=True)
        if kind == "largest":
            out = out / out.abs().max()
        if kind == "shift":
            out = torch.cat([out[:1], out[:-1]]) + out
        if kind == "place":
            out = out + torch.arange(len(out)).view(-1, 1, 1, 1)
        if kind == "rounding":  # sums in another order at each place, as kernels of convolutions may
            order = torch.arange(64).roll(7)
            parts = (out.mean((1, 2, 3), keepdim=True) * torch.linspace(-1e3, 1e3, 64).view(1, -1, 1, 1)).unbind(0)
            parts = [x if at == 0 else x[order] for at, x in enumerate(parts)]
            out = out + torch.stack([sum(x) for x in parts])[:, None]
        if kind == "small":
            out = out * (1 + 1e-5 * torch.arange(len(out), dtype=out.dtype).view(-1, 1, 1, 1))
        if kind == "steered" and out.mean() > 1e6:
            out = -out
        if kind == "gated" and self.head.bias.sum() > 1e6:  # by weights alone
            out = -out
        if kind == "first":
            if self.seen == 0:
                self.seen = float(out.std())
            out = out / self.seen
        out = F.relu(out)
        out = out.mean((2, 3))
        if kind == "dropout":
            out = F.dropout(out, 0.5)
        if kind == "rare":
            out = F.dropout(out, 1e-9)
        if kind == "noise":
            out = out + torch.from_numpy(np.random.rand(6)).float()
        if kind == "own_generator":
            generator = torch.Generator()
            generator.seed()
            out = out + torch.rand(6, generator=generator)
        if kind == "pythons":
            out = out * (1 + (random.random() < 1e-9))
        return self.head(out)


def net(kind="plain"):
    return Net(kind, lambda units: nn.BatchNorm2d(units, track_running_stats=kind != "statistics"))
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    return tmp_path / "nets.py"


def check(file, kind, **more):
    return check_independence(NetworkSpec(module=f"{file}:net", arguments={"kind": kind}, **more), ["conv"], (3, 8, 8))


def test_a_forward_that_values_of_the_batch_steer_is_told(file):
    """Where all images of the inspection take one way, the other one stays unseen."""
    (notice,) = check(file, "steered")
    assert "values of its outputs steer its forward (by `bool`)" in notice
    assert check(file, "gated") == [] == check(file, "plain")


@pytest.mark.parametrize("kind", ["plain", "seeded", "rounding"])
def test_what_depends_on_the_image_alone_passes(file, kind):
    state = torch.get_rng_state()
    check(file, kind)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["statistics", "mean", "largest"])
def test_other_images_of_the_batch(file, kind):
    with pytest.raises(MicrotomeError, match=r"net's output gives an image other values beside other images"):
        check(file, kind)


@pytest.mark.parametrize("kind", ["shift", "place", "small"])
def test_the_place_in_the_batch(file, kind):
    with pytest.raises(MicrotomeError, match=r"net's output gives an image other values at another place of the batch"):
        check(file, kind)


def test_a_state_that_the_first_batch_sets(file):
    with pytest.raises(MicrotomeError, match=r"net's output gives other values after other images: .* keeps a state"):
        check(file, "first")


@pytest.mark.parametrize("kind", ["dropout", "rare", "noise", "pythons"])
def test_random_numbers_behind_the_last_layer(file, kind):
    source = {"dropout": "torch", "rare": "torch", "noise": "numpy", "pythons": "random"}[kind]
    with pytest.raises(MicrotomeError, match=rf"net: the forward draws random numbers \(from {source}\) in eval mode"):
        check(file, kind)


def test_random_numbers_of_a_generator_of_ones_own(file):
    with pytest.raises(MicrotomeError, match=r"net's output gives an image other values"):
        check(file, "own_generator")


@pytest.mark.parametrize("kind", ["numpy", "random", "import", "numpy_parameter"])
def test_two_builds_that_differ(file, kind):
    with pytest.raises(MicrotomeError, match=r"differs between two builds with seed 0: .* numpy or `random`"):
        check(file, kind)


def test_with_a_checkpoint_only_what_it_does_not_hold_counts(file, tmp_path):
    torch.save(build(NetworkSpec(module=f"{file}:net")).state_dict(), tmp_path / "w.pt")
    check(file, "numpy_parameter", weights=str(tmp_path / "w.pt"))
    with pytest.raises(MicrotomeError, match=r"differs between two builds with seed 0 and the same weights"):
        check(file, "numpy", weights=str(tmp_path / "w.pt"))
