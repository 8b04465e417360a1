"""Rules at call sites: every spelling of a rectifier is met, and what has no rule is refused by name."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.networks.gradients import Logit, gradients
from pipeline.networks.graph.call_sites import UnsupportedError
from pipeline.networks.graph.rectified import Rectified

W = torch.tensor([[1.0, -2], [3, 1], [-1, 1]], dtype=torch.float64)
C = torch.tensor([1.0, -2, 0.5], dtype=torch.float64)
V = torch.tensor([[2.0, -1, 3]], dtype=torch.float64)
X = torch.tensor([[2.0, 1]], dtype=torch.float64)
EXPECTED = {"guided_backprop": [2.0, -4.0], "deconvnet": [-1.0, -1.0]}


class Spelled(nn.Module):
    """v relu(W x + c) + 0.25, with the rectifier spelled in one of many ways."""

    def __init__(self, rectifier):
        super().__init__()
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
        self.double()
        self.rectifier = rectifier
        with torch.no_grad():
            self.first.weight.copy_(W), self.first.bias.copy_(C), self.last.weight.copy_(V)
            self.last.bias.fill_(0.25)

    def forward(self, x):
        return self.last(self.rectifier(self.first(x)))


SPELLINGS = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda x: F.relu(x, inplace=True),
    "torch": torch.relu,
    "torch in place": torch.relu_,
    "method": lambda x: x.relu(),
    "method in place": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "clamp_min": lambda x: torch.clamp_min(x, 0),
    "clip": lambda x: torch.clip(x, 0),
    "clamp in place": lambda x: x.clamp_(min=0),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "threshold module": nn.Threshold(0.0, 0.0),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(0.0, 6.0),
    "twice": nn.Sequential(nn.ReLU(), nn.ReLU()),
    "one entry at a time": lambda x: torch.stack([F.relu(x[:, i]) for i in range(3)], 1),
    "of a part in place": lambda x: (F.relu_(x[:, :2]), F.relu_(x[:, 2:]), x)[2],
    "aten": lambda x: torch.ops.aten.relu.default(x),
}


def sent_back(network, rule, x=X):
    target = Logit(torch.zeros(len(x), dtype=torch.int64))
    return gradients(network, x, target, sites=Rectified(network, rule)).inputs


@pytest.mark.parametrize("rule", EXPECTED)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_rectifier_is_met(spelling, rule):
    network = Spelled(SPELLINGS[spelling]).eval()
    assert sent_back(network, rule).tolist() == [EXPECTED[rule]]


def test_a_bounded_rectifier_sends_back_only_where_the_value_lies_inside():
    network = Spelled(nn.ReLU6()).eval()
    x = 2 * X  # the second unit is 11, above 6: of -1 * (3, 1) nothing comes back anyway; the first is 1 + 4 - 4 = 1
    assert sent_back(network, "guided_backprop", x).tolist() == [[2.0, -4.0]]
    network.last.weight.data[0, 1] = 5.0
    assert sent_back(network, "guided_backprop", x).tolist() == [[2.0, -4.0]]
    assert sent_back(network, "guided_backprop", X).tolist() == [[2.0 + 15, -4.0 + 5]]


HOSTILE = {
    "gelu": (nn.GELU(), "operation 'gelu' in module 'rectifier' has no rule"),
    "silu": (F.silu, "operation 'silu' in module 'Spelled' has no rule"),
    "hardswish": (nn.Hardswish(), "'hardswish' in module 'rectifier'"),
    "leaky": (nn.LeakyReLU(), "'leaky_relu' in module 'rectifier'"),
    "a mask by hand": (lambda x: x * (x > 0), "'mul' in module 'Spelled' depends on the input in a way that has no"),
    "where by hand": (lambda x: torch.where(x > 0, x, 0.0), "'where' in module 'Spelled' depends on the input"),
    "a detached factor": (lambda x: F.relu(x) * x.detach(), "'mul' in module 'Spelled' depends on the input"),
    "the maximum with zeros": (lambda x: torch.maximum(x, torch.zeros_like(x)), "'maximum' in module 'Spelled'"),
    "two live factors": (lambda x: F.relu(x) * x.sum(1, keepdim=True), "'mul' in module 'Spelled'"),
    "softmax": (lambda x: F.relu(x).softmax(1), "'softmax' in module 'Spelled'"),
    "a norm": (nn.LayerNorm(3, dtype=torch.float64), "'layer_norm' in module 'rectifier'"),
    "another threshold": (lambda x: F.threshold(x, 0.1, 0.0), "'threshold' in module 'Spelled'"),
    "no rectifier": (nn.Identity(), "the network calls no ReLU"),
    "a quotient": (lambda x: F.relu(x) / (1 + x.abs().sum()), "'abs' in module 'Spelled'"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_has_no_rule_is_refused_by_operation_and_module(case):
    rectifier, message = HOSTILE[case]
    with pytest.raises(UnsupportedError) as error:
        sent_back(Spelled(rectifier).eval(), "guided_backprop")
    assert message in str(error.value)


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx, g):
        return g * (ctx.saved_tensors[0] > 0)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_what_does_not_pass_through_torch_functions_is_found_in_the_graph():
    scripted = torch.jit.script(lambda_like)
    for rectifier in (Foreign.apply, scripted):
        with pytest.raises(UnsupportedError, match="outside torch's functions"):
            sent_back(Spelled(lambda x, rectifier=rectifier: F.relu(rectifier(x))).eval(), "guided_backprop")


def lambda_like(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


class Branches(nn.Module):
    """Reused rectifiers, in-place additions, joins and pooling, as real networks have them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.relu, self.pool = nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.relu(self.norm(self.a(x)))
        x = self.pool(x)
        y = self.b(x)
        y += x
        y = self.relu(y)
        y = torch.cat([y, F.avg_pool2d(x, 3, 1, 1)], 1)
        return self.head(y.mean((2, 3)))


