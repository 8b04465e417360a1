"""Rules at call sites: every spelling of a rectifier is met, and what has no rule is refused by name."""

import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.networks.gradients import Logit, gradients
from pipeline.networks.graph.call_sites import Call, UnsupportedError
from pipeline.networks.graph.rectified import Rectified, ceiling_of

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
    "in place by name": lambda x: F.relu_(input=x),
    "in place by place": lambda x: (F.relu(x, True), x)[1],
    "a bounded one in place by place": lambda x: (F.hardtanh(x, 0.0, 9.0, True), x)[1],
    "a threshold in place": lambda x: (F.threshold(x, 0, 0, inplace=True), x)[1],
    "between shapes in place": lambda x: F.relu(x.unsqueeze_(1).squeeze_(1).unsqueeze_(2).transpose_(1, 2)).squeeze_(1),
    "transposed in place": lambda x: F.relu(x.t_()).t_().swapaxes_(0, 1).swapdims_(0, 1),
    "transposed": lambda x: F.relu(x.mT).T.T.mT,
    "branches on shapes": lambda x: F.relu(
        x if x.shape[0] > 0 and x.size(1) == 3 and len(x) and x.ndim == 2 else 2 * x
    ),
    "rows": lambda x: torch.stack([F.relu(row) for row in x]),
    "a constant mask": lambda x: F.relu(x) * (torch.arange(3) < 3),
    "into a buffer": lambda x: into(x.new_zeros(x.shape), x),
    "into a part of a buffer": lambda x: into(torch.zeros(1, 5, dtype=x.dtype)[:, 1:4], x),
    "an unused mask": lambda x: (x > 0, F.relu(x))[1],
    "unused views without gradients": lambda x: (torch.no_grad()(x.view)(-1), x.detach(), x.data, F.relu(x))[-1],
    "a quotient by name": lambda x: torch.div(F.relu(x), other=torch.tensor(2.0)) * 2,
    "interpolated": lambda x: torch.lerp(F.relu(x), torch.zeros_like(x), 0.5) * 2,
    "joined": lambda x: torch.lerp(F.relu(x), x - x, torch.tensor(0.5, dtype=x.dtype)) * 2,
    "torch.batch_norm": lambda x: torch.batch_norm(
        F.relu(x), None, None, x.new_zeros(3), x.new_ones(3), False, 0.1, 0.0, False
    ),
    "in place by names": lambda x: (F.relu(input=x, inplace=True), x)[1],
    "like the input": lambda x: F.relu(x) + torch.zeros(1, 1).to(x).expand_as(x).type_as(x).view_as(x),
    "an unused mask of its type": lambda x: ((x > 0).to(x), F.relu(x))[1],
    "an unused detached shape": lambda x: (x.detach().unsqueeze_(0).squeeze_(0), F.relu(x))[1],
    "filled": lambda x: F.relu(x) + torch.full_like(x, 0.0),
}


