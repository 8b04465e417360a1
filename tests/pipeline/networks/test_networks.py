"""Networks: from files, from torchvision, and with real weights. Everything that needs torchvision is here."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks import checkpoint
from pipeline.networks.build import build, load
from pipeline.networks.layer_id import layer_ids
from pipeline.networks.layers import Recorder, resolve, to_maps

ROOT = Path(__file__).parents[3]
SHARED = Path(os.environ.get("MICROTOME_SHARED", ROOT.parent / "shared")) / "data"
CIFAR = str(ROOT / "config" / "networks" / "cifar.py")

SMALL = """
import dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Shape:
    units: "int" = 4

def small(units=4):
    return nn.Sequential(nn.Conv2d(3, Shape(units).units, 3), nn.ReLU(), nn.Dropout(0.5))

def fails():
    raise ValueError("no such thing")

def number():
    return 3

_hidden = small
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "it's a $(net).py"
    path.write_text(SMALL)
    return path


def test_a_spec_is_plain_data():
    spec = NetworkSpec(module="a.py:net", arguments={"units": 3}, weights="w.pt", prefix="module.")
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert NetworkSpec(**json.loads(spec.model_dump_json())) == spec
    assert (spec.module_file, spec.module_function, spec.weights_file) == (Path("a.py"), "net", Path("w.pt"))
    assert spec.architecture == "net"
    assert NetworkSpec(torchvision="resnet18").weights_file is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "exactly one of"),
        ({"torchvision": "resnet18", "module": "a.py:b"}, "exactly one of"),
        ({"module": "a.py"}, "not of the form path.py:function"),
        ({"module": "a.py:b; import os"}, "not of the form path.py:function"),
        ({"torchvision": "resnet18", "weight": "random"}, "Extra inputs are not permitted"),
        ({"torchvision": "resnet18", "seed": -1}, "greater than or equal to 0"),
    ],
)
def test_wrong_specs_are_refused(wrong, said):
    with pytest.raises(ValidationError, match=said):
        NetworkSpec(**wrong)


def test_the_description_is_imported_without_torch():
    code = "import sys, pipeline.networks.build, pipeline.networks.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_the_seed_decides_the_weights_and_nothing_else_is_touched(file):
    def weights(seed):
        return build(NetworkSpec(module=f"{file}:small", seed=seed))[0].weight

    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    first = weights(1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()
    torch.rand(9)
    assert torch.equal(first, weights(1))
    assert not torch.equal(first, weights(2))


def test_a_network_from_a_file(file):
    paths, cached = list(sys.path), set(file.parent.iterdir())
    network = build(NetworkSpec(module=f"{file}:small", arguments={"units": 7}))
    assert network[0].out_channels == 7
    assert not network.training
    assert sys.path == paths
    assert set(file.parent.iterdir()) == cached  # no bytecode beside it
    meta = build(NetworkSpec(module=f"{file}:small"), device="meta")
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_a_file_replaced_with_its_time_kept_is_read_again(file):
    spec = NetworkSpec(module=f"{file}:small")
    stamp = file.stat()
    assert build(spec)[0].out_channels == 4
    file.write_text(SMALL.replace("units=4", "units=6"))
    os.utime(file, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert build(spec)[0].out_channels == 6


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("smal", {}, r"function 'smal' is not in .*\.py; nearest: small"),
        ("fails", {}, r"fails\(\) failed: ValueError: no such thing"),
        ("small", {"unit": 3}, r"small\(unit=3\) failed: TypeError: .*unexpected keyword argument 'unit'"),
        ("number", {}, r"number returned int, expected a torch\.nn\.Module"),
    ],
)
def test_files_that_do_not_give_a_network(file, function, arguments, said):
    with pytest.raises(MicrotomeError, match=said):
        build(NetworkSpec(module=f"{file}:{function}", arguments=arguments))


