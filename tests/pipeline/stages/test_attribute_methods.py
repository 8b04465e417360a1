"""Each method of attribution against closed forms and brute force, and what holds for all of them."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.networks.graph.call_sites import UnsupportedError
from pipeline.stages.attribute.options import METHODS, OPTIONS, OfSplit, starts


def double(values):
    return torch.tensor(values, dtype=torch.float64)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)[:, None]


RELU_W, RELU_C = double([[1, -2], [3, 1], [-1, 1]]), double([1, -2, 0.5])


def relu_net(x):
    return F.relu(x @ RELU_W.T + RELU_C) @ double([2, -1, 3]) + 0.25


def test_a_linear_function_is_explained_by_its_weights():
    w, x, x0 = double([2, -3, 0.5]), double([[1, 2, -4]]), double([[0.5, -1, 2]])
    net = Function(lambda x: x @ w + 0.25).eval()
    assert attribute.saliency(net, x, 0).values.tolist() == [w.tolist()]
    assert attribute.saliency(net, x, 0).facts["intercept"].tolist() == [0.25]
    assert attribute.gradient_x_input(net, x, 0).values.tolist() == [[2, -6, -2]]
    found = attribute.integrated_gradients(net, x, 0, baseline=x0, steps=1, max_steps=1)
    torch.testing.assert_close(found.values, double([[1, -9, -3]]), atol=1e-12, rtol=0)
    assert found.residual < 1e-12


def test_integrated_gradients_of_a_network_with_rectifiers():
    # Between the kinks at 0, 2/7, 1/2 and 1 the gradient is constant: each part with one step is exact.
    net, x = Function(relu_net).eval(), double([[2, 1]])
    wanted = double([[-3.2857142857142856, -3.2142857142857144]])
    exact = torch.zeros_like(x)
    for low, high in pairwise([0, 2 / 7, 1 / 2, 1]):
        exact += attribute.integrated_gradients(net, high * x, 0, baseline=low * x, steps=1, max_steps=1).values
    torch.testing.assert_close(exact, wanted, atol=1e-10, rtol=0)
    found = attribute.integrated_gradients(net, x, 0, steps=32, tolerance=1e-3, max_steps=4096)
    torch.testing.assert_close(found.values, wanted, atol=1e-2, rtol=0)
    assert found.residual[0] <= 1e-3 and found.facts["steps"][0] > 32
    assert attribute.saliency(net, x, 0).values.tolist() == [[-1, -5]]
    assert attribute.guided_backprop(net, x, 0).values.tolist() == [[2, -4]]
    assert attribute.deconvnet(net, x, 0).values.tolist() == [[-1, -1]]


def test_integrated_gradients_of_a_product_and_the_papers_sum():
    net, x = Function(lambda x: x[:, 0] * x[:, 1]).eval(), double([[3, 4]])
    found = attribute.integrated_gradients(net, x, 0, steps=2, max_steps=2)
    torch.testing.assert_close(found.values, double([[6, 6]]), atol=1e-12, rtol=0)
    paper = attribute.integrated_gradients(net, x, 0, steps=50, max_steps=50, rule="right")
    torch.testing.assert_close(paper.values, double([[6.12, 6.12]]), atol=1e-12, rtol=0)
    assert paper.residual[0] == pytest.approx(0.24 / 12, abs=1e-12)


def test_saturation_is_seen_by_integrated_gradients_alone():
    net, x = Function(lambda x: 1 - F.relu(1 - x[:, 0])).eval(), double([[2]])
    assert attribute.saliency(net, x, 0).values == 0
    assert attribute.guided_backprop(net, x, 0).values == 0
    assert attribute.deconvnet(net, x, 0).values == 0
    found = attribute.integrated_gradients(net, x, 0, steps=512, max_steps=512)
    assert float(found.values) == pytest.approx(1, abs=2e-3)


def test_equal_functions_have_equal_integrated_gradients():
    x = double([[3, 1]])
    found = [
        attribute.integrated_gradients(Function(f).eval(), x, 0, steps=1024, max_steps=1024).values
        for f in (
            lambda x: F.relu(F.relu(x[:, 0]) - 1 - F.relu(x[:, 1])),
            lambda x: F.relu(F.relu(x[:, 0] - 1) - F.relu(x[:, 1])),
        )
    ]
    torch.testing.assert_close(found[0], double([[1.5, -0.5]]), atol=2e-3, rtol=0)
    torch.testing.assert_close(found[1], double([[1.5, -0.5]]), atol=2e-3, rtol=0)


def test_an_image_that_misses_its_law_is_marked_and_one_at_the_baseline_has_no_error():
    net = Function(lambda x: F.relu(x.sum(1) - 0.7)).eval()
    x = double([[1, 0], [0, 0], [0.35, 0.35]])
    found = attribute.integrated_gradients(net, x, 0, steps=2, tolerance=1e-9, max_steps=8)
    assert found.facts["steps"].tolist() == [8, 2, 2]
    assert found.residual[0] > 1e-9 and found.residual[1].isnan() and found.residual[2].isnan()


class Convolutional(nn.Module):
    def __init__(self, pooling="mean", bias=True):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=bias), nn.ReLU(inplace=True), nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1, bias=bias), nn.ReLU(),
        )  # fmt: skip
        self.head, self.pooling = nn.Linear(8, 5, bias=bias), pooling

    def forward(self, x):
        x = self.features(x)
        return self.head(x.mean((2, 3)) if self.pooling == "mean" else x.sum((2, 3)))


class Transformer(nn.Module):
    """Two blocks over 4 x 4 patches, with or without a class token; `read` is what the head sees of the tokens."""

    def __init__(self, class_token=True, fused=True, read=None):
        super().__init__()
        self.read = read or ((lambda x: x[:, 0]) if class_token else (lambda x: x.mean(1)))
        self.patches = nn.Conv2d(3, 12, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 12)) if class_token else None
        self.places = nn.Parameter(torch.randn(1, 16 + class_token, 12))
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.read(self.norm(x)))


class Block(nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.norm, self.qkv, self.out, self.fused = nn.LayerNorm(12), nn.Linear(12, 36), nn.Linear(12, 12), fused
        self.weights = None

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            self.weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
            y = self.weights @ v
        return x + self.out(y.transpose(1, 2).flatten(2))


def convolutional(**options):
    torch.manual_seed(0)
    return Convolutional(**options).double().eval()


def transformer(**options):
    torch.manual_seed(0)
    return Transformer(**options).double().eval()


def images(count=3, seed=0):
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_cam_is_grad_cam_times_the_positions_it_is_a_mean_of(pooling):
    net, x = convolutional(pooling=pooling), images()
    cam, grad = attribute.cam(net, x), attribute.grad_cam(net, x)
    factor = 64 if pooling == "mean" else 1
    torch.testing.assert_close(cam.map, grad.map * factor, atol=1e-12, rtol=1e-12)
    assert cam.residual.max() < 1e-14
    logits = net(x).detach()
    best = logits.argmax(1)
    pooled = cam.map.mean((1, 2)) if pooling == "mean" else cam.map.sum((1, 2))
    torch.testing.assert_close(pooled + net.head.bias[best], logits.amax(1), atol=1e-12, rtol=0)


def test_hires_cam_is_complete_on_a_linear_end_and_has_no_law_elsewhere():
    net, x = convolutional(), images()
    found = attribute.hires_cam(net, x, 2)
    assert found.residual.max() < 1e-14
    torch.testing.assert_close(found.map.sum((1, 2)) + net.head.bias[2], net(x)[:, 2], atol=1e-12, rtol=0)
    assert attribute.hires_cam(net, x, 2, layer="features.0").residual.isnan().all()
    assert attribute.hires_cam(net, x, 2, relu=True).residual.isnan().all()


def test_a_network_without_biases_is_the_sum_of_gradient_times_input():
    x = images()
    assert attribute.gradient_x_input(convolutional(bias=False), x).residual.max() < 1e-13
    assert attribute.gradient_x_input(convolutional(), x).residual.isnan().all()


def test_grad_cam_of_a_transformer_reads_the_last_positions_that_matter():
    net, x = transformer(), images()
    found = attribute.grad_cam(net, x, 1)
    assert found.map.shape == (3, 4, 4) and bool(found.map.any())
    kept = []
    hook = net.blocks[1].norm.register_forward_hook(lambda m, i, o: kept.append(o.requires_grad_()) or o)
    score = net(x)[:, 1].sum()
    hook.remove()
    (slope,) = torch.autograd.grad(score, kept[0])
    tokens, slope = kept[0].detach()[:, 1:], slope[:, 1:]
    wanted = (tokens * slope.mean(1, keepdim=True)).sum(2).unflatten(1, (4, 4))
    torch.testing.assert_close(found.map, wanted, atol=1e-12, rtol=1e-12)
    with pytest.raises(MicrotomeError, match=r"no layer 'blocks\.9'"):
        attribute.grad_cam(net, x, 1, layer="blocks.9")


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("method", ["rollout", "attention_relevance"])
def test_attention_is_followed_the_same_way_whether_fused_or_not(method, class_token):
    x = images()
    fused = getattr(attribute, method)(transformer(class_token=class_token), x, 1)
    plain = transformer(class_token=class_token, fused=False)
    torch.testing.assert_close(getattr(attribute, method)(plain, x, 1).map, fused.map, atol=1e-12, rtol=1e-10)
    score = plain(x)[:, 1].sum()
    weights = [block.weights for block in plain.blocks]
    slopes = torch.autograd.grad(score, weights)
    flow = torch.eye(16 + class_token, dtype=torch.float64)
    for a, g in zip(weights, slopes, strict=True):
        step = (a.mean(1) + torch.eye(a.shape[-1])) / 2 if method == "rollout" else None
        flow = step @ flow if step is not None else flow + (a * g).clamp(min=0).mean(1) @ flow
    row = flow[:, 0, 1:] if class_token else flow.mean(1)
    torch.testing.assert_close(fused.map, row.detach().unflatten(1, (4, 4)), atol=1e-12, rtol=1e-10)
    if method == "rollout":
        assert fused.residual.max() < 1e-14


def test_occlusion_is_the_mean_drop_over_the_windows_that_cover_a_pixel():
    net, x = convolutional(), images(2)
    found = attribute.occlusion(net, x, 3, window=6, stride=4, baseline=0.5)
    drop, count = torch.zeros(2, 16, 16).double(), torch.zeros(16, 16)
    for top in (0, 4, 8, 10):
        for left in (0, 4, 8, 10):
            covered = x.clone()
            covered[:, :, top : top + 6, left : left + 6] = 0.5
            drop[:, top : top + 6, left : left + 6] += (net(x) - net(covered))[:, 3, None, None].detach()
            count[top : top + 6, left : left + 6] += 1
    torch.testing.assert_close(found.map, drop / count, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(
    ("side", "window", "stride", "wanted"), [(16, 6, 4, [0, 4, 8, 10]), (8, 8, 8, [0]), (7, 3, 3, [0, 3, 4])]
)
def test_the_last_window_ends_with_the_image(side, window, stride, wanted):
    assert starts(side, window, stride) == wanted


def test_noise_is_a_mean_and_a_variance_over_draws_of_each_images_seed():
    net, x = convolutional(), images(2)
    mean, variance = (
        getattr(attribute, name)(net, x, 1, draws=7, noise=0.2, seeds=[11, 12]) for name in ("smooth_grad", "var_grad")
    )
    import numpy as np

    drawn = []
    for draw in range(7):
        noise = [
            np.random.default_rng([seed, draw]).standard_normal((3, 16, 16), dtype=np.float32) for seed in (11, 12)
        ]
        width = (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))[:, None, None, None]
        points = (x + 0.2 * width * torch.from_numpy(np.stack(noise)).double()).requires_grad_()
        drawn.append(torch.autograd.grad(net(points)[:, 1].sum(), points)[0])
    stacked = torch.stack(drawn)
    torch.testing.assert_close(mean.values, stacked.mean(0), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(variance.values, stacked.var(0), atol=1e-12, rtol=1e-10)
    alone = attribute.smooth_grad(net, x[1:], 1, draws=7, noise=0.2, seeds=[12])
    torch.testing.assert_close(alone.values, mean.values[1:], atol=1e-13, rtol=1e-12)


def test_guided_grad_cam_is_the_product():
    net, x = convolutional(), images()
    wide = F.interpolate(attribute.grad_cam(net, x, relu=True).map[:, None], (16, 16), mode="bilinear")
    wanted = attribute.guided_backprop(net, x).values * wide
    torch.testing.assert_close(attribute.guided_grad_cam(net, x).values, wanted, atol=1e-14, rtol=1e-12)


OF_TRANSFORMERS = ("rollout", "attention_relevance")
CELLS = {"segments": {"kind": "grid", "cells": [2, 2]}, "samples": 16}
QUICK = {
    "integrated_gradients": {"steps": 4, "max_steps": 4},
    "smooth_grad": {"draws": 3},
    "var_grad": {"draws": 3},
    **dict.fromkeys(["lime", "kernel_shap", "rise"], CELLS),
}


def explained(method, net, x, batch, seeds, **options):
    options = QUICK.get(method, {}) | options
    background = images(2, 9).to(x.dtype)
    options |= {"background": background} if issubclass(OPTIONS[method], OfSplit) else {}
    return attribute.explain(method, net, x, "predicted", batch=batch, seeds=seeds, **options)


def linear():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.LazyLinear(3)).double().eval()


@pytest.mark.parametrize("method", METHODS)
def test_batches_and_neighbours_change_nothing(method):
    net = transformer() if method in OF_TRANSFORMERS else linear() if method == "linear_shap" else convolutional()
    x, seeds, some = images(64), list(range(64)), (0, 13, 63)
    whole = explained(method, net, x, 64, seeds).map
    largest = whole.abs().max()
    alone = torch.cat([explained(method, net, x[i : i + 1], 1, [i]).map for i in some])
    assert (alone - whole[some, :]).abs().max() <= 1e-12 * largest
    turned = explained(method, net, x.flip(0), 64, seeds[::-1]).map.flip(0)
    assert torch.equal(turned, whole)
    net, x = net.float(), x.float()
    whole = explained(method, net, x, 64, seeds).map
    alone = torch.cat([explained(method, net, x[i : i + 1], 1, [i]).map for i in some])
    assert (alone - whole[some, :]).abs().max() <= 1e-5 * whole.abs().max()
    assert all(not module._forward_hooks for module in net.modules())


REFUSED = [
    (
        "guided_backprop",
        lambda: transformer(),
        "guided backpropagation: operation 'layer_norm' in module 'blocks.0.norm'",
    ),
    ("deconvnet", lambda: transformer(), "deconvnet: operation 'layer_norm'"),
    ("cam", lambda: transformer(), "global mean or sum pooling and one linear map do not end the network after it"),
    ("rollout", lambda: convolutional(), "computes no attention that can be read"),
    ("attention_relevance", lambda: convolutional(), "computes no attention that can be read"),
    ("nothing", lambda: convolutional(), "no method 'nothing'"),
]


@pytest.mark.parametrize(
    ("method", "net", "message"), REFUSED, ids=[each[0] + str(at) for at, each in enumerate(REFUSED)]
)
def test_a_network_for_which_a_method_means_nothing_is_refused(method, net, message):
    with pytest.raises(MicrotomeError) as error:
        attribute.explain(method, net(), images())
    assert message in str(error.value)


class Windows(Transformer):
    """Attention within each half of the tokens."""

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        x = x.reshape(-1, 8, 12)
        for block in self.blocks:
            x = block(x)
        return self.head(x.reshape(-1, 16, 12).mean(1))


def test_attention_in_windows_is_refused_by_module():
    torch.manual_seed(0)
    net = Windows(class_token=False).double().eval()
    with pytest.raises(MicrotomeError, match=r"in module 'blocks\.0' is in windows"):
        attribute.rollout(net, images())


class Attends(Transformer):
    """One more step over the tokens before the head."""

    def __init__(self, step):
        super().__init__(class_token=False)
        self.step = step

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.step(x).mean(1))


def windows(x):
    x = x.unflatten(1, (1, 2, 8))
    return ((x @ x.mT).softmax(-1) @ x).flatten(1, 3)


ATTENTION = {
    "fewer keys": (lambda x: (x @ x[:, ::4].mT).softmax(-1) @ x[:, ::4], "is between different tokens"),
    "fewer keys by heads": (
        lambda x: ((x[:, None] @ x[:, None, ::4].mT).softmax(-1) @ x[:, None, ::4])[:, 0],
        "is between different tokens",
    ),
    "fused": (lambda x: F.scaled_dot_product_attention(x, x[:, ::4], x[:, ::4]), "is between different tokens"),
    "of a class": (lambda x: torch.bmm((x[:, :1] @ x.mT).softmax(-1), x), "is between different tokens"),
    "masked": (lambda x: ((x @ x[:, :8].mT).softmax(-1) * x.new_ones(8)) @ x[:, :8], "is between different"),
    "by einsum": (
        lambda x: torch.einsum("iqk,iku->iqu", (x @ x[:, :8].mT).softmax(-1), x[:, :8]),
        "is between different tokens",
    ),
    "slots": (lambda x: normalised((x[:, :4] @ x.mT).softmax(1)) @ x, "runs over the queries, not over the keys"),
    "queries": (lambda x: (x @ x.mT).softmax(1) @ x, "runs over the queries, not over the keys"),
    "windows in five axes": (windows, "is in windows"),
    "no dim": (
        lambda x: F.softmax(x @ x.mT) @ x,
        "depends on the other inputs of its batch",  # over axis 0, the images: without `dim`, as torch chooses
    ),
}


def normalised(weights):
    weights = weights + 1e-8
    return weights / weights.sum(-1, keepdim=True)


@pytest.mark.filterwarnings("ignore:Implicit dimension choice")
@pytest.mark.parametrize("case", ATTENTION)
def test_attention_that_cannot_be_followed_is_refused(case):
    step, message = ATTENTION[case]
    torch.manual_seed(0)
    with pytest.raises(MicrotomeError) as error:
        attribute.rollout(Attends(step).double().eval(), images())
    assert message in str(error.value)


GATES = {
    "of channels": lambda x: x * x.softmax(2),
    "of branches": lambda x: (torch.stack([x, -x], 1) * torch.stack([x, 2 * x], 1).softmax(1)).sum(1),
    "of positions": lambda x: x + (x * x.mean(2, keepdim=True).softmax(1)),
    "classes": lambda x: x.mean(1).softmax(1)[:, None],
}


@pytest.mark.parametrize("case", GATES)
def test_a_softmax_that_is_a_gate_is_left_alone(case):
    torch.manual_seed(0)
    net, x = Attends(GATES[case]).double().eval(), images()
    found = attribute.rollout(net, x).map
    net.step = nn.Identity()
    assert torch.equal(attribute.rollout(net, x).map, found)


def test_words_of_a_text_are_explained_through_their_embeddings():
    """A tiny language model: the output's words in rows, the input's tokens in columns, complete by row."""
    torch.manual_seed(0)
    embed = nn.Embedding(20, 12)
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Flatten(), nn.Linear(12 * 6, 4 * 20)).double().eval()
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    x = embed.double()(tokens).detach()
    matrix = []
    for word in range(4):

        def log_probability(output, word=word):
            return output.unflatten(1, (4, 20))[:, word].log_softmax(1)[:, 7]

        found = attribute.integrated_gradients(net, x, attribute.Scalar(log_probability), steps=64, max_steps=64)
        assert found.map is None and found.residual[0] < 1e-6
        row = found.values.sum(2)
        torch.testing.assert_close(
            row.sum(1), log_probability(net(x)) - log_probability(net(0 * x)), atol=1e-6, rtol=1e-6
        )
        matrix.append(row)
    assert torch.cat(matrix).shape == (4, 6)


def test_a_unit_and_a_distance_of_embeddings_are_explained():
    net, x = convolutional(), images()
    unit = attribute.saliency(net, x, attribute.Unit("features.3", (2, 4, 4)))
    assert unit.values.shape == x.shape and bool((unit.values[:, :, :4] == 0).all())
    other = net(images(1, seed=5)).detach()
    distance = attribute.integrated_gradients(net, x, attribute.Scalar(lambda y: (y - other).norm(dim=1)), steps=64)
    wanted = (net(x) - other).norm(dim=1) - (net(0 * x) - other).norm(dim=1)
    torch.testing.assert_close(distance.values.flatten(1).sum(1), wanted.detach(), atol=2e-2, rtol=2e-2)


def test_a_network_without_logits_has_class_maps_of_any_scalar():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1)).double().eval()  # a segmenter
    x = images()
    target = attribute.Scalar(lambda y: y[:, 1, 4:8, 4:8].sum((1, 2)))
    found = attribute.hires_cam(net, x, target, layer="1").map
    activation = net[:2](x).detach()
    wanted = torch.zeros(len(x), *x.shape[2:], dtype=x.dtype)
    wanted[:, 4:8, 4:8] = (activation * net[2].weight[1]).sum(1)[:, 4:8, 4:8].detach()
    torch.testing.assert_close(found, wanted)
    with pytest.raises(MicrotomeError, match="name a `layer`: the default is found from logits, and this target is"):
        attribute.grad_cam(net, x, target)


def test_what_is_refused_says_what_to_do():
    net, x = convolutional(), images()
    with pytest.raises(MicrotomeError, match="target 'dog'"):
        attribute.saliency(net, x, "dog")
    with pytest.raises(MicrotomeError, match=r"a baseline of \(3, 8, 8\) for inputs of \(3, 3, 16, 16\)"):
        attribute.integrated_gradients(net, x, 0, baseline=torch.zeros(3, 8, 8))
    with pytest.raises(Exception, match="max_steps: 8 is below `steps`, 16"):
        attribute.integrated_gradients(net, x, 0, steps=16, max_steps=8)
    with pytest.raises(Exception, match="pixels would be left out"):
        attribute.occlusion(net, x, 0, window=2, stride=4)
    with pytest.raises(MicrotomeError, match="deep_shap: 'references' is of the configuration: give the references as"):
        attribute.deep_shap(net, x, 0, references=3)
    with pytest.raises(MicrotomeError, match=r"give a `background` of inputs like .*, not None"):
        attribute.deep_shap(net, x, 0)
    with pytest.raises(MicrotomeError, match="linear_shap: the logits are not linear in the input"):
        attribute.linear_shap(net, x, 0, background=x)
    with pytest.raises(UnsupportedError):
        attribute.guided_backprop(nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double().eval(), x)


def test_every_method_has_options_a_title_and_a_page_of_its_own_name():
    from pipeline.stages.attribute.methods.registry import FUNCTIONS

    assert list(METHODS) == list(FUNCTIONS) and set(METHODS) == set(OPTIONS)
    assert all(getattr(attribute, name).__doc__ for name in METHODS)
    assert len({each.title for each in METHODS.values()}) == len(METHODS)
    assert math.isclose(METHODS["integrated_gradients"].forwards(OPTIONS["integrated_gradients"](), (8, 8)), 3 * 32 + 2)


READ = {
    "patches beside a class token": (True, lambda x: x[:, 1:].mean(1), list(range(1, 17))),
    "all tokens": (True, lambda x: x.mean(1), list(range(17))),
    "two tokens": (True, lambda x: (x[:, 0] + x[:, 1]) / 2, [0, 1]),
    "patches": (False, lambda x: x.mean(1), list(range(16))),
}


@pytest.mark.parametrize("case", READ)
def test_attention_is_that_of_the_tokens_that_the_logits_are_read_from(case):
    class_token, read, rows = READ[case]
    net, x = transformer(class_token=class_token, fused=False, read=read), images()
    found = attribute.rollout(net, x, 1)
    net(x)
    flow = torch.eye(16 + class_token, dtype=torch.float64)
    for block in net.blocks:
        flow = (block.weights.mean(1) + torch.eye(16 + class_token)) / 2 @ flow
    row = flow[:, rows].mean(1)[:, class_token:].detach()
    torch.testing.assert_close(found.map, row.unflatten(1, (4, 4)), atol=1e-12, rtol=1e-10)


def test_a_layer_whose_positions_do_not_matter_is_refused():
    with pytest.raises(MicrotomeError, match=r"layer 'blocks\.1': the logits do not depend on its positions"):
        attribute.grad_cam(transformer(), images(), 1, layer="blocks.1")


def test_a_network_whose_head_begins_with_zeros_has_a_default_layer():
    net = transformer()
    nn.init.zeros_(net.head.weight)
    assert not attribute.grad_cam(net, images(), 1).map.any()  # the scores are all 0, and the layer is there


class Bypassed(Convolutional):
    def forward(self, x):
        x = self.features[:2](x)
        return self.head((F.interpolate(self.features[2:](x), x.shape[2:]) + x.repeat(1, 2, 1, 1)[:, :8]).mean((2, 3)))


def test_a_layer_that_something_goes_around_has_no_law_and_no_cam():
    torch.manual_seed(0)
    net, x = Bypassed().double().eval(), images()
    with pytest.raises(MicrotomeError, match="do not end the network after it"):
        attribute.cam(net, x, 0, layer="features.4")
    assert attribute.hires_cam(net, x, 0, layer="features.4").residual.isnan().all()
    beside = transformer(read=lambda x: x[:, 0] + x[:, 1:].mean(1))
    found = attribute.hires_cam(beside, x, 1, layer="norm")
    assert found.map.any() and found.residual.isnan().all()


def test_a_law_of_logits_is_not_claimed_of_probabilities():
    net, x = convolutional(bias=False), images()
    target = attribute.Logit(torch.tensor([0, 1, 2]), link="probability")
    assert attribute.gradient_x_input(net, x, target).residual.isnan().all()
    assert attribute.hires_cam(net, x, target).residual.isnan().all()
    assert attribute.gradient_x_input(net, x, attribute.Scalar(lambda y: y[:, 0].exp())).residual.isnan().all()


ODD = [
    (lambda net, x: attribute.rollout(net, x, attribute.Unit("blocks.0", (3, 7))), "follows attention to the logits"),
    (lambda net, x: attribute.grad_cam(net, x, attribute.Unit("blocks.0", (3, 7))), "name a `layer` before 'blocks.0'"),
    (lambda net, x: attribute.saliency(net, x, 3.7), "classes are integers"),
    (lambda net, x: attribute.saliency(net, x, True), "classes are integers"),
    (lambda net, x: attribute.saliency(net, x, 5), "class"),
    (lambda net, x: attribute.saliency(net, x.to(torch.uint8)), "finite floating-point values"),
    (lambda net, x: attribute.saliency(net, x[:0]), "at least one"),
    (lambda net, x: attribute.saliency(net, x * float("nan")), "finite floating-point values"),
    (lambda net, x: attribute.smooth_grad(net, x, 0, batch=0), "batch: 0, expected a whole number"),
]


@pytest.mark.parametrize("at", range(len(ODD)))
def test_odd_calls_are_refused(at):
    call, message = ODD[at]
    with pytest.raises(MicrotomeError, match=message):
        call(transformer(), images())


def test_doubled_steps_begin_anew():
    options = OPTIONS["integrated_gradients"](steps=4, max_steps=20)
    assert [options.taken(last) for last in (4, 8, 16, 20)] == [4, 12, 28, 48]


@pytest.mark.parametrize("end", [nn.Softmax(1), nn.LogSoftmax(1)], ids=["softmax", "log_softmax"])
def test_a_network_that_ends_in_a_softmax_gives_no_logits(end):
    plain = convolutional()
    net, x, classes = nn.Sequential(plain, end), images(), torch.tensor([0, 1, 2])
    with pytest.raises(MicrotomeError, match="so it gives no logits: give `Logit"):
        attribute.saliency(net, x)
    for link in ("probability", "log_probability"):
        target = attribute.Logit(classes, link=link, probabilities=isinstance(end, nn.Softmax))
        wanted = attribute.saliency(plain, x, attribute.Logit(classes, link=link)).values
        torch.testing.assert_close(attribute.saliency(net, x, target).values, wanted, atol=1e-12, rtol=1e-9)


def test_a_network_in_training_mode_is_refused_before_it_runs():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 196, 3)).double()
    before = net[1].running_mean.clone()
    for method in ("saliency", "grad_cam"):
        with pytest.raises(MicrotomeError, match=r"module '1' is in training mode: call `eval\(\)` first"):
            attribute.explain(method, net, images())
    assert torch.equal(net[1].running_mean, before)


@pytest.mark.parametrize("method", ["grad_cam", "rollout", "occlusion", "guided_grad_cam"])
def test_methods_of_images_refuse_other_inputs(method):
    with pytest.raises(MicrotomeError, match=r"explains images .* not inputs of \(2, 5\)"):
        attribute.explain(method, nn.Linear(5, 3).double(), torch.randn(2, 5).double())


def test_one_logit_has_a_class_activation_map():
    torch.manual_seed(0)
    net = Convolutional()
    net.head = nn.Linear(8, 1)
    found = attribute.cam(net.double().eval(), images(), 0)
    assert found.residual.max() < 1e-13


def test_unknown_options_are_refused_by_name():
    with pytest.raises(MicrotomeError, match="integrated_gradients: stepz: unknown key"):
        attribute.integrated_gradients(convolutional(), images(), 0, stepz=3)
    with pytest.raises(MicrotomeError, match="steps"):
        attribute.integrated_gradients(convolutional(), images(), 0, steps=0)


def test_the_documented_example_runs():
    page = (Path(__file__).parents[3] / "docs/attribution.md").read_text()
    block = page.partition("In Python, each method is a function:\n\n")[2].partition("\n`images` are")[0]
    scope = {"network": convolutional(), "images": images()}
    exec("\n".join(line.removeprefix("    ") for line in block.splitlines()), scope)
    assert scope["found"].map.shape == (3, 16, 16) and scope["found"].residual.max() <= 0.01
