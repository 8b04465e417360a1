"""Networks of timm and transformers with random weights: layers in execution order, token grids, ids, refusals."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.inspection import inspect
from pipeline.networks.layer_id import layer_ids
from pipeline.networks.layers import Recorder, resolve, to_maps
from tests.pipeline.networks.test_published import HF_TINY, transformers_folder

ROOT = Path(__file__).parents[3]
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 64, "patch_size": 8}
SWIN = {"img_size": 64, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
HIERA = {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": [1, 1], "q_pool": 1}
NEST = {"img_size": 64}
HF_VIT = HF_TINY | {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2}
HF_SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
HF_CNN = {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2}
BLOCKS = ["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0", "layers.1.blocks.1"]
SWIN_SHAPES = [(16, 16, 16)] * 2 + [(32, 8, 8)] * 2
SQUARE = (3, 64, 64)


@pytest.mark.parametrize(
    ("name", "arguments", "image", "names", "shapes", "special"),
    [
        ("vit_tiny_patch16_224", VIT, SQUARE, ["blocks.0", "blocks.1"], [(32, 8, 8)] * 2, 1),
        ("vit_small_patch14_reg4_dinov2", VIT, SQUARE, ["blocks.0", "blocks.1"], [(32, 8, 8)] * 2, 5),
        ("vit_base_patch16_reg4_gap_256", VIT, SQUARE, ["blocks.0", "blocks.1"], [(32, 8, 8)] * 2, 4),
        ("vit_base_patch16_siglip_gap_224", VIT, SQUARE, ["blocks.0", "blocks.1"], [(32, 8, 8)] * 2, 0),
        ("deit_tiny_distilled_patch16_224", VIT, SQUARE, ["blocks.0", "blocks.1"], [(32, 8, 8)] * 2, 2),
        (
            "vit_tiny_patch16_224",
            VIT | {"img_size": [96, 32]},
            (3, 96, 32),
            ["blocks.0", "blocks.1"],
            [(32, 12, 4)] * 2,
            1,
        ),
        ("swin_tiny_patch4_window7_224", SWIN, SQUARE, BLOCKS, SWIN_SHAPES, 0),
        (
            "convnext_atto",
            {"depths": [1, 2, 1, 1], "dims": [8, 16, 16, 16]},
            SQUARE,
            ["stem", "stages.0.blocks.0", "stages.1.downsample", "stages.1.blocks.0", "stages.1.blocks.1"]
            + [f"stages.{i}.{part}" for i in (2, 3) for part in ("downsample", "blocks.0")],
            [(8, 16, 16)] * 2 + [(16, 8, 8)] * 3 + [(16, 4, 4)] * 2 + [(16, 2, 2)] * 2,
            0,
        ),
    ],
)
def test_timm(name, arguments, image, names, shapes, special):
    found = inspect(NetworkSpec(timm=name, arguments=arguments), image)
    assert [layer.name for layer in found.layers] == names
    assert [layer.shape for layer in found.layers] == shapes
    assert {layer.special for layer in found.layers} == {special}


@pytest.mark.parametrize(
    ("kind", "settings", "names", "shapes", "special", "classes"),
    [
        ("ViTForImageClassification", HF_VIT, ["vit.layers.0", "vit.layers.1"], [(32, 8, 8)] * 2, 1, 5),
        ("DeiTForImageClassificationWithTeacher", HF_VIT, ["deit.layers.0", "deit.layers.1"], [(32, 8, 8)] * 2, 2, 5),
        ("BeitForImageClassification", HF_VIT, ["beit.layers.0", "beit.layers.1"], [(32, 8, 8)] * 2, 1, 5),
        ("Dinov2WithRegistersModel", HF_VIT, ["encoder.layer.0", "encoder.layer.1"], [(32, 8, 8)] * 2, 5, None),
        ("SiglipVisionModel", HF_VIT, ["encoder.layers.0", "encoder.layers.1"], [(32, 8, 8)] * 2, 0, None),
        (
            "SwinForImageClassification",
            HF_SWIN,
            [f"swin.encoder.{block}" for block in BLOCKS],
            SWIN_SHAPES,
            0,
            5,
        ),
        (
            "ConvNextForImageClassification",
            HF_CNN,
            [f"convnext.encoder.stages.{block}" for block in ("0.layers.0", "1.layers.0", "1.layers.1")],
            [(8, 16, 16)] + [(16, 8, 8)] * 2,
            0,
            5,
        ),
    ],
)
def test_transformers(tmp_path, kind, settings, names, shapes, special, classes):
    """With the weights of a folder, on the meta device but for the check of places."""
    folder = transformers_folder(tmp_path, kind, **settings)
    spec = NetworkSpec(transformers=str(folder), local=str(folder), weights="pretrained")
    found = inspect(spec, (3, *([settings.get("image_size", 64)] * 2)))
    blocks = [layer for layer in found.layers if "downsampling" not in layer.name]
    assert [layer.name for layer in blocks] == names
    assert [layer.shape for layer in blocks] == shapes
    assert {layer.special for layer in found.layers} == {special}
    assert found.classes == classes


def test_tokens_stand_where_the_image_does(tmp_path):
    """Against the network itself: without position and mixing, the patches of an image give its tokens row by row."""
    network = build(NetworkSpec(timm="vit_small_patch14_reg4_dinov2", arguments=VIT | {"img_size": [96, 32]}))
    (layer,) = resolve(network, ["blocks.0.norm1"], (3, 96, 32))
    images = torch.randn(2, 3, 96, 32)
    with Recorder(network, [layer.name]) as record, torch.no_grad():
        _, outputs = record(images)
        patches = network.patch_embed.proj(images)  # (batch, unit, y, x)
        position = network.pos_embed.reshape(12, 4, 32).permute(2, 0, 1)
        expected = network.blocks[0].norm1((patches + position).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    maps, special = to_maps(outputs[layer.name], layer)
    torch.testing.assert_close(maps, expected)
    assert special.shape == (2, 5, 32)


@pytest.mark.parametrize(
    ("spec", "layers", "said"),
    [
        ({"timm": "hiera_tiny_224", "arguments": HIERA}, ["blocks.0"], "not in row order"),
        ({"timm": "nest_tiny", "arguments": NEST}, ["levels.0.transformer_encoder.0"], "16x16 map"),
        ({"timm": "swin_tiny_patch4_window7_224", "arguments": SWIN}, ["layers.0.blocks.0.attn.qkv"], "the batch in"),
        ({"timm": "vit_tiny_patch16_224", "arguments": VIT}, ["blocks.0.attn.q_norm"], "not in row order"),
        ({"timm": "vit_tiny_patch16_224", "arguments": VIT}, "auto", "cannot take images"),
    ],
)  # fmt: skip
def test_windows_and_other_orders_are_refused(spec, layers, said):
    with pytest.raises(MicrotomeError, match=said):
        inspect(NetworkSpec(**spec), (3, 64, 96) if "take" in said else SQUARE, layers)


def test_random_forwards_are_refused(tmp_path):
    """A masked autoencoder shuffles its patches in eval mode, too."""
    folder = transformers_folder(tmp_path, "ViTMAEModel", **HF_VIT)
    spec = NetworkSpec(transformers=str(folder), local=str(folder))
    with pytest.raises(MicrotomeError, match="the forward draws random numbers"):
        inspect(spec, SQUARE)


def test_networks_that_take_something_else_are_refused(tmp_path):
    with pytest.raises(MicrotomeError, match="raft_small cannot take images"):
        inspect(NetworkSpec(torchvision="raft_small"), (3, 128, 128))
    generator = tmp_path / "generator.py"
    generator.write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.ConvTranspose2d(64, 1, 7), nn.Tanh())\n"
    )
    with pytest.raises(MicrotomeError, match=r"make cannot take images of shape \(3, 8, 8\): .*64 channels"):
        inspect(NetworkSpec(module=f"{generator}:make"), (3, 8, 8))


def test_backbones_have_no_logits():
    for arguments, classes in ((VIT, 1000), (VIT | {"num_classes": 0}, None), (VIT | {"num_classes": 7}, 7)):
        assert inspect(NetworkSpec(timm="vit_tiny_patch16_224", arguments=arguments), SQUARE).classes == classes


# ids of layers


def timm_vit(**arguments):
    return build(NetworkSpec(timm="vit_small_patch14_reg4_dinov2", arguments=VIT | arguments))


def hugging_vit(folder, **arguments):
    spec = NetworkSpec(transformers=str(folder), local=str(folder), weights="random", arguments=arguments)
    return build(spec)


def ids(network):
    return list(layer_ids(network, resolve(network, "auto", SQUARE), {}, {}, SQUARE).values())


@pytest.mark.parametrize(
    ("make", "head", "tokens", "second"),
    [
        ("timm", "num_classes", ("cls_token", "reg_token"), "blocks.1.mlp.fc1.weight"),
        (
            "transformers",
            "num_labels",
            ("dinov2_with_registers.embeddings.cls_token", "dinov2_with_registers.embeddings.register_tokens"),
            "dinov2_with_registers.encoder.layer.1.mlp.fc1.weight",
        ),
    ],
)
def test_ids_follow_the_backbone(tmp_path, make, head, tokens, second):
    if make == "timm":
        build_one = timm_vit
    else:
        folder = transformers_folder(tmp_path, "Dinov2WithRegistersForImageClassification", **HF_VIT)

        def build_one(**arguments):
            return hugging_vit(folder, **arguments)

    network, other = build_one(**{head: 5}), build_one(**{head: 9})
    state = {k: v for k, v in network.state_dict().items() if k in other.state_dict() and "head" not in k}
    other.load_state_dict({k: v for k, v in state.items() if "classifier" not in k}, strict=False)
    before = ids(network)
    assert len(set(before)) == 2
    assert ids(other) == before

    def changed(key):
        parameter = network.get_parameter(key)
        saved = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] += 1e-3
            after = ids(network)
            parameter.copy_(saved)
        return [a != b for a, b in zip(before, after, strict=True)]

    assert [changed(key) for key in tokens] == [[True, True], [True, True]]
    assert changed(second) == [False, True]
    assert ids(network) == before


def test_ids_are_the_same_in_every_process(tmp_path):
    folder = transformers_folder(tmp_path, **HF_VIT)
    code = (
        f"import sys; sys.path[:0] = {[str(ROOT / 'tests' / name) for name in ('pipeline/networks', 'support')]!r}\n"
        "from test_library_networks import *\n"
        f"print(*ids(timm_vit()), *ids(hugging_vit({str(folder)!r})))"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert told.stdout.split() == [*ids(timm_vit()), *ids(hugging_vit(folder))]
