"""Inspection: everything that can be known or refused without work."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks import inspection
from pipeline.networks.build import build
from pipeline.networks.checkpoint import write_safetensors
from pipeline.networks.inspection import Ablation, answer, inspect, main
from pipeline.networks.layer import Inspection, LayerInfo
from pipeline.networks.positions import MOST_IMAGES

ROOT = Path(__file__).parents[3]

NETS = """
import torch
from torch import nn

def small(classes=5, **_):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, classes),
    )

class Values(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = small()
        self.gain = nn.Parameter(torch.ones(()))
    def forward(self, x):
        return self.net(x * float(self.gain))

def reads_values(): return Values()

class Aside(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.aside = nn.Conv2d(3, 5, 4), nn.Conv2d(3, 4, 4)
    def forward(self, x):
        self.aside(x)
        return self.used(x).mean((2, 3))

def aside(): return Aside()

def reads_values_while_built():
    return small(classes=int(torch.ones(3).sum().item()))

class Big(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.linear = nn.Linear(1_000_000, 1_000_000)
    def forward(self, x):
        return self.conv(x)

def big(): return Big()
"""


@pytest.fixture
def nets(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return path


def test_layers_bytes_parameters_classes(nets):
    found = inspect(NetworkSpec(module=f"{nets}:small"), (3, 8, 12), images=100)
    assert found.layers == [
        LayerInfo("1", (4, 8, 12), "map", 0, "float32", "ReLU"),
        LayerInfo("3", (6, 4, 6), "map", 0, "float32", "ReLU"),
    ]
    assert found.activation_bytes == {"1": 100 * 4 * 8 * 12 * 2, "3": 100 * 6 * 4 * 6 * 2}
    assert found.parameters == sum(p.numel() for p in build(NetworkSpec(module=f"{nets}:small")).parameters())
    assert (found.output, found.classes, found.architecture) == ((5,), 5, "small")
    assert json.loads(json.dumps(found.json()))["classes"] == 5


def test_a_network_of_terabytes_costs_nothing(nets):
    found = inspect(NetworkSpec(module=f"{nets}:big"), (3, 8, 8), ["conv"])
    assert found.parameters == 1_000_000 * 1_000_001 + 32
    assert found.classes is None
    (notice,) = found.notices
    assert notice.startswith("it was not run before the work, for which it needs 3,725.3 GiB of memory where ")
    assert notice.endswith("where the positions of its layers lie, was not checked")
    assert Inspection.read(json.loads(json.dumps(found.json()))).notices == [notice]


def test_memory_for_one_copy_is_enough_for_the_checks(nets, tmp_path, monkeypatch):
    """And for a checkpoint beside it, while that is loaded."""
    spec = NetworkSpec(module=f"{nets}:aside")
    held = sum(4 * each.numel() for each in build(spec).parameters())
    free = held + MOST_IMAGES * 16 * 5 * 5 * 5 + 1
    monkeypatch.setattr(inspection.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert inspect(spec, (3, 8, 8), ["used"]).notices == []
    write_safetensors(tmp_path / "w.safetensors", build(spec).state_dict())
    loaded = NetworkSpec(module=f"{nets}:aside", weights=str(tmp_path / "w.safetensors"))
    assert "was not checked" in inspect(loaded, (3, 8, 8), ["used"]).notices[0]
    monkeypatch.setattr(inspection.psutil, "virtual_memory", lambda: SimpleNamespace(available=free + held))
    assert inspect(loaded, (3, 8, 8), ["used"]).notices == []


@pytest.mark.parametrize("function", ["reads_values", "reads_values_while_built"])
def test_networks_that_need_values_are_inspected_on_the_cpu(nets, function):
    found = inspect(NetworkSpec(module=f"{nets}:{function}"), (3, 8, 8))
    assert [layer.shape for layer in found.layers] == [(4, 8, 8), (6, 4, 4)]


def test_checkpoints_are_checked_without_their_values(nets, tmp_path):
    spec = NetworkSpec(module=f"{nets}:small")
    state = build(spec).state_dict()
    path = tmp_path / "w.safetensors"
    write_safetensors(path, state)
    assert inspect(spec.model_copy(update={"weights": str(path)}), (3, 8, 8)).classes == 5
    assert inspect(spec.model_copy(update={"weights": "train"}), (3, 8, 8), weights_path=path).classes == 5
    with pytest.raises(
        MicrotomeError, match=r"1 of another shape \(6\.weight \(5, 6\), expected \(7, 6\)\)|2 of another"
    ):
        inspect(NetworkSpec(module=f"{nets}:small", arguments={"classes": 7}, weights=str(path)), (3, 8, 8))
    torch.save({f"module.{key}": value for key, value in state.items()}, tmp_path / "w.pt")
    wrapped = spec.model_copy(update={"weights": str(tmp_path / "w.pt")})
    assert inspect(wrapped.model_copy(update={"prefix": "module."}), (3, 8, 8)).classes == 5
    with pytest.raises(MicrotomeError, match=r"set `prefix: 'module\.'`"):
        inspect(wrapped, (3, 8, 8))


def test_what_a_checkpoint_holds_beside_is_said(nets, tmp_path):
    spec = NetworkSpec(module=f"{nets}:small")
    state = build(spec).state_dict()
    torch.save({"model": state, "ema": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "w.ckpt")
    spec = spec.model_copy(update={"weights": str(tmp_path / "w.ckpt")})
    (said,) = inspect(spec, (3, 8, 8)).notices
    assert "`model` is taken: for averaged (EMA) or other weights, set `within: ema`" in said
    taken = inspect(spec.model_copy(update={"within": "ema", "prefix": "module."}), (3, 8, 8))
    assert len(taken.notices) == 1 and "`ema` is taken" in taken.notices[0]


def test_images_that_do_not_fit_are_refused(nets):
    with pytest.raises(
        MicrotomeError, match=r"small cannot take images of shape \(1, 8, 8\): RuntimeError: .*channels"
    ):
        inspect(NetworkSpec(module=f"{nets}:small"), (1, 8, 8))


def test_requests_are_answered_one_by_one(nets, tmp_path):
    network = {"module": f"{nets}:small"}
    requests = [
        {"network": network, "input_shape": [3, 8, 8], "images": 2},
        {"network": network, "input_shape": [3, 8, 8], "layers": ["11"]},
        {"network": network, "input_shape": [3, 8]},
        {"network": {"module": f"{nets}:smal"}, "input_shape": [3, 8, 8]},
        {"network": network, "input_shape": [3, 8, 8], "layer": "auto"},
        "nonsense",
    ]
    (tmp_path / "request.json").write_text(json.dumps(requests))
    main(str(tmp_path / "request.json"), str(tmp_path / "response.json"))
    answers = json.loads((tmp_path / "response.json").read_text())
    assert answers == json.loads(json.dumps(answer(requests)))
    assert answers[0]["result"]["activation_bytes"] == {"1": 2 * 4 * 64 * 2, "3": 2 * 6 * 16 * 2}
    assert [next(iter(each)) for each in answers] == ["result", *["error"] * 5]
    assert answers[1]["error"] == "layer '11' is not in small; nearest: 1"
    assert answers[2]["error"].startswith("request: input_shape")
    assert "nearest: small" in answers[3]["error"]
    assert answers[4]["error"] == "request: layer: Extra inputs are not permitted"


def test_the_command(nets, tmp_path):
    (tmp_path / "q.json").write_text(json.dumps([{"network": {"module": f"{nets}:no"}, "input_shape": [3, 8, 8]}]))
    command = [sys.executable, "-m", "pipeline.networks.inspection", str(tmp_path / "q.json"), str(tmp_path / "a.json")]
    subprocess.run(command, cwd=ROOT, check=True)
    assert "function 'no' is not in" in json.loads((tmp_path / "a.json").read_text())[0]["error"]


def test_what_ablation_costs_and_what_cannot_be_ablated(nets):
    def ablated(function, layers, classes=5, **given):
        spec = NetworkSpec(module=f"{nets}:{function}")
        wanted = Ablation(layers=layers, classes=classes)
        return inspect(spec, (3, 16, 16), given.get("among", ["*"]), ablate=wanted).ablation

    assert ablated("small", "last") == {"3": 2 * 5}  # one weight of the linear layer for each class
    assert ablated("small", ["1"]) == {"1": 2 * 9 * 6 * 8 * 8 + 2 * 6 * 5}
    assert ablated("reads_values", "last", among=["net.3"]) == {"net.3": None}
    with pytest.raises(MicrotomeError, match=r"ablate.layers: '5' is not among the layers"):
        ablated("small", ["1", "5"])
    with pytest.raises(MicrotomeError, match=r"gives \(5,\) for an image, and the images have 12 classes"):
        ablated("small", "last", classes=12)
    with pytest.raises(MicrotomeError, match=r"layer 'aside': the network's output does not depend on it"):
        ablated("aside", ["aside"])