def into(buffer, x):
    buffer[:] = F.relu(x)
    return buffer


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
    "a mask written": (lambda x: masked(F.relu(x), x < 1), "'setitem' in module 'Spelled' depends on the input"),
    "a rectifier written": (lambda x: masked(x, x < 0), "'setitem' in module 'Spelled' depends on the input in a way"),
    "a value written": (lambda x: written(F.relu(x), x.detach()), "'setitem' in module 'Spelled' depends on the input"),
    "a mask in a buffer": (lambda x: F.relu(x) * written(torch.zeros_like(x), x > 0), "'mul' in module 'Spelled'"),
    "a mask in a view": (lambda x: F.relu(x) * copied(torch.zeros_like(x), x > 0), "'mul' in module 'Spelled'"),
    "a mask in a base": (lambda x: F.relu(x) * viewed(torch.zeros_like(x), x > 0), "'mul' in module 'Spelled'"),
    "a mask in a part": (lambda x: F.relu(x) + halved(torch.zeros_like(x), x), "'add' in module 'Spelled' depends on"),
    "a mask by out": (lambda x: F.relu(x) * torch.gt(x, 0, out=torch.zeros(1, 3).bool()), "'mul' in module 'Spelled'"),
    "a mask multiplied in": (lambda x: torch.ones_like(x).mul_(x > 0).mul_(x), "'mul' in module 'Spelled' depends on"),
    "a mask filled in": (lambda x: F.relu(x) * torch.full_like(x, x.detach().sum()), "'full_like' in module"),
    "an index": (lambda x: F.relu(x)[:, x.argmax(1)], "'getitem' in module 'Spelled' depends on the input"),
    "the end of a slice": (lambda x: F.relu(x)[:, : (x > -9).sum()], "'getitem' in module 'Spelled' depends on"),
    "no gradient": (lambda x: F.relu(x) * without(x.mean), "'mul' in module 'Spelled' depends on the input"),
    "a rectifier without one": (lambda x: x * without(lambda: F.relu(x)), "'mul' in module 'Spelled' depends on"),
    "a rectifier in place without one": (
        lambda x: (F.relu(x), without(x.relu_))[0],
        "'relu' in module 'Spelled' writes",
    ),
    "a copy without one": (lambda x: F.relu(x) * without(lambda: torch.zeros_like(x).copy_(x)), "'mul' in module"),
    "whole numbers": (lambda x: F.relu(x) * x.to(torch.int32), "'mul' in module 'Spelled' depends on the input"),
    "the data": (lambda x: F.relu(x) * x.data, "'mul' in module 'Spelled' depends on the input"),
    "data written": (
        lambda x: (F.relu(x), x.data.clamp_(min=0))[0],
        "'clamp' in module 'Spelled' writes",
    ),
    "data written by a function": (lambda x: (F.relu(x), F.relu(x.data, True))[0], "'relu' in module 'Spelled' writes"),
    "data set": (lambda x: setattr(x, "data", x.data * 2) or F.relu(x), "'set_data' in module 'Spelled' writes into"),
    "a part of data written": (
        lambda x: (x.detach()[:, :1].zero_(), F.relu(x))[1],
        "'zero' in module 'Spelled' writes",
    ),
    "detached in place": (lambda x: F.relu(x) * (x + 0).detach_(), "'mul' in module 'Spelled' depends on the input"),
    "a mask transposed": (lambda x: F.relu(x) * (x.mT > 0).mT, "'mul' in module 'Spelled' depends on the input"),
    "a mask of its type": (lambda x: F.relu(x) * (x > 0).type_as(x), "'mul' in module 'Spelled' depends on the input"),
    "a mask by rows": (lambda x: F.relu(x) * torch.stack([*(x > 0)]), "'mul' in module 'Spelled' depends"),
    "a number": (lambda x: F.relu(x) * x.mean().item(), "'item' in module 'Spelled' gives numbers of the input"),
    "a cut number": (lambda x: F.relu(x) * (x > 0).sum().item(), "'item' in module 'Spelled' gives numbers of the"),
    "a list": (lambda x: F.relu(x) * x.sum().detach().tolist(), "'tolist' in module 'Spelled' gives numbers"),
    "an array": (lambda x: F.relu(x) * torch.from_numpy(x.detach().numpy()), "'numpy' in module 'Spelled' gives"),
    "a Python float": (lambda x: F.relu(x) * float(x.sum()), "'float' in module 'Spelled' gives numbers"),
    "a Python int": (lambda x: F.relu(x) * int(x.detach().sum()), "'int' in module 'Spelled' gives numbers"),
    "a branch": (lambda x: F.relu(x) if x.sum() > 0 else x, "'bool' in module 'Spelled' gives numbers of the input"),
    "a range": (lambda x: F.relu(x) * len(range((x > 0).sum())), "'index' in module 'Spelled' gives numbers"),
    "a comparison": (lambda x: F.relu(x) if torch.equal(x, x) else x, "'equal' in module 'Spelled' gives numbers"),
    "a tensor of it": (lambda x: F.relu(x) * torch.tensor([1.0, 2, 3]).new_tensor(x.detach()), "'mul' in module"),
    "a live weight": (lambda x: torch.lerp(F.relu(x), x, x), "'lerp' in module 'Spelled' has no rule"),
    "a live weight by name": (lambda x: torch.lerp(C, C, weight=F.relu(x)), "'lerp' in module 'Spelled' has no rule"),
    "a live divisor": (lambda x: torch.div(C, F.relu(x) + 1), "'div' in module 'Spelled' has no rule"),
    "a live divisor by name": (lambda x: torch.div(C, other=F.relu(x) + 1), "'div' in module 'Spelled' has no rule"),
    "a staircase": (lambda x: torch.div(F.relu(x), 2.0, rounding_mode="floor"), "'div' in module 'Spelled' has no"),
    "another staircase": (lambda x: F.relu(x).div(2.0, rounding_mode="trunc"), "'div' in module 'Spelled' has no rule"),
    "batch statistics": (
        lambda x: torch.batch_norm(F.relu(x), None, None, None, None, True, 0.1, 1e-5, False),
        "'batch_norm' in module 'Spelled' in training mode depends on the other images",
    ),
    "no form out of place": (
        lambda x: F.relu(x).zero_(),
        "'zero' in module 'Spelled' writes into its input, and",
    ),
}


def masked(x, mask):
    x[mask] = 0
    return x


def written(b, values):
    b[:] = values
    return b


def copied(b, values):
    b[:, :].copy_(values)
    return b


def viewed(b, values):
    view = b[:]
    b.copy_(values)
    return view


def halved(b, x):
    b[:] = x > 0
    b[:, :1] = x[:, :1]
    return b


def without(function):
    with torch.no_grad():
        return function()


@pytest.mark.filterwarnings("ignore:Converting a tensor", "ignore:To copy construct")
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


def scripted_relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def scripted_square(x: torch.Tensor) -> torch.Tensor:
    return x * x


def scripted_mask(x: torch.Tensor) -> torch.Tensor:
    return x * (x > 0)