def test_files_that_cannot_be_loaded(tmp_path):
    (tmp_path / "mynet.py").write_text("import nowhere_to_be_found\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    with pytest.raises(MicrotomeError, match=r"mynet\.py cannot be loaded: ModuleNotFoundError"):
        build(NetworkSpec(module=f"{tmp_path / 'mynet.py'}:f"))
    with pytest.raises(MicrotomeError, match=r"broken\.py cannot be loaded: SyntaxError"):
        build(NetworkSpec(module=f"{tmp_path / 'broken.py'}:f"))
    with pytest.raises(MicrotomeError, match=r"mynets\.py cannot be read \(No such file.*\); nearest: mynet\.py"):
        build(NetworkSpec(module=f"{tmp_path / 'mynets.py'}:f"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("import sys; sys.exit(3)", r"exits \(3\)"),
        ("exit()", r"exits \(None\)"),
        ("raise SystemExit('usage')", r"exits \('usage'\)"),
        ("import os; os._exit(0)", "ends the process"),
        ("import os; os.fork()", "forks the process"),
        ("import multiprocessing as m; m.get_context('fork').Process(target=int).start()", "forks the process"),
        ("input('units? ')", "reads from standard input"),
        ("import sys; sys.stdin.read()", "reads from standard input"),
        ("import sys; next(sys.stdin)", "reads from standard input"),
    ],
)
@pytest.mark.parametrize("where", ["when it is loaded", "in the builder"])
def test_a_file_that_exits_forks_or_asks_is_named(tmp_path, line, said, where):
    body = f"{line}\ndef net(): pass" if where == "when it is loaded" else f"def net():\n    {line}"
    (tmp_path / "net.py").write_text(body)
    before = os._exit, os.fork, sys.stdin
    with pytest.raises(MicrotomeError, match=rf"^network file .*net\.py {said}, expected a file that only defines"):
        build(NetworkSpec(module=f"{tmp_path / 'net.py'}:net"))
    assert (os._exit, os.fork, sys.stdin) == before


def test_load_takes_the_checkpoint_that_is_meant(file, tmp_path):
    spec = NetworkSpec(module=f"{file}:small")
    wanted = build(spec.model_copy(update={"seed": 3})).state_dict()
    path, prefixed = tmp_path / "w.pt", tmp_path / "prefixed.pt"
    torch.save(wanted, path)
    torch.save({f"net.{key}": value for key, value in wanted.items()}, prefixed)
    for each in (
        load(spec.model_copy(update={"weights": str(path)})),
        load(spec.model_copy(update={"weights": str(prefixed), "prefix": "net."})),
        load(spec.model_copy(update={"weights": "train"}), path),
        load(spec.model_copy(update={"weights": str(prefixed), "prefix": "net."}), path),
    ):
        assert torch.equal(each[0].weight, wanted["0.weight"])
        assert not each.training
    with pytest.raises(MicrotomeError, match="small is trained by the workflow"):
        load(spec.model_copy(update={"weights": "train"}))


def test_anything_with_the_fields_builds(file):
    class Configured:
        torchvision = timm = transformers = local = files = None
        download = False
        module = f"{file}:small"
        arguments = {"units": 2}  # noqa: RUF012
        weights, seed, prefix = "random", 0, None
        layers = "auto"

    assert load(Configured())[0].out_channels == 2


# torchvision


def test_unknown_and_fetching_torchvision_networks_are_refused():
    with pytest.raises(MicrotomeError, match=r"network 'resnet81' is not in torchvision .*; nearest: resnet18"):
        build(NetworkSpec(torchvision="resnet81"))
    for name in ("weights", "weights_backbone", "pretrained"):
        with pytest.raises(MicrotomeError, match=rf"argument '{name}' of resnet18 would fetch weights"):
            build(NetworkSpec(torchvision="resnet18", arguments={name: "DEFAULT"}))


def test_segmentation_networks_fetch_no_backbone(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("fetched weights"))
    network = build(NetworkSpec(torchvision="lraspp_mobilenet_v3_large"), device="meta")
    layers = resolve(network, ["classifier.low_classifier"], (3, 64, 64))
    assert layers[0].shape == (21, 8, 8)


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        ("resnet18", 8, ("layer1.0", (64, 56, 56), "map"), ("layer4.1", (512, 7, 7), "map")),
        ("squeezenet1_0", 8, ("features.3", (128, 54, 54), "map"), ("features.12", (512, 13, 13), "map")),
        ("vgg11", 8, ("features.1", (64, 224, 224), "map"), ("features.19", (512, 14, 14), "map")),
        ("vgg11_bn", 8, ("features.2", (64, 224, 224), "map"), ("features.27", (512, 14, 14), "map")),
        ("mobilenet_v2", 19, ("features.0", (32, 112, 112), "map"), ("features.18", (1280, 7, 7), "map")),
        ("shufflenet_v2_x0_5", 18, ("conv1", (24, 112, 112), "map"), ("conv5", (1024, 7, 7), "map")),
        ("googlenet", 12, ("conv1", (64, 112, 112), "map"), ("inception5b", (1024, 7, 7), "map")),
        (
            "vit_b_16",
            12,
            ("encoder.layers.encoder_layer_0", (768, 14, 14), "tokens"),
            ("encoder.layers.encoder_layer_11", (768, 14, 14), "tokens"),
        ),
        ("swin_t", 16, ("features.0", (96, 56, 56), "channels_last"), ("features.7.1", (768, 7, 7), "channels_last")),
    ],
)
def test_auto_takes_the_blocks_of_torchvision_networks(name, count, first, last):
    arguments = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    layers = resolve(build(NetworkSpec(torchvision=name, arguments=arguments), "meta"), "auto", (3, 224, 224))
    assert len(layers) == count
    assert [(layer.name, layer.shape, layer.layout) for layer in (layers[0], layers[-1])] == [first, last]
    assert {layer.special for layer in layers} == ({1} if name.startswith("vit") else {0})


