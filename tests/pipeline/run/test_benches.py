"""Scripts that no test machine can run at their size, at a size that it can: that they run, and that they add up."""

import math

import pytest

from pipeline.networks.layer import LayerInfo
from tests.bench import bench_scheduler, gpu, scale_plan


def test_the_bench_of_a_gpu_runs_on_the_cores():
    found = gpu.measure({"squeezenet1_1": "features.3"}, images=4, size=32, shard=2, micro_batch=2)
    (one,) = found["networks"].values()
    rates = one["images a second"]
    assert len(rates) == 7 and all(rate > 0 for rate in rates.values())
    assert rates["dissection, all of it"] < rates["extraction, `store: full`"]
    assert rates["dissection, `store: none`"] < rates["extraction, `store: none`"]
    said = gpu.report(found)
    assert "4 images, on the cores" in said
    assert "aten::" in one["on the device"] and "conv" in one["on the device"]
    assert "torch.conv2d" in one["in Python"]


def test_the_plan_of_a_large_data_set_adds_up(monkeypatch):
    monkeypatch.setattr("pipeline.stages.dissect.stage.COUNTED", (2e-6, 1e-9))
    monkeypatch.setattr("pipeline.stages.extract.stage.STORED", 1e-8)
    layers = [
        LayerInfo("a", (4, 10, 10), "map", 0, "float32", "ReLU"),
        LayerInfo("b", (6, 5, 5), "tokens", 1, "float32", "Block"),
    ]
    one = scale_plan.Sketch("net", layers, flops=2e10, parameters=1000, largest=400)
    found = scale_plan.need(one, 1000)
    values = 4 * 100 + 6 * 25
    assert found.tasks == 16  # of 64 images
    assert found.files == 16 * (3 + 4)
    assert found.stored == pytest.approx(1000 * values * 2 * 0.8)
    assert 3600 * found.storing == pytest.approx(1000 * values * 1e-8)
    assert 3600 * found.counting == pytest.approx(1000 * 10 * (2e-6 + 56 * 56 * 1e-9))
    assert 3600 * found.forward == pytest.approx(1000 * 2e10 / 1e13)
    assert found.gpu_task == pytest.approx(1000 * (2e10 / 1e13 + values * 1e-8) / 16)
    rows = scale_plan.loads([one], {"most tasks a second of the scheduler's thread": 100.0})
    seconds = scale_plan.need(one, 1_281_167).gpu_task
    assert rows[1][1] == "8" and float(rows[1][3]) == pytest.approx(8 / seconds, abs=0.06)
    assert float(rows[2][4].rstrip(" %").replace(",", "")) == pytest.approx(1000 / seconds, rel=0.05)


def test_the_layers_of_the_plan_are_there():
    assert {name: len(layers) for name, layers in scale_plan.LAYERS.items()} == {"vit_l_16": 13, "resnet152": 13}
    one = scale_plan.sketch("resnet152")
    assert one.units == 256 + 2 * 512 + 7 * 1024 + 3 * 2048
    assert one.values == sum(math.prod(layer.shape) for layer in one.layers)
    assert one.flops == pytest.approx(2 * 11.5e9, rel=0.02)  # 11.5 billion multiplications, as published


def test_the_bench_of_a_scheduler_counts_its_tasks():
    found = bench_scheduler.measure(3, 30)
    assert (found["workers"], found["tasks"]) == (3, 30)
    assert 0 < found["in flight"] <= 3 * bench_scheduler.IN_FLIGHT
    assert found["CPU of the scheduler, ms a task"] > 0
