"""Residual additions and attention weights of the three libraries' networks, against what these say themselves."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.networks.graph.operations import Operations, find
from pipeline.networks.layers import survey

ROOT = Path(__file__).parents[3]
TIMM = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HF = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
BOTH = ["attention", "mlp"] * 2


class Seen(Operations):
    """Attention weights by name, as `find` says that they are read."""

    def __init__(self, network, attention):
        super().__init__(network)
        self.attention = {each.place: each for each in attention}
        self.weights = {}

    def on_product(self, product):
        each = self.attention.get(product.place)
        if each is not None:
            self.weights[each.name] = each.reading.weights(product.operand(each.operand), 2)


def images(side=32, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def shaken(network):
    """Weights and norms that are no mere units, so that attention differs from a mean."""
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def found_in(network, side=32):
    with torch.no_grad():
        surveyed = survey(network, (3, side, side))
    return find(network, images(side), {layer.name: layer for layer in surveyed.layers})


def timm_vit(name, **changes):
    timm = pytest.importorskip("timm")
    return shaken(timm.create_model(name, **(TIMM | changes)))


def hf(model, **changes):
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, model)
    return shaken(kind(kind.config_class(**(HF | changes))))


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return shaken(VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=5))


def test_torchvision_attention_is_what_torch_gives():
    network = torchvision_vit()
    found = found_in(network)
    given = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: args[0]}))
    plain = network(images())
    with torch.no_grad(), Seen(network, found.attention) as seen:
        logits = network(images())
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-5)
    assert list(seen.weights) == [each.name for each in found.attention]
    for name, weights in seen.weights.items():
        x = given[name]
        _, expected = network.get_submodule(name)(x, x, x, need_weights=True, average_attn_weights=False)
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "changes", "special"),
    [
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", {"qk_norm": True, "qkv_bias": False}, 1),
        ("vit_small_patch14_reg4_dinov2", {}, 5),
        ("deit_tiny_distilled_patch16_224", {}, 2),
        ("vit_base_patch16_siglip_gap_224", {}, 0),
        ("beit_base_patch16_224", {"use_rel_pos_bias": True}, 1),
        ("eva02_tiny_patch14_224", {}, 1),
        ("vit_small_patch16_dinov3", {}, 5),
    ],
)
def test_timm_attention_is_that_of_its_plain_path(name, changes, special):
    """With the fused kernel switched off, a dropout that does nothing is given the weights."""
    network = timm_vit(name, **changes)
    found = found_in(network)
    assert [each.name for each in found.attention] == ["blocks.0.attn", "blocks.1.attn"]
    assert {each.info.special for each in found.attention} == {special} and found.attention[0].heads == 2
    assert [each.branch for each in found.skips] == BOTH
    attention = [network.get_submodule(each.name) for each in found.attention]
    assert all(module.fused_attn for module in attention)
    with torch.no_grad(), Seen(network, found.attention) as seen:
        network(images())
    expected = []
    for module in attention:
        module.fused_attn = False
    found = found_in(network)
    for module in attention:
        module.attn_drop.register_forward_hook(lambda _, args, output: expected.append(output))
    with torch.no_grad(), Seen(network, found.attention) as plain:
        network(images())
    for each in (seen, plain):
        for weights, own in zip(each.weights.values(), expected, strict=True):
            torch.testing.assert_close(weights, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "special"),
    [
        ("ViTModel", 1),
        ("DeiTModel", 2),
        ("BeitModel", 1),
        ("Dinov2WithRegistersModel", 5),
        ("SiglipVisionModel", 0),
    ],
)
def test_transformers_attention_is_that_of_its_eager_path(model, special):
    network = hf(model)
    found = found_in(network)
    assert len(found.attention) == 2 and {each.info.special for each in found.attention} == {special}
    assert [each.branch for each in found.skips] == BOTH
    with torch.no_grad(), Seen(network, found.attention) as fused:
        network(images())
    eager = hf(model, attn_implementation="eager")
    eager.load_state_dict(network.state_dict())
    with torch.no_grad(), Seen(eager, found_in(eager).attention) as plain:
        expected = eager(images(), output_attentions=True).attentions
    for seen in (fused, plain):
        ours = [seen.weights[each.name] for each in found.attention]  # without that of a pooling head
        for weights, own in zip(ours, expected, strict=True):
            torch.testing.assert_close(weights, own, rtol=1e-4, atol=1e-5)


def test_skips_of_residual_networks():
    torchvision = pytest.importorskip("torchvision")
    found = found_in(torchvision.models.resnet18().eval(), 64)
    assert [each.name for each in found.skips] == [f"layer{stage}.{block}" for stage in range(1, 5) for block in (0, 1)]
    shortcuts = {each.name: each.shortcut for each in found.skips}
    assert shortcuts["layer1.0"] == "identity" and shortcuts["layer2.0"] == "projection"
    assert all(not each.first and each.branch == "convolution" for each in found.skips), "out += identity"
    assert found.without_attention == "it has no self-attention"

    cifar = runpy.run_path(str(ROOT / "config/networks/cifar.py"))
    found = found_in(cifar["resnet20"]().eval())
    assert [each.name for each in found.skips] == [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert {each.shortcut for each in found.skips} == {"identity"}, "cut and padded, without weights"

    bottlenecks = found_in(torchvision.models.resnet50().eval(), 64)
    assert len(bottlenecks.skips) == 16 and bottlenecks.skips[1].shortcut == "identity"
    assert sum(each.shortcut == "projection" for each in bottlenecks.skips) == 4


@pytest.mark.parametrize("name", ["resnet26d", "resnet10t", "convnextv2_atto"])
def test_skips_of_timm(name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name).eval()
    found = found_in(network, 64)
    kinds = ("Bottleneck", "BasicBlock", "ConvNeXtBlock")
    blocks = [key for key, module in network.named_modules() if type(module).__name__ in kinds]
    assert [each.name for each in found.skips] == blocks
    assert {each.branch for each in found.skips} == {"convolution"}


class Sums(nn.Module):
    """Additions that are none of a branch and what skips it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.place = nn.Parameter(torch.randn(1, 3, 1, 1))

    def forward(self, x):
        two = self.a(x) + self.b(x)  # two branches alike
        two = two + self.place  # not of the image
        two = two + two  # with itself
        return two + two.sigmoid()  # without weights


