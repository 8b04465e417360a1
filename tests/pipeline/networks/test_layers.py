"""Layers: shapes and layouts, the grid of tokens, choice by name and pattern, recording."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pipeline.config.networks import Reading
from pipeline.errors import MicrotomeError
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, candidates, resolve, survey, to_maps


class Residual(nn.Module):
    """A block that overwrites its own intermediate outputs, as torchvision's do."""

    def __init__(self, units_in, units, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(units_in, units, 3, stride, 1)
        self.bn = nn.BatchNorm2d(units)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(units_in, units, 1, stride)

    def forward(self, x):
        y = self.bn(self.conv(x))
        y += self.shortcut(x)
        return self.relu(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 6, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.pool(self.layer2(self.layer1(self.stem(x)))).flatten(1))


class Tokens(nn.Module):
    """Tokens of 4x4 patches behind some special ones; the patches come from a convolution or from a Linear."""

    def __init__(self, special=1, units=8, patch=4, conv=True):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.patch = conv, patch
        self.embed = nn.Conv2d(3, units, patch, patch) if conv else nn.Linear(3 * patch * patch, units)
        self.special = nn.Parameter(torch.randn(1, special, units))
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(units, 2, 16, batch_first=True) for _ in range(2)])

    def forward(self, x):
        if self.conv:
            x = self.embed(x).flatten(2).transpose(1, 2)
        else:
            x = self.embed(nn.functional.unfold(x, self.patch, stride=self.patch).transpose(1, 2))
        x = torch.cat([self.special.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, 0]


def names(layers):
    return [layer.name for layer in layers]


def test_candidates_come_in_execution_order_with_shapes():
    net = Net().eval()
    found = candidates(net, (3, 16, 24))
    assert names(found) == [
        "stem",
        *(
            f"layer1.{i}.{leaf}" if leaf else f"layer1.{i}"
            for i in (0, 1)
            for leaf in ("conv", "bn", "shortcut", "relu", "")
        ),
        "layer1",
        *("layer2.0.conv", "layer2.0.bn", "layer2.0.shortcut", "layer2.0.relu", "layer2.0", "layer2"),
        "pool",
        "head",
    ]
    by_name = {layer.name: layer for layer in found}
    assert by_name["layer2"] == LayerInfo("layer2", (6, 4, 6), "map", 0, "float32", "Sequential")
    assert by_name["head"].layout == "vector"
    assert by_name["head"].shape == (5, 1, 1)
    assert survey(net, (3, 16, 24)).output == (5,)
    assert found == candidates(Net().eval().to("meta"), (3, 16, 24))


def test_resolve_names_patterns_and_blocks():
    net = Net().eval()
    shape = (3, 16, 16)
    assert names(resolve(net, "auto", shape)) == ["layer1.0", "layer1.1", "layer2.0"]
    assert names(resolve(net, ["layer2", "stem"], shape)) == ["stem", "layer2"]
    assert names(resolve(net, ["layer*", "layer1"], shape)) == ["layer1", "layer2"]
    assert names(resolve(net, ["layer?.0", "layer[2].*"], shape)) == ["layer1.0", "layer2.0"]
    assert names(resolve(net, ["*"], shape)) == ["stem", "layer1", "layer2"]  # not the pool, not the head
    assert names(resolve(net, ["head"], shape)) == ["head"]


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (["layer5"], r"layer 'layer5' is not in resnet3; nearest: layer2, layer1"),
        (["layer5.*"], r"pattern 'layer5\.\*' matches no layer .* of resnet3; it has stem, layer1\.0\.conv"),
        (["layer1", "pool.*"], r"pattern 'pool\.\*' matches no layer"),
        (["unused"], r"layer 'unused' of resnet3 is never called in the forward"),
        (["$(touch x)"], r"layer '\$\(touch x\)' is not in resnet3"),
    ],
)
def test_resolve_refuses(wanted, said):
    with pytest.raises(MicrotomeError, match=said):
        resolve(Net().eval(), wanted, (3, 16, 16), name="resnet3")


def test_a_module_called_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.conv(self.relu(x)))

    net = Twice()
    assert names(candidates(net, (3, 8, 8))) == ["conv"]
    with pytest.raises(MicrotomeError, match="'relu' of Twice is called 2 times in one forward"):
        resolve(net, ["relu"], (3, 8, 8))
    with (
        Recorder(net, ["relu"]) as record,
        pytest.raises(MicrotomeError, match="'relu' is called more than once in one forward"),
    ):
        record(torch.zeros(1, 3, 8, 8))


