"""What the functions of attribution refuse: numbers that would look right and mean something else, or nothing."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline import attribute
from pipeline.errors import MicrotomeError

GRID = {"kind": "grid", "cells": [2, 2]}


def images(count=3):
    return torch.randn((count, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def vectors():
    return torch.randn((4, 6), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def convolutional(classes=2):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, classes)).double().eval()


def linear():
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)).double().eval()


class OfTheBatch(nn.Module):
    """Its scores depend on the mean over the batch."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x):
        h = self.conv(x)
        return self.head(functional.relu(h - h.mean(0, keepdim=True)).mean((2, 3)))


class Counting(nn.Module):
    """Its scores depend on how often it was called."""

    def __init__(self):
        super().__init__()
        self.head, self.calls = nn.Linear(6, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.head(x) * self.calls


MIXING = {
    "kernel_shap": lambda: attribute.kernel_shap(OfTheBatch().double().eval(), images(), 0, segments=GRID),
    "saliency": lambda: attribute.saliency(OfTheBatch().double().eval(), images(), 0),
    "one image": lambda: attribute.saliency(OfTheBatch().double().eval(), images(1), 0),
    "calls": lambda: attribute.saliency(Counting().double().eval(), vectors(), 0),
    "target": lambda: attribute.gradient_x_input(
        convolutional(), images(), attribute.Scalar(lambda y: y[:, 0] - y[:, 0].mean())
    ),
}


@pytest.mark.parametrize("name", MIXING)
def test_what_depends_on_other_inputs_is_refused(name):
    with pytest.raises(MicrotomeError, match="depends on the other inputs of its batch, or on earlier calls"):
        MIXING[name]()


def test_one_logit_has_no_probability():
    net, x = convolutional(1), images()
    for method in (attribute.lime, attribute.rise):
        with pytest.raises(MicrotomeError, match="the softmax of one logit is always 1: give `softmax: false`"):
            method(net, x, 0, segments=GRID)
        assert float(method(net, x, 0, segments=GRID, softmax=False).map.abs().max()) > 0
    assert float(attribute.kernel_shap(net, x, 0, segments=GRID).map.abs().max()) > 0
    with pytest.raises(MicrotomeError, match="one logit, whose softmax is always 1"):
        attribute.deeplift(net, x, attribute.Logit(torch.zeros(3, dtype=torch.int64), link="probability"))


def of_probability(**how):
    return attribute.Logit(torch.tensor([0, 1, 0]), **how)


def rules(rule):
    return {"0": {"rule": rule}}


ODD = {
    "link": (lambda: of_probability(link="prob"), r"link 'prob': logit, probability.*; nearest: probability"),
    "probabilities": (
        lambda: attribute.deeplift(convolutional(), images(), of_probability(link="probability", probabilities=True)),
        "numbers below 0: they are no probabilities",
    ),
    "bounds turned": (
        lambda: attribute.lrp(convolutional(), images(), 0, rules=rules("z_b"), bounds=(9, -9)),
        "bounds: inputs go from",
    ),
    "bounds too near": (
        lambda: attribute.lrp(convolutional(), images(), 0, rules=rules("z_b"), bounds=(-0.1, 0.1)),
        "bounds: inputs go from",
    ),
    "one bound": (
        lambda: attribute.lrp(convolutional(), images(), 0, rules=rules("z_b"), bounds=4),
        "bounds: the least and the greatest",
    ),
    "a rule of a ReLU": (
        lambda: attribute.lrp(convolutional(), images(), 0, rules={"1": {"rule": "gamma"}}),
        "rules: '1' applies to no convolution or linear map",
    ),
    "a rule beyond the last layer": (
        lambda: attribute.lrp(convolutional(), images(), 0, rules={"depth 9-12": {"rule": "gamma"}}),
        "applies to no convolution .* depths count from 1 to 2",
    ),
    "a rule behind another": (
        lambda: attribute.lrp(
            convolutional(), images(), 0, rules={"*": rules("gamma")["0"], "0": rules("epsilon")["0"]}
        ),
        "rules: '0' applies to no",
    ),
    "baseline unused": (lambda: attribute.lrp(convolutional(), images(), 0, baseline=1.0), "does not use `baseline`"),
    "background unused": (
        lambda: attribute.saliency(convolutional(), images(), 0, background=images()),
        "does not use `background`",
    ),
    "bounds unused": (lambda: attribute.lrp(convolutional(), images(), 0, bounds=(-9, 9)), "does not use `bounds`"),
    "ridge of a tree": (
        lambda: attribute.lime(convolutional(), images(), 0, segments=GRID, model="tree", ridge=3),
        "ridge: a tree model has none",
    ),
    "depth of a linear model": (
        lambda: attribute.lime(convolutional(), images(), 0, segments=GRID, depth=4),
        "depth: a linear model has none",
    ),
    "selection of all": (
        lambda: attribute.lime(convolutional(), images(), 0, segments=GRID, selection="lasso"),
        "selection: give `features`",
    ),
    "layer by network": (
        lambda: attribute.grad_cam(convolutional(), images(), 0, layer={"cnn": "0"}),
        "names of networks are of the configuration",
    ),
    "baseline not finite": (
        lambda: attribute.deeplift(convolutional(), images(), 0, baseline=float("nan")),
        "baseline: its values are not all finite",
    ),
    "baselines": (
        lambda: attribute.deeplift(convolutional(), images(), 0, baseline=torch.zeros(5, 3, 8, 8)),
        r"a baseline of \(5, 3, 8, 8\) for inputs of \(3, 3, 8, 8\)",
    ),
    "seeds": (lambda: attribute.smooth_grad(convolutional(), images(), 0, seeds=[1]), "1 seeds for 3 inputs"),
    "no target": (lambda: attribute.deeplift(convolutional(), images(), None), "target None: classes are integers"),
    "a tuple": (lambda: attribute.kernel_shap(lambda z: (z, z), vectors(), 0), "the function gives tuple"),
    "a part of a batch": (
        lambda: attribute.saliency(convolutional(), images(), 0, batch=2.5),
        "batch: 2.5, expected a",
    ),
    "no linear target": (
        lambda: attribute.linear_shap(
            nn.Linear(6, 3).double().eval(), vectors(), attribute.Scalar(lambda y: y[:, 0] ** 2), background=vectors()
        ),
        "linear_shap explains logits, or the difference of two",
    ),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_arguments_are_refused(name):
    call, message = ODD[name]
    with pytest.raises(MicrotomeError, match=message):
        call()


def test_weights_that_are_no_numbers_are_refused():
    net = linear()
    net[0].weight.data[0, 0] = float("nan")
    for method in (attribute.saliency, attribute.deeplift, attribute.lrp, attribute.kernel_shap):
        with pytest.raises(MicrotomeError, match="the score that is explained is not finite"):
            method(net, vectors(), 0)


class Written(nn.Module):
    """It writes into its input after a convolution has kept it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(144, 2)

    def forward(self, x):
        y = self.conv(x)
        x.mul_(0.5)
        return self.head(y.relu().flatten(1)) + x.flatten(1)[:, :2]


class Again(nn.Module):
    """It keeps no values for its backward, and computes them again."""

    def __init__(self, on=True):
        super().__init__()
        self.net, self.on = convolutional(), on

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False) if self.on else self.net(x)


BACKWARDS = {
    "written, saliency": (lambda: attribute.saliency(Written().double().eval(), images(), 0), "writes in place"),
    "written, LRP": (lambda: attribute.lrp(Written().double().eval(), images(), 0), "writes in place"),
    "written, DeepLIFT": (lambda: attribute.deeplift(Written().double().eval(), images(), 0), "writes in place"),
    "checkpointed, LRP": (lambda: attribute.lrp(Again().eval(), images(), 0), "turn checkpointing off"),
    "volumes": (
        lambda: attribute.lime(nn.Flatten(), torch.randn(2, 3, 4, 4, 4), 0),
        r"segments are of vectors .* not of \(2, 3, 4, 4, 4\)",
    ),
    "unit": (
        lambda: attribute.saliency(convolutional(), images(), attribute.Unit("0", (4,))),
        r"no unit \(4,\) in the output of layer '0', which is \(4, 6, 6\)",
    ),
    "axes": (
        lambda: attribute.saliency(linear(), vectors(), attribute.Unit("0", (1, 2))),
        r"no unit \(1, 2\) in the output of layer '0', which is \(9,\)",
    ),
    "nothing": (
        lambda: attribute.saliency(linear(), vectors(), attribute.Unit("0", (slice(3, 3),))),
        "no unit",
    ),
}


@pytest.mark.parametrize("case", BACKWARDS)
def test_what_torch_cannot_do_is_said_in_one_line(case):
    function, message = BACKWARDS[case]
    with pytest.raises(MicrotomeError, match=message):
        function()


@pytest.mark.parametrize("method", ["saliency", "guided_backprop", "deconvnet", "integrated_gradients"])
def test_checkpointing_changes_no_number(method):
    torch.manual_seed(0)
    net = Again().eval()
    with_it = getattr(attribute, method)(net, images(), 0).map
    net.on = False
    assert torch.equal(with_it, getattr(attribute, method)(net, images(), 0).map)