class Residual(nn.Module):
    def __init__(self, first=True, in_place=False):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.in_place = first, in_place

    def forward(self, x):
        x = self.stem(x)
        branch = self.conv(x)
        if self.in_place:
            branch += x
            return branch
        return x + branch if self.first else branch + x


def test_other_additions_are_no_skips():
    found = found_in(Sums())
    assert found.skips == [] and found.without_skips.startswith("no addition of a branch")


@pytest.mark.parametrize(("first", "in_place"), [(True, False), (False, False), (False, True)])
def test_a_skip_is_left_out(first, in_place):
    network = Residual(first, in_place).eval()
    (skip,) = found_in(network).skips
    assert skip.first == first and skip.name == ""

    class Without(Operations):
        def on_addition(self, place, operands):
            return (0 if skip.first else 1) if place == skip.place else None

    given = images()
    whole = network(given)
    with torch.no_grad(), Without(network):
        lacking = network(given)
    branch = network.conv(network.stem(given))
    torch.testing.assert_close(lacking, branch)
    torch.testing.assert_close(whole, branch + network.stem(given))


def test_windows_are_said_to_be():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.swin_transformer.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=3).eval()
    found = found_in(network)
    assert found.attention == [] and "attends within windows" in found.without_attention
    assert [each.branch for each in found.skips] == BOTH


def test_hooks_are_gone_afterwards():
    network = torchvision_vit()
    found_in(network)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    with pytest.raises(RuntimeError), Seen(network, []):
        network(torch.zeros(1, 4, 32, 32))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