def unit(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


@pytest.mark.parametrize(
    ("net", "blocks"),
    [
        (
            nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 5, 3), nn.ReLU()
            ),
            ["2", "5"],
        ),
        (nn.Sequential(unit(3, 4), unit(4, 4), nn.MaxPool2d(2), unit(4, 5)), ["0", "1", "3"]),
        (nn.Sequential(nn.Sequential(unit(3, 4), unit(4, 4)), nn.Flatten(), nn.Linear(1024, 3)), ["0.0", "0.1"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), Residual(4, 4), nn.MaxPool2d(2), Residual(4, 4)), ["1", "3"]),
        (Tokens(), ["blocks.0", "blocks.1"]),
    ],
)
def test_auto_takes_the_blocks(net, blocks):
    assert names(resolve(net.eval(), "auto", (3, 16, 16))) == blocks


def test_auto_falls_back_to_convolutions_and_then_says_so():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)

        def forward(self, x):
            return self.second(torch.relu(self.first(x))).mean((2, 3))

    assert names(resolve(Plain(), "auto", (3, 8, 8))) == ["first", "second"]
    linear = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(MicrotomeError, match=r"`layers: auto` found no blocks in mlp: name layers; it has 0, 1"):
        resolve(linear, "auto", (3, 8, 8), name="mlp")


