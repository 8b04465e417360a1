"""Receptive fields in closed form against the support of gradients, and what has none."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.networks.graph.reach import Window, first_convolutions, reach_of

SIZE = (41, 47)


class Branched(nn.Module):
    """Two ways of equal stride, joined by a sum, and a third one beside them."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 4, 5, 2, 2)
        self.b = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), nn.MaxPool2d(3, 2, 1))
        self.c = nn.Conv2d(4, 4, 3, 1, 2, 2)
        self.join = nn.Identity()

    def forward(self, x):
        y = self.a(x) + self.b(x)
        return self.join(torch.cat([functional.relu(self.c(y)), y], 1))


class Sliced(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.end = nn.Identity()

    def forward(self, x):
        x = self.conv(functional.pad(x, (2, 1, 0, 1)))
        return self.end(x[..., 1::2, ::3])


class Enlarged(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.end = nn.Conv2d(4, 4, 3, 1, 1)

    def forward(self, x):
        return self.end(functional.interpolate(self.conv(x), scale_factor=2))


NETWORKS = {
    "strides": (lambda: nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 4, 3)), "3"),
    "dilation": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3, 1, 4, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, 2)), "2"),
    "ceil_mode": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, ceil_mode=True)), "1"),
    "same": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding="same", dilation=2), nn.Conv2d(4, 4, 2, padding="valid")),
        "1",
    ),
    "uneven": (lambda: nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, (3, 5), (2, 1), (0, 2))), "1"),
    "branches": (Branched, "join"),
    "slices": (Sliced, "end"),
    "enlarged": (Enlarged, "end"),
}


def support(net, layer, position):
    """The bounding box of the pixels that the gradient of all units at one position reaches, by positive weights."""
    for weight in net.parameters():
        weight.data.abs_()
    found = {}
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, out: found.update(out=out))
    image = torch.rand(1, 3, *SIZE).requires_grad_()
    net(image)
    handle.remove()
    y, x = position(found["out"].shape[2:])
    gradient = torch.autograd.grad(found["out"][0, :, y, x].sum(), image)[0].abs().sum((0, 1))
    rows, columns = gradient.sum(1).nonzero()[:, 0], gradient.sum(0).nonzero()[:, 0]
    return (y, x), (int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


@pytest.mark.parametrize("at", ["first", "middle", "last"])
@pytest.mark.parametrize("name", NETWORKS)
def test_windows_are_the_support_of_gradients(name, at):
    make, layer = NETWORKS[name]
    net = make().eval()
    reach = reach_of(net, torch.rand(1, 3, *SIZE), [layer])[layer]
    assert isinstance(reach, Window)
    share = {"first": 0.0, "middle": 0.5, "last": 1.0}[at]
    place, expected = support(net, layer, lambda size: tuple(int(share * (length - 1)) for length in size))
    found = reach.box(place, SIZE)
    if any(isinstance(each, nn.MaxPool2d) for each in net.modules()) or name == "enlarged":
        # A maximum sends back to one of its positions, and an enlarged map shares windows: the closed form contains it.
        assert found[0] <= expected[0] and found[1] <= expected[1]
        assert found[2] >= expected[2] and found[3] >= expected[3]
    else:
        assert found == expected


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.end = nn.Identity()

    def forward(self, x):
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        return self.end(self.attention(tokens, tokens, tokens)[0])


class Drifts(nn.Module):
    """Adds maps whose positions lie at other pixels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.end = nn.Conv2d(3, 2, 3, 2, 1), nn.Conv2d(3, 2, 3, 1, 1), nn.Identity()

    def forward(self, x):
        a = self.a(x)
        return self.end(a + self.b(x)[..., : a.shape[2], : a.shape[3]])


def test_everything_behind_attention_and_global_pooling():
    image = torch.rand(1, 3, 32, 32)
    assert reach_of(Attends().eval(), image, ["end", "conv"])["end"] == "everything"
    assert isinstance(reach_of(Attends().eval(), image, ["conv"])["conv"], Window)
    gated = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1))
    assert reach_of(gated, image, ["2"])["2"] == "everything"
    flat = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 5))
    assert reach_of(flat, image, ["1"])["1"] == "everything"


def test_what_has_no_closed_form_is_unknown():
    image = torch.rand(1, 3, 32, 32)
    assert reach_of(Drifts(), image, ["end"])["end"] == "unknown"
    turned = nn.Sequential(nn.Conv2d(3, 4, 3), nn.PixelShuffle(2))
    assert reach_of(turned, image, ["1"])["1"] == "unknown"


def test_first_convolutions():
    image = torch.rand(1, 3, *SIZE)
    assert first_convolutions(Branched(), image) == ["a", "b.0"]
    assert first_convolutions(Sliced(), image) == ["conv"]
    assert first_convolutions(nn.Sequential(nn.PixelUnshuffle(1), nn.Conv2d(3, 2, 3)), image) == ["1"]