def test_layers_of_one_backbone_are_shared_whatever_the_head():
    def network(classes):
        return build(NetworkSpec(torchvision="squeezenet1_1", arguments={"num_classes": classes}))

    def ids(network):
        return layer_ids(network, resolve(network, "auto", (3, 64, 64)), {}, {}, (3, 64, 64))

    one, other = network(10), network(7)
    other.features.load_state_dict(one.features.state_dict())
    assert ids(one) == ids(other)
    with torch.no_grad():
        other.features[6].squeeze.bias[0] += 1
    assert [a == b for a, b in zip(ids(one).values(), ids(other).values(), strict=True)] == [True] * 2 + [False] * 6


@pytest.fixture(scope="module")
def vit():
    return build(NetworkSpec(module=f"{CIFAR}:vit"))


def vit_ids(network):
    wanted = ["conv_proj", "encoder.dropout", "encoder.layers.*"]
    return layer_ids(network, resolve(network, wanted, (3, 32, 32)), {}, {}, (3, 32, 32))


@pytest.mark.parametrize(
    ("key", "kept"),
    [
        ("encoder.layers.encoder_layer_1.self_attention.out_proj.weight", 3),
        ("encoder.layers.encoder_layer_3.self_attention.in_proj_bias", 5),
        ("encoder.layers.encoder_layer_0.mlp.3.bias", 2),
        ("encoder.pos_embedding", 1),
        ("class_token", 0),
        ("encoder.ln.weight", 6),
        ("heads.head.weight", 6),
    ],
)
def test_ids_of_a_vision_transformer_change_from_the_block_on(vit, key, kept):
    before = vit_ids(vit)
    assert len(before) == 6
    parameter = vit.get_parameter(key)
    saved = parameter.detach().clone()
    with torch.no_grad():
        parameter.view(-1)[-1] += 1e-3
        after = vit_ids(vit)
        parameter.copy_(saved)
    assert [before[name] == after[name] for name in before] == [i < kept for i in range(6)]
    assert vit_ids(vit) == before


def test_tokens_of_a_vision_transformer(vit):
    layers = resolve(vit, "auto", (3, 32, 32))
    images = torch.randn(2, 3, 32, 32)
    with Recorder(vit, [layer.name for layer in layers]) as record:
        logits, outputs = record(images)
    assert logits.shape == (2, 10)
    maps, special = to_maps(outputs[layers[-1].name], layers[-1])
    assert maps.shape == (2, 128, 8, 8)
    with torch.no_grad():
        normed = vit.encoder.ln(special[:, 0])
        torch.testing.assert_close(vit.heads(normed), logits, rtol=1e-4, atol=1e-5)


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR_STATISTICS = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is absent (set MICROTOME_SHARED)")
@pytest.mark.parametrize(
    ("function", "weights", "statistics", "accuracy"),
    [
        ("resnet20", "cifar_resnet20.pt", IMAGENET, 0.915),
        ("vit", "cifar_vit_d4h4_torchvision.pt", CIFAR_STATISTICS, 0.717),
    ],
)
def test_published_accuracy_on_real_images(function, weights, statistics, accuracy):
    from PIL import Image

    folders = sorted((SHARED / "cifar10" / "test").iterdir())
    files = [(label, path) for label, folder in enumerate(folders) for path in sorted(folder.iterdir())[:20]]
    labels = torch.tensor([label for label, _ in files])
    pixels = torch.from_numpy(np.stack([np.asarray(Image.open(path)) for _, path in files]))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    images = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    network = load(NetworkSpec(module=f"{CIFAR}:{function}", weights=str(SHARED / "models" / weights)))
    with torch.no_grad():
        correct = (network(images).argmax(1) == labels).float().mean().item()
    # Three standard errors of a share counted over 200 images.
    assert abs(correct - accuracy) < 3 * (accuracy * (1 - accuracy) / 200) ** 0.5


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is absent (set MICROTOME_SHARED)")
def test_resnet56_fits_its_checkpoint():
    path = SHARED / "models" / "cifar_resnet56.pt"
    network = build(NetworkSpec(module=f"{CIFAR}:resnet56"), device="meta")
    checkpoint.load_state(network, checkpoint.shapes(path), path)
