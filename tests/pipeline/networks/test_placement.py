"""Where tensors are made, on a GPU that is not there: torch's fake tensors know their device and refuse to mix two."""

import contextlib
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels.similarity import gram
from pipeline.config.networks import Network
from pipeline.networks import build as networks
from pipeline.networks import forward
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder
from pipeline.stages.ablate import tasks
from pipeline.stages.extract import layers
from pipeline.stages.extract import tasks as extract_tasks
from pipeline.workers import devices

SPECS = {
    "resnet18": {"torchvision": "resnet18", "layers": ["layer1", "layer4"]},
    "vit_b_16": {"torchvision": "vit_b_16", "layers": ["encoder.layers.encoder_layer_11"]},
}


@contextlib.contextmanager
def a_gpu():
    """Everything in here is fake, `device()` says cuda, and every CUDA tensor is one.

    Events and pinned memory, which only a real one has, are left out.
    """
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.dict("os.environ", CUDA_VISIBLE_DEVICES="0"),
        mock.patch.object(torch.cuda, "Event"),
        mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
    ):
        assert devices.device() == "cuda"
        yield


def test_two_devices_do_not_mix_here():
    with a_gpu(), pytest.raises(Exception, match="devices"):
        torch.zeros(2, device="cuda") + torch.zeros(2)


@pytest.mark.parametrize("name", SPECS)
def test_a_forward_is_on_the_gpu_and_its_logits_come_back(name, monkeypatch):
    spec = Network.model_validate(SPECS[name] | {"weights": "random", "numerics": {"micro_batch": 4}})
    model = forward.Model(name, spec.model_dump_json(), None, "", "")
    sketch = networks.build(spec, device="meta")
    with a_gpu():
        network = sketch.to_empty(device="cuda")
        monkeypatch.setattr(forward, "network_of", lambda _: network)
        found = {}
        pixels = torch.zeros((6, 3, 224, 224), dtype=torch.uint8)
        head = forward.forward_in_batches(
            model, pixels, spec.layers, lambda layer, at, output: found.update({(layer, at): output.device.type})
        )
    assert head.shape == (6, 1000) and head.device.type == "cpu"
    assert found == {(layer, at): "cuda" for layer in spec.layers for at in (0, 4)}


def test_grey_images_of_one_mean():
    grey = {"preprocessing": {"mean": [0.5], "std": [0.2]}}
    spec = Network.model_validate({"torchvision": "resnet18", "weights": "random"} | grey)
    with a_gpu():
        x = forward.normalise(torch.zeros((2, 3, 8, 8), dtype=torch.uint8), spec)
    assert x.device.type == "cuda" and x.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("special", [0, 1])
def test_what_is_kept_of_a_layer_comes_to_the_cpu(special):
    info = LayerInfo("layer", (5, 2, 3), "tokens" if special else "map", special, "float32", "Block")
    with a_gpu():
        layer = layers.LayerStore("id", None, info, 2.0)
        kept = extract_tasks.Kept.empty(layer, 4)
        shape = (2, special + 6, 5) if special else (2, 5, 2, 3)
        kept.take(2, torch.zeros(shape, device="cuda"))
        every = [kept.maps, kept.maximum, kept.mean, kept.largest, *([kept.special] if special else [])]
        assert {each.device.type for each in every} == {"cpu"}


def test_gram_matrices_are_made_where_the_output_is():
    with a_gpu():
        output = torch.zeros((4, 8, 5, 5), device="cuda", dtype=torch.bfloat16)
        assert gram._product(output, 3, 0).device.type == "cuda"
        assert gram._centred(torch.zeros((4, 4), device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("layout", ["map", "vector", "channels_last", "tokens"])
def test_stored_maps_go_to_the_gpu(layout):
    special = 1 if layout == "tokens" else 0
    shape = (5, 1, 1) if layout == "vector" else (5, 2, 3)
    info = LayerInfo("layer", shape, layout, special, "float32", "Block")
    spec = Network.model_validate({"torchvision": "resnet18", "weights": "random"})
    model = forward.Model("net", spec.model_dump_json(), None, "", "")
    with a_gpu():
        tokens = torch.zeros((2, 1, 5)) if special else None
        assert tasks.as_output(torch.zeros((2, *shape)), tokens, info, model).device.type == "cuda"


def test_a_recorder_copies_on_the_device():
    with a_gpu():
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, device="cuda"), torch.nn.ReLU())
        with Recorder(network, ["0"]) as record:
            _, outputs = record(torch.zeros((1, 3, 4, 4), device="cuda"))
    assert outputs["0"].device.type == "cuda"