@settings(deadline=None, max_examples=40)
@given(
    y=st.integers(1, 7),
    x=st.integers(1, 7),
    patch=st.sampled_from([2, 4]),
    special=st.integers(0, 5),
    conv=st.booleans(),
    told=st.booleans(),
)
def test_tokens_become_maps(y, x, patch, special, conv, told):
    shape = (3, y * patch, x * patch)
    net = Tokens(special, patch=patch, conv=conv).eval()
    if not (conv or told):
        # Without a convolution to look at the rule is: the largest grid of whole patches, the rest is special.
        tokens, steps = y * x + special, math.gcd(*shape[1:])
        largest = next(
            (h, w)
            for h, w in sorted(
                ((k * shape[1] // steps, k * shape[2] // steps) for k in range(1, steps + 1)),
                key=lambda grid: (shape[1] % grid[0] != 0, -grid[0]),
            )
            if 0 <= tokens - h * w <= 16
        )
        y, x, special = *largest, tokens - largest[0] * largest[1]
    layers = resolve(
        net, ["blocks.*" if y * x > 1 else "blocks.0"], shape, Reading(special_tokens=special if told else None)
    )
    assert layers[0].shape == (8, y, x)
    assert (layers[0].layout, layers[0].special) == ("tokens", special)
    with Recorder(net, names(layers)) as record:
        _, outputs = record(torch.randn(2, *shape))
    tokens = outputs[layers[0].name]
    maps, rest = to_maps(tokens, layers[0])
    assert maps.shape == (2, 8, y, x)
    for row in range(y):
        for column in range(x):
            assert torch.equal(maps[:, :, row, column], tokens[:, special + row * x + column])
    if special:
        assert torch.equal(rest, tokens[:, :special])
    else:
        assert rest is None


@pytest.mark.parametrize(
    ("image", "tokens", "special", "grid"),
    [
        ((224, 224), 197, None, (14, 14)),
        ((224, 224), 201, None, (14, 14)),  # class and four registers
        ((384, 384), 577, None, (24, 24)),
        ((378, 378), 730, None, (27, 27)),
        ((32, 64), 129, None, (8, 16)),
        ((180, 240), 13, None, (3, 4)),
        ((37, 37), 82, None, (9, 9)),  # patches that leave a border
        ((32, 32), 80, None, (8, 8)),
        ((32, 32), 80, 64, (4, 4)),
        ((32, 32), 80, 3, None),
        ((32, 48), 25, 1, (4, 6)),
        ((31, 32), 65, None, None),
    ],
)
def test_the_grid_is_found_from_the_image(image, tokens, special, grid):
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(torch.zeros(len(x), tokens, 8))

    if grid is None:
        with pytest.raises(MicrotomeError, match=rf"gives {tokens} tokens, which do not cover .* set `special_tokens`"):
            resolve(Given(), ["norm"], (3, *image), Reading(special_tokens=special))
    else:
        (layer,) = resolve(Given(), ["norm"], (3, *image), Reading(special_tokens=special))
        assert layer.shape == (8, *grid)
        assert layer.special == tokens - grid[0] * grid[1]


class ChannelsLast(nn.Module):
    def __init__(self, units):
        super().__init__()
        self.patch = nn.Conv2d(3, units, 2, 2)
        self.norm = nn.LayerNorm(units)
        self.linear = nn.Linear(units, units)
        self.act = nn.GELU()

    def forward(self, x):
        return self.act(self.linear(self.norm(self.patch(x).permute(0, 2, 3, 1)))).mean((1, 2))


@pytest.mark.parametrize("image", [(16, 16), (16, 24)])
@pytest.mark.parametrize("units", [4, 8, 12])
def test_channels_last(image, units):
    # 8 units on a map of 8x8: the shape alone cannot tell, the kinds of modules do.
    net = ChannelsLast(units)
    layers = resolve(net, ["patch", "norm", "linear", "act"], (3, *image))
    assert [layer.layout for layer in layers] == ["map", *["channels_last"] * 3]
    assert {layer.shape for layer in layers} == {(units, image[0] // 2, image[1] // 2)}
    with Recorder(net, ["act"]) as record:
        _, outputs = record(torch.randn(2, 3, *image))
    maps, _ = to_maps(outputs["act"], layers[3])
    assert torch.equal(maps, outputs["act"].permute(0, 3, 1, 2))


def test_what_is_no_layer_says_why():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.turned, self.video = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, x):
            self.none("text")
            self.turned(x.flatten(2).permute(2, 0, 1))
            return self.video(x[:, :, None])

    refused = survey(Odd(), (3, 8, 8)).refused
    assert refused["none"] == "does not give a tensor"
    assert refused["turned"] == "gives (64, 2, 3) for 2 images: expected the batch in the first dimension"
    assert refused["video"] == "gives (3, 1, 8, 8) for an image: expected maps, tokens or a vector"


def test_recorded_outputs_survive_later_in_place_operations():
    net = Net().eval()
    images = torch.randn(2, 3, 16, 16)
    with Recorder(net, ["layer1.0.bn", "layer1.0.conv", "layer1.0"]) as record:
        logits, outputs = record(images)
    with torch.no_grad():
        stem = net.stem(images)
        block = net.layer1[0]
        before_addition = block.bn(block.conv(stem))
        assert torch.equal(outputs["layer1.0.conv"], block.conv(stem))
        assert torch.equal(outputs["layer1.0.bn"], before_addition)
        assert (outputs["layer1.0.bn"] < 0).any()
        assert torch.equal(outputs["layer1.0"], torch.relu(before_addition + block.shortcut(stem)))
        assert torch.equal(logits, net(images))
    assert not any(module._forward_hooks for module in net.modules())


def test_recorder_stops_early_and_says_what_was_not_called():
    net = Net().eval()
    images = torch.randn(1, 3, 16, 16)
    ran = []
    net.layer2.register_forward_hook(lambda *_: ran.append("layer2"))
    with Recorder(net, ["layer1.0", "stem"], stop_early=True) as record:
        logits, outputs = record(images)
    assert logits is None
    assert ran == []
    assert list(outputs) == ["layer1.0", "stem"]
    with Recorder(net, ["unused"]) as record, pytest.raises(MicrotomeError, match="'unused' was not called"):
        record(images)
    with pytest.raises(RuntimeError, match="inside its `with` block"):
        record(images)


def test_recorder_takes_the_first_tensor_and_float32():
    class Tuple(nn.Module):
        def forward(self, x):
            return {"name": "x", "out": x.half()}, x

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.tap = Tuple()

        def forward(self, x):
            return {"out": self.tap(x)[1]}

    class Pair(nn.Module):
        def forward(self, x):
            return x.half() + 1, x

    net = nn.Sequential(Nested())
    images = torch.randn(2, 3, 4, 4)
    with Recorder(net, ["0"]) as record:
        logits, outputs = record(images)
    assert torch.equal(outputs["0"], images)
    assert torch.equal(logits, images)
    with Recorder(nn.ModuleDict({"a": Pair()})["a"], []) as record:
        assert torch.equal(record(images)[0], images.half() + 1)
    pair = nn.Sequential(Pair())
    with Recorder(pair, ["0"]) as record:
        _, outputs = record(images)
    assert outputs["0"].dtype == torch.float32
    assert torch.equal(outputs["0"], (images.half() + 1).float())


def test_values_do_not_depend_on_which_layers_are_recorded():
    # torch's fused encoder layer is taken only where no gradients are wanted and no hook hangs inside.
    net = Tokens().eval()
    images = torch.randn(2, 3, 32, 32)
    with Recorder(net, ["blocks.1"]) as record:
        alone, one = record(images)
    with Recorder(net, ["blocks.1", "blocks.0.linear1", "blocks.1.self_attn"]) as record:
        together, more = record(images)
    assert torch.equal(alone, together)
    assert torch.equal(one["blocks.1"], more["blocks.1"])
    assert torch.backends.mha.get_fastpath_enabled()


def test_to_maps_refuses_other_shapes():
    layer = LayerInfo("blocks.0", (8, 4, 4), "tokens", 1, "float32", "Block")
    with pytest.raises(MicrotomeError, match=r"layer 'blocks\.0': output \(18, 8\), expected \(17, 8\)"):
        to_maps(torch.zeros(2, 18, 8), layer)