def layer_by_layer(network, images, guided):
    """Either method with each layer's own backward, one after the other, from the first logit."""
    inputs = [images]
    for module in network:
        inputs.append(module(inputs[-1]).detach())
    back = torch.zeros_like(inputs[-1])
    back[:, 0] = 1
    for module, given in zip(reversed(network), reversed(inputs[:-1]), strict=True):
        if isinstance(module, nn.ReLU):
            back = back.clamp(min=0) * ((given > 0) if guided else 1)
        else:
            leaf = given.clone().requires_grad_()
            (back,) = torch.autograd.grad(module(leaf), leaf, back)
    return back


@pytest.mark.parametrize("guided", [True, False])
def test_it_is_what_each_layer_sends_back_on_its_own(guided):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 5 * 5, 4),
    ).double().eval()  # fmt: skip
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    wanted = layer_by_layer(network, images, guided)
    found = sent_back(network, "guided_backprop" if guided else "deconvnet", images)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=1e-14)


@pytest.mark.parametrize("rule", EXPECTED)
def test_images_do_not_depend_on_each_other_and_nothing_stays_on_the_network(rule):
    torch.manual_seed(0)
    network = Branches().eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    images = torch.randn(4, 3, 16, 16)
    together = sent_back(network, rule, images)
    turned = sent_back(network, rule, images.flip(0)).flip(0)
    assert torch.equal(together, turned)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    assert all(each.requires_grad for each in network.parameters())


def test_nothing_stays_on_the_network_after_an_error():
    network = Spelled(nn.GELU()).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(UnsupportedError):
        sent_back(network, "deconvnet")
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in network.modules())
    assert all(each.requires_grad for each in network.parameters())
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_dropout_and_batch_statistics_are_refused():
    network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    with pytest.raises(Exception, match=r"module '2' is in training mode: call `eval\(\)` first"):
        sent_back(network, "guided_backprop")

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(2, 1).double()

        def forward(self, x):
            return self.head(F.dropout(F.relu(x), 0.5))

    with pytest.raises(UnsupportedError, match="'dropout' in module 'Hidden' draws random numbers"):
        sent_back(Hidden().eval(), "guided_backprop")
    unstored = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.ReLU()).double().eval()
    with pytest.raises(UnsupportedError, match="batch_norm' in module '1' in training mode depends on the other"):
        sent_back(unstored, "guided_backprop", torch.randn(4, 2, dtype=torch.float64))


def test_max_pooling_sends_back_through_its_switches():
    pooled = nn.Sequential(nn.ReLU(), nn.MaxPool1d(4), nn.Flatten()).eval()
    x = torch.tensor([[[1.0, 5, 2, 3]]])
    assert sent_back(pooled, "guided_backprop", x).tolist() == [[[0.0, 1, 0, 0]]]
    assert math.isclose(float(pooled(x)), 5)
