"""Projections without the switches of max pooling, by hand in float64."""

import numpy as np
import pytest
import torch
from experiments import run
from torch import nn
from torch.nn import functional
from visualizations import experiment

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, Unit, gradients
from pipeline.networks.graph.call_sites import UnsupportedError
from pipeline.stages.visualize import page
from pipeline.stages.visualize.found import ProjectedLayer, switches_cosine
from pipeline.stages.visualize.projecting import Partly, Ruled, Spread
from pipeline.stages.visualize.results import Drawn
from pipeline.storage.store import StoreRef, write_whole

POOLS = [(2, 2, 0, False), (3, 2, 1, False), (3, 2, 0, True), ((2, 3), (1, 2), (0, 1), False)]


@pytest.mark.parametrize(("kernel", "stride", "padding", "ceil_mode"), POOLS, ids=str)
def test_spread_by_loops(kernel, stride, padding, ceil_mode):
    """Each value goes in equal shares to the pixels of its window that lie in the image."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64, generator=generator).requires_grad_()
    made = Spread.apply(x, kernel, stride, padding, ceil_mode)
    torch.testing.assert_close(made, functional.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode))
    r = torch.randn(made.shape, dtype=torch.float64, generator=generator)
    (found,) = torch.autograd.grad(made, x, r)
    (high, wide), (down, right), (top, left) = (
        each if isinstance(each, tuple) else (each, each) for each in (kernel, stride, padding)
    )
    expected = torch.zeros_like(x)
    for y in range(made.shape[2]):
        for column in range(made.shape[3]):
            rows = [each for each in range(y * down - top, y * down - top + high) if 0 <= each < 7]
            columns = [each for each in range(column * right - left, column * right - left + wide) if 0 <= each < 8]
            for row in rows:
                expected[:, :, row, columns] += (r[:, :, y, column] / (len(rows) * len(columns)))[:, :, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def network(pooling):
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), pooling, nn.Conv2d(4, 3, 3), nn.ReLU()
    nn.init.ones_(layers[3].bias)  # so that each image excites each unit somewhere
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()


@pytest.mark.parametrize("rule", ["guided_backprop", "deconvnet"])
def test_rules_with_and_without_switches_by_hand(rule):
    net = network(nn.MaxPool2d(2))
    first, _, _, second, _ = net[0]
    x = torch.randn(3, 2, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    target = Unit("0", (1,))
    for end in ("", "_unswitched"):
        found = gradients(net, x, target, sites=Partly(net, rule + end)).inputs
        before = first(x)
        pooled, switches = functional.max_pool2d(before.relu(), 2, return_indices=True)
        after = second(pooled)
        assert after[:, 1].flatten(1).amax(1).gt(0).all()
        single = torch.zeros_like(after)
        best = after[:, 1].relu().flatten(1).argmax(1)
        single[:, 1].flatten(1)[torch.arange(3), best] = 1.0
        guided = rule == "guided_backprop"
        r = single.relu() * ((after > 0) if guided else 1)
        r = functional.conv_transpose2d(r, second.weight)
        unpooled = functional.max_unpool2d(r, switches, 2) if not end else functional.interpolate(r, scale_factor=2) / 4
        r = unpooled.relu() * ((before > 0) if guided else 1)
        expected = functional.conv_transpose2d(r, first.weight, padding=1)
        assert expected.abs().amax((1, 2, 3)).gt(0).any()
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-12)


def test_networks_without_switches_to_leave_out_are_refused():
    x, target = torch.rand(2, 2, 8, 8, dtype=torch.float64), Logit(torch.zeros(2, dtype=torch.int64))
    net = network(nn.AvgPool2d(2))
    gradients(net, x, target, sites=Ruled(net, "guided_backprop"))
    with pytest.raises(UnsupportedError, match=r"without switches: the network calls no max pooling"):
        gradients(net, x, target, sites=Ruled(net, "guided_backprop_unswitched"))
    with pytest.raises(UnsupportedError, match=r"'max_pool2d' in module '0.2' is no plain max_pool2d"):
        net = network(nn.MaxPool2d(2, dilation=2))
        gradients(net, x, target, sites=Ruled(net, "deconvnet_unswitched"))
    with pytest.raises(UnsupportedError, match=r"'adaptive_max_pool2d' in module '0.2' is no plain max_pool2d"):
        net = network(nn.AdaptiveMaxPool2d(4))
        gradients(net, x, target, sites=Ruled(net, "deconvnet_unswitched"))
    net = network(nn.MaxPool2d(2))
    gradients(net, x, target, sites=Ruled(net, "deconvnet_unswitched"))


@pytest.mark.slow
@pytest.mark.usefixtures("workers")
def test_the_stage_refuses_them_by_key(tmp_path):
    """The small network has no max pooling."""
    projections = {"images": 1, "methods": ["guided_backprop", "guided_backprop_unswitched"]}
    raw = experiment(tmp_path, units={"b": [0]}, classes=[], maximise=None, projections=projections)
    raw["datasets"]["scenes"]["concepts"] = []
    expected = r"visualize.wishes.projections.methods: 'guided_backprop_unswitched' of network 'cnn': .* no max pooling"
    with pytest.raises(MicrotomeError, match=expected):
        run(raw, "ingest", "network", "extract", "visualize")


def test_cosines_of_projections_with_and_without_switches(tmp_path):
    """Over the pairs of a store by loops; a projection of which nothing came back has none."""
    methods = ["gradient", "guided_backprop_unswitched", "guided_backprop"]
    maps = np.random.default_rng(0).integers(0, 256, (2, 3, 3, 3, 4, 5), np.uint8)
    maps[1, 2, 1] = 128
    names = "unit", "place", "method", "channel", "y", "x"
    files = write_whole(tmp_path / "b", {"projection": (names, maps)}, {})
    facts = Drawn(store="projections", subject="b", group="b", rows=2)
    layer = ProjectedLayer(facts, StoreRef(tmp_path / "b", files), np.array([4, 7]), methods, "closed form")
    away = maps.astype(float) - 128
    pairs = [(away[u, p, 2].ravel(), away[u, p, 1].ravel()) for u in range(2) for p in range(3) if (u, p) != (1, 2)]
    expected = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in pairs]
    np.testing.assert_allclose(switches_cosine(layer, "guided_backprop"), expected, rtol=1e-12)
    assert switches_cosine(layer, "deconvnet") is None
    (said,) = page.switches_said(layer)
    assert said.startswith("b: projections by guided backpropagation without the switches of max pooling have a cosine")
    assert f"{np.median(expected):.2f} in the median" in said