def scripted_product(x: torch.Tensor) -> torch.Tensor:
    return torch.mm(x.t(), x)[:1]


def scripted_quotient(x: torch.Tensor) -> torch.Tensor:
    return 1.0 / torch.div(torch.ones_like(x), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(
    "function",
    [Foreign.apply, scripted_relu, scripted_square, scripted_mask, scripted_product, scripted_quotient],
    ids=["Foreign", "relu", "square", "mask", "product", "quotient"],
)
def test_what_does_not_pass_through_torch_functions_is_found_in_the_graph(function):
    if isinstance(function, types.FunctionType):
        function = torch.jit.script(function)
    for _ in range(3):  # torch rewrites a scripted function after its first calls
        with pytest.raises(UnsupportedError, match="outside torch's functions"):
            sent_back(Spelled(lambda x: F.relu(function(x))).eval(), "guided_backprop")


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


LINEAR_LAYERS = {
    "adaptive maximum": (nn.AdaptiveMaxPool3d(2), 3),
    "maximum": (nn.MaxPool3d(2), 3),
    "adaptive mean": (nn.AdaptiveAvgPool3d(3), 3),
    "mean": (nn.AvgPool3d(2), 3),
    "nearest": (nn.Upsample(scale_factor=2), 3),
    "exact": (nn.Upsample(scale_factor=2, mode="nearest-exact"), 3),
    "trilinear": (nn.Upsample(scale_factor=2, mode="trilinear"), 3),
    "adaptive maximum 2d": (nn.AdaptiveMaxPool2d(2), 2),
    "exact 2d": (nn.Upsample(scale_factor=2, mode="nearest-exact"), 2),
    "bilinear 2d": (nn.Upsample(scale_factor=2, mode="bilinear"), 2),
    "antialiased": (lambda x: F.interpolate(x, size=(5, 5), mode="bilinear", antialias=True), 2),
    "antialiased bicubic": (lambda x: F.interpolate(x, size=(5, 5), mode="bicubic", antialias=True), 2),
    "transposed": (nn.ConvTranspose2d(2, 2, 2), 2),
    "reflected": (nn.ReflectionPad2d(1), 2),
    "replicated": (nn.ReplicationPad2d(1), 2),
    "round": (nn.CircularPad2d(1), 2),
    "norm without weights": (nn.BatchNorm2d(2, affine=False), 2),
    "adaptive maximum 1d": (nn.AdaptiveMaxPool1d(2), 1),
    "adaptive mean 1d": (nn.AdaptiveAvgPool1d(3), 1),
    "nearest 1d": (nn.Upsample(scale_factor=2), 1),
    "exact 1d": (nn.Upsample(scale_factor=2, mode="nearest-exact"), 1),
    "linear 1d": (nn.Upsample(scale_factor=2, mode="linear"), 1),
    "reflected 1d": (nn.ReflectionPad1d(1), 1),
    "replicated 3d": (nn.ReplicationPad3d(1), 3),
    "reflected 3d": (nn.ReflectionPad3d(1), 3),
}


@pytest.mark.parametrize("case", LINEAR_LAYERS)
def test_layers_without_a_rectifier_keep_their_own_backward(case):
    layer, sides = LINEAR_LAYERS[case]
    torch.manual_seed(0)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            if isinstance(layer, nn.Module):
                self.layer = layer
            else:
                self.function = layer

        def forward(self, x):
            x = self.layer(x) if hasattr(self, "layer") else self.function(x)
            return F.relu(x).flatten(1).sum(1, keepdim=True)

    network, x = Network().double().eval(), torch.rand(2, 2, *[8] * sides, dtype=torch.float64) + 0.5
    given = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(network(given).sum(), given)  # one rectifier, to which 1 comes back: the same
    torch.testing.assert_close(sent_back(network, "guided_backprop", x), wanted, atol=1e-12, rtol=1e-12)


CEILINGS = {
    "relu": ("relu", (), math.inf),
    "relu6": ("relu6", (), 6.0),
    "clamp": ("clamp", (0, 2), 2.0),
    "clamp without a top": ("clamp", (0.0,), math.inf),
    "clamp below 0": ("clamp", (0, -1), None),
    "another clamp": ("clamp", (-1, 1), None),
    "clamp by a tensor": ("clamp", (torch.zeros(1),), None),
    "clamp to a tensor": ("clamp", (0, torch.ones(1)), None),
    "clamp_min": ("clamp_min", (0,), math.inf),
    "hardtanh": ("hardtanh", (), None),
    "hardtanh from 0": ("hardtanh", (0.0,), 1.0),
    "threshold": ("threshold", (0, 0), math.inf),
    "another threshold": ("threshold", (0, -1), None),
    "no rectifier": ("sigmoid", (), None),
}


@pytest.mark.parametrize("case", CEILINGS)
def test_rectifiers_are_known_by_their_bounds(case):
    name, bounds, top = CEILINGS[case]
    assert ceiling_of(Call(name, F.relu, (X, *bounds), {})) == top
