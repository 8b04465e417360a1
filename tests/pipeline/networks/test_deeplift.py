"""DeepLIFT at call sites: contributions add up for every spelling, and the rest is refused by name."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.networks.contributions import contributions
from pipeline.networks.gradients import Logit, Scalar, Unit, scores
from pipeline.networks.graph.call_sites import ELEMENTWISE as KNOWN
from pipeline.networks.graph.call_sites import UnsupportedError
from pipeline.networks.graph.rescale import KINKED, Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel


def double(values):
    return torch.tensor(values, dtype=torch.float64)


def explained(network, x, reference, target=None, rule="rescale", max_rule="cross"):
    target = target or Logit(torch.zeros(len(x), dtype=torch.int64))
    rules = partial(Rescale, network, max_rule=max_rule)
    if rule == "reveal_cancel":
        rules = partial(RevealCancel, network, reference=reference)
    return contributions(network, x, reference, target, rules)


def missed(network, x, reference, target=None, **options):
    """By how much contributions miss the difference of the scores, relative to the larger of both."""
    target = target or Logit(torch.zeros(len(x), dtype=torch.int64))
    found = explained(network, x, reference, target, **options).values
    score, base = scores(network, x, target).double(), scores(network, reference, target, len(x)).double()
    lacking = found.double().flatten(1).sum(1) - (score - base)
    return float((lacking.abs() / torch.maximum(score.abs(), (score - base).abs())).max())


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# Closed forms ---------------------------------------------------------------------------------------------------------

W, C, V = double([[1, -2], [3, 1], [-1, 1]]), double([1, -2, 0.5]), double([[2, -1, 3]])
RELU_NET = Function(lambda x: torch.relu(x @ W.T + C) @ V.T + 0.25)
CLOSED = {
    "linear": (lambda x: x @ double([[2, -3, 0.5]]).T + 0.25, [1, 2, -4], [0.5, -1, 2], [1, -9, -3]),
    "a product": (lambda x: x[:, :1] * x[:, 1:2] + 2 * x[:, 2:], [3, 4, 5], [1, 1, 1], [5, 6, 8]),
    "a square": (lambda x: x * x, [3], [1], [8]),
    "a quotient": (lambda x: x[:, :1] / x[:, 1:], [6, 2], [1, 1], [3.75, -1.75]),
    "a rectifier": (RELU_NET, [2, 1], [0, 0], [-23 / 7, -22.5 / 7]),
    "a minimum": (lambda x: x[:, :1] - torch.relu(x[:, :1] - x[:, 1:]), [3, 1], [0, 0], [0, 1]),
    "a saturated rectifier": (lambda x: 1 - torch.relu(1 - x), [2], [0], [1]),
    "a window": (lambda x: F.max_pool1d(x[:, None], 4)[:, 0], [1, 5, 2, 3], [4, 0, 0, 1], [0, 1, 0, 0]),
    "a window that falls": (lambda x: F.max_pool1d(x[:, None], 3)[:, 0], [1, 2, 0], [4, 0, 3], [-2, 0, 0]),
    # Equal functions, other rules: rescale is not invariant to how a function is written.
    "rectifiers": (lambda x: F.relu(F.relu(x[:, :1]) - 1 - F.relu(x[:, 1:])), [3, 1], [0, 0], [1.5, -0.5]),
    "the same rectifiers": (lambda x: F.relu(F.relu(x[:, :1] - 1) - F.relu(x[:, 1:])), [3, 1], [0, 0], [2, -1]),
    "torch's minimum": (lambda x: torch.minimum(x[:, 1:], x[:, :1]), [3, 1], [0, 0], [0, 1]),
}


@pytest.mark.parametrize("case", CLOSED)
def test_closed_forms(case):
    function, x, reference, wanted = CLOSED[case]
    found = explained(
        function if isinstance(function, nn.Module) else Function(function), double([x]), double([reference])
    )
    assert (found.values - double([wanted])).abs().max() < 1e-14


def test_reveal_cancel_of_closed_forms():
    found = explained(RELU_NET, double([[2, 1]]), double([[0, 0]]), rule="reveal_cancel").values
    assert (found - double([[-30 / 7, -15.5 / 7]])).abs().max() < 1e-14
    minimum = Function(CLOSED["a minimum"][0])
    for x in ([3, 1], [1, 3], [2, 2]):  # the Shapley values, where rescale gives all to the smaller
        found = explained(minimum, double([x]), double([[0, 0]]), rule="reveal_cancel").values
        assert (found - min(x) / 2).abs().max() < 1e-14


def shapley(function, x, reference):
    """Shapley values by enumeration of all coalitions."""
    count = x.shape[1]
    members = double(list(itertools.product((0, 1), repeat=count)))
    value = function(members * x + (1 - members) * reference)[:, 0]
    found = torch.zeros(1, count, dtype=torch.float64)
    for member, with_it in zip(members.bool(), value, strict=True):
        size = int(member.sum())
        for player in range(count):
            if member[player]:
                without = int(sum(2 ** (count - 1 - at) for at in range(count) if member[at] and at != player))
                weight = math.factorial(size - 1) * math.factorial(count - size) / math.factorial(count)
                found[0, player] += weight * (with_it - value[without])
    return found


OF_TWO = {
    "a product": lambda x: x[:, :2] @ double([[1], [2]]) * (x[:, 2:] @ double([[1], [-3]])),
    "a product of matrices": lambda x: (x[:, None, :2] @ x[:, 2:, None])[:, 0],
    "einsum": lambda x: torch.einsum("ia,ia->i", x[:, :2], x[:, 2:])[:, None],
    "a sum": lambda x: x.exp().sum(1, keepdim=True),
}


@pytest.mark.parametrize("case", OF_TWO)
def test_products_have_the_shapley_value_of_their_factors(case):
    generator = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, 4, generator=generator).double()
    function = Function(OF_TWO[case])
    assert (explained(function, x, reference).values - shapley(function, x, reference)).abs().max() < 1e-14


@pytest.mark.parametrize("spelled", ["pool", "amax", "max"])
def test_a_maximum_may_have_its_shapley_value(spelled):
    function = {
        "pool": lambda x: F.max_pool1d(x[:, None], 6)[:, 0],
        "amax": lambda x: x.reshape(len(x), 2, 3).amax((1, 2))[:, None],
        "max": lambda x: x.max(1, keepdim=True).values,
    }[spelled]
    generator = torch.Generator().manual_seed(0)
    x, reference = torch.randn(2, 1, 6, generator=generator).double()
    network = Function(function)
    found = explained(network, x, reference, max_rule="shapley").values
    assert (found - shapley(network, x, reference)).abs().max() < 1e-14
    found = (
        explained(network, double([[3, 5, 1]]), double([[0, 0, 0]]), max_rule="shapley") if spelled == "max" else None
    )
    assert found is None or (found.values - double([[4 / 3, 10 / 3, 1 / 3]])).abs().max() < 1e-14


def test_reveal_cancel_is_nearer_to_the_shapley_value():
    generator = torch.Generator().manual_seed(0)
    errors = {"rescale": [], "reveal_cancel": []}
    for seed in range(9):
        torch.manual_seed(seed)
        network = (
            nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 1)).double().eval()
        )
        x, reference = torch.randn(2, 1, 6, generator=generator).double()
        wanted = shapley(network, x, reference)
        for rule, found in errors.items():
            values = explained(network, x, reference, rule=rule).values
            found.append(float((values - wanted).abs().sum().detach() / wanted.abs().sum().detach()))
    assert sorted(errors["reveal_cancel"])[4] < sorted(errors["rescale"])[4] < 0.5


# Spellings ------------------------------------------------------------------------------------------------------------


class Spelled(nn.Module):
    """A convolution, a function of its maps (image, 6, 8, 8), a mean over positions and a linear map."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.function = function
        self.last = nn.LazyLinear(4)
        self.double().eval()

    def forward(self, x):
        x = self.function(self.first(x))
        return self.last(x.flatten(2).mean(2) if x.ndim > 2 else x)


class Twice(nn.Module):
    """One module, called twice, and in place."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(self.module(x) * 2 - 1)


def later(function):
    """Use what a function made after its input was written into."""

    def spelled(x):
        y = function(x)
        x += 1
        return y * x

    return spelled


def attention(fused):
    def spelled(x):
        q, k, v = x.flatten(2).mT.unsqueeze(1).chunk(3, -1)
        if fused:
            return F.scaled_dot_product_attention(q, k, v).flatten(1)
        return ((q @ k.mT).softmax(-1) @ v).flatten(1)

    return spelled


class Attends(nn.Module):
    def __init__(self, batch_first, **call):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(6, 2, batch_first=batch_first), call
        self.batch_first = batch_first

    def forward(self, x):
        x = x.flatten(2)
        x = x.mT if self.batch_first else x.permute(2, 0, 1)
        x = self.attention(x, x, x, **self.call)[0]
        return x.mean(1 if self.batch_first else 0)


class Squeezes(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(6, 2, 1), nn.Conv2d(2, 6, 1)

    def forward(self, x):
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


ELEMENTWISE = {
    "relu": nn.ReLU(),
    "relu in place": nn.ReLU(inplace=True),
    "relu twice": Twice(nn.ReLU()),
    "relu twice in place": Twice(nn.ReLU(inplace=True)),
    "relu of the method": lambda x: x.relu_(),
    "relu of torch": torch.relu,
    "relu by name": lambda x: F.relu(input=x, inplace=True),
    "relu of a part in place": lambda x: (F.relu_(x[:, :2]), x)[1],
    "relu of aten": lambda x: torch.ops.aten.relu.default(x),
    "relu by rows": lambda x: torch.stack([F.relu(row) for row in x]),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.1),
    "prelu": nn.PReLU(6),
    "elu": nn.ELU(),
    "selu": nn.SELU(inplace=True),
    "celu": nn.CELU(0.5),
    "gelu": nn.GELU(),
    "gelu by tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(inplace=True),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(inplace=True),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(-0.2, 0.3),
    "sigmoid": nn.Sigmoid(),
    "logsigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(),
    "softsign": nn.Softsign(),
    "clamp": lambda x: x.clamp(-0.1, 0.2),
    "clamp by a tensor": lambda x: torch.clamp(x, max=x.new_full((6, 1, 1), 0.1)),
    "threshold": lambda x: F.threshold(x, 0.1, 0.1),
    "abs": torch.abs,
    "powers": lambda x: x**2 + x.pow(3) + 2**x + torch.square(x),
    "roots": lambda x: (x.abs() + 0.1).sqrt() + (x.abs() + 0.1).rsqrt() + (x.abs() + 0.1) ** 0.5,
    "logarithms": lambda x: (x.abs() + 0.1).log() + x.abs().log1p() + x.exp() + x.expm1(),
    "sine": lambda x: x.sin() * x.cos(),
    "erf": torch.special.erf,
    "tangent": lambda x: x.clamp(-1, 1).tan(),
    "hardshrink": nn.Hardshrink(0.1),
}
WEIGHT = torch.arange(6.0, dtype=torch.float64)
COMPOSED = {
    "x * x": lambda x: x * x,
    "x * x in place": lambda x: x.mul_(x),
    "a cube": lambda x: x * x * x,
    "a product with a part": lambda x: x * x[:, :1],
    "a quotient": lambda x: x / (1 + x.abs()),
    "a quotient of a number": lambda x: 3 / (2 + x.sigmoid()) + (x.exp() + 1).reciprocal(),
    "a number over in place": lambda x: (x.exp() + 1).reciprocal_().div_(x.exp()),
    "swish by hand": lambda x: x.sigmoid().mul_(x),
    "glu": lambda x: F.glu(x, 1),
    "addcmul": lambda x: torch.addcmul(x, x, x.sigmoid(), value=0.5),
    "maximum": lambda x: torch.maximum(x, 0.3 * x.flip(1)),
    "the maximum with zeros": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.min(x, x.flip(1)),
    "a largest unit": lambda x: x.amax(1, keepdim=True) + x.min(1, keepdim=True)[0],
    "squeeze and excitation": Squeezes(),
    "softmax over channels": lambda x: x.softmax(1),
    "softmax of large values": lambda x: (x * 300).softmax(1),
    "softmin": lambda x: F.softmin(x, 1),
    "softmax in another type": lambda x: F.softmax(x, 1, dtype=torch.float32).double(),
    "log_softmax in another type": lambda x: F.log_softmax(x, 1, dtype=torch.float32).double(),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, (2, 3)),
    "logsumexp with its dimension": lambda x: x.logsumexp(1, keepdim=True),
    "layer norm": lambda x: F.layer_norm(x, (6, 8, 8)),
    "layer norm over channels": lambda x: F.layer_norm(x.movedim(1, -1), (6,), WEIGHT).movedim(-1, 1),
    "group norm": nn.GroupNorm(3, 6),
    "instance norm": nn.InstanceNorm2d(6, affine=True),
    "rms norm": lambda x: F.rms_norm(x, (8,), eps=1e-6),
    "rms norm by hand": lambda x: x * (x.pow(2).mean(1, keepdim=True) + 1e-5).rsqrt(),
    "batch norm": nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "attention": attention(False),
    "fused attention": attention(True),
    "multi-head attention": Attends(True),
    "multi-head attention of weights": Attends(False, need_weights=False),
    "a product of matrices": lambda x: x.flatten(2) @ x.flatten(2).mT,
    "bmm": lambda x: torch.bmm(x.flatten(2), x.flatten(2).mT),
    "baddbmm": lambda x: torch.baddbmm(x[:, :, :6, 0], x.flatten(2), x.flatten(2).mT, beta=0.5, alpha=0.1),
    "einsum": lambda x: torch.einsum("icyx,idyx->icd", x, x),
    "max pooling": nn.MaxPool2d(2),
    "max pooling that overlaps": nn.MaxPool2d(3, 2, 1),
    "max pooling with gaps": nn.MaxPool2d(2, 3, dilation=2, ceil_mode=True),
    "max pooling with places": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "adaptive max pooling": nn.AdaptiveMaxPool2d(2),
    "max pooling of ties": lambda x: F.max_pool2d(F.relu(x - 0.5), 3, 1),
    "max pooling of one dimension": lambda x: F.max_pool1d(x.flatten(2), 4, 3),
    "max pooling of three": lambda x: F.max_pool3d(x[:, None], 2, stride=1),
    "average pooling": lambda x: F.avg_pool2d(F.relu(x), 3, 2, 1),
    "interpolation": lambda x: F.interpolate(F.relu(x), scale_factor=1.5, mode="bilinear"),
    "pads and slices": lambda x: F.pad(F.relu(x)[:, :, 1:5].roll(1, 2), (1, 1, 0, 2)),
    "joined": lambda x: torch.cat([F.relu(x), x.new_ones(len(x), 1, 8, 8), x.tanh()], 1),
    "into a buffer": lambda x: into(x.new_zeros(x.shape), x),
    "normalised by torch": lambda x: F.normalize(x, dim=1) + x / torch.linalg.vector_norm(x, 2, (2, 3), True),
    "variance": lambda x: x.var(1, keepdim=True) + x.std((2, 3), correction=0)[..., None, None] + x.var(2, False, True),
    "normalised": lambda x: x / x.pow(2).sum(1, keepdim=True).sqrt().clamp_min(1e-12),
    "written later": later(F.silu),
    "written later by a rectifier": later(F.relu),
    "tokens with the images fastest": lambda x: F.gelu(tokens(x).reshape(-1, 6)).view(64, -1, 6).mean(0),
        "windows": lambda x: windows(x).softmax(1).reshape(len(x), -1),
}  # fmt: skip


def tokens(x):
    """Return (token, image, unit)."""
    return x.flatten(2).permute(2, 0, 1)


def windows(x):
    """Return (image * window, unit, y, x)."""
    return x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 6, 4, 4)


def into(buffer, x):
    buffer[:, 1:4] = F.relu(x[:, 1:4])
    buffer[:, 0] = x[:, 0] * x[:, 1]
    return buffer


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, generator=generator).double(), torch.randn(4, 3, 8, 8, generator=generator).double()


@pytest.mark.parametrize("case", ELEMENTWISE | COMPOSED)
def test_contributions_add_up(case, images):
    network, (x, reference) = Spelled((ELEMENTWISE | COMPOSED)[case]), images
    network(x.clone())
    assert missed(network, x, reference) < 1e-12
    assert missed(network, x, reference[:1]) < 1e-12
    shared, own = (explained(network, x, each).values for each in (reference[:1], reference[:1].expand_as(x).clone()))
    assert (shared - own).abs().max() <= 1e-12 * own.abs().max()
    alone = torch.cat([explained(network, x[i : i + 1], reference[:1]).values for i in range(4)])
    assert (alone - own).abs().max() <= 1e-12 * own.abs().max()
    assert torch.equal(explained(network, x.flip(0), reference[:1]).values.flip(0), shared)
    assert not any(module._forward_hooks for module in network.modules())


LIVE = {
    "linear": lambda x: F.linear(x.flatten(2), x.flatten(2)[0, :3], x[0, 0, 0, :3]),
    "a convolution": lambda x: F.conv2d(x, x[:, :, :3, :3].transpose(0, 1).expand(6, 6, 3, 3) ** 2),
    "a transposed one": lambda x: F.conv_transpose2d(x, x[:, :, :2, :2].transpose(0, 1)),
}


@pytest.mark.parametrize("case", LIVE)
def test_contributions_through_weights_that_depend_on_the_image_add_up(case, images):
    network, (x, reference) = Spelled(LIVE[case]), images
    network(x[:1])
    assert missed(network, x[:1], reference[:1]) < 1e-12


@pytest.mark.parametrize("case", [each for each in COMPOSED if "max" in each and "softmax" not in each])
def test_contributions_through_shapley_maxima_add_up(case, images):
    network, (x, reference) = Spelled(COMPOSED[case]), images
    network(x.clone())
    assert missed(network, x, reference[:1], max_rule="shapley") < 1e-12


def test_what_stays_at_the_reference_has_the_gradient(images):
    network, (x, _) = Spelled(nn.Sequential(nn.GELU(), nn.MaxPool2d(3, 2, 1), nn.Softmax(1))), images
    network(x)
    given = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(network(given)[:, 0].sum(), given)
    step = 1e-9 * torch.ones_like(x)
    found = explained(network, x, x - step).values / step
    assert (found - wanted).abs().max() < 1e-6 * wanted.abs().max()


TARGETS = {
    "a probability": Logit(torch.tensor([1, 0, 3, 2]), link="probability"),
    "its logarithm": Logit(torch.tensor([1, 0, 3, 2]), link="log_probability"),
    "a contrast": Logit(torch.tensor([1, 0, 3, 2]), torch.tensor([0, 1, 2, 1])),
    "a unit": Unit("first", (2, 3, 3)),
    "the maximum of a unit": Unit("function", (2,)),
    "a function": Scalar(lambda output: output.square().sum(1).sqrt()),
}


@pytest.mark.parametrize("case", TARGETS)
def test_the_rules_hold_for_what_makes_the_score(case, images):
    network, (x, reference) = Spelled(nn.GELU()), images
    network(x)
    assert missed(network, x, reference, TARGETS[case]) < 1e-12
    assert missed(network, x, reference[:1], TARGETS[case]) < 1e-12


# What is refused ------------------------------------------------------------------------------------------------------


def scripted(x: torch.Tensor) -> torch.Tensor:
    return x * x.sigmoid()


class Foreign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, sent):
        return sent


REFUSED = {
    "a mask by hand": (lambda x: x * (x > 0), "DeepLIFT: operation 'mul' in module 'Spelled' depends on the"),
    "a cumulated product": (lambda x: x.cumprod(1), "'cumprod' in module 'Spelled' has no rule"),
    "a product of all": (lambda x: x.prod(1), "'prod' in module 'Spelled' has no rule"),
    "a sort": (lambda x: x.sort(1).values, "'sort' in module 'Spelled' has no rule"),
    "the norm of all": (lambda x: x / x.norm(), "'vector_norm' in module 'Spelled' is Euclidean over dimensions"),
    "another norm": (lambda x: x / x.norm(1, 1, True), "'vector_norm' in module 'Spelled' is Euclidean"),
    "the variance of all": (lambda x: x / x.var(), "'var' in module 'Spelled' over all values takes images"),
    "the maximum of all": (lambda x: x / x.max(), "'max' in module 'Spelled' over all values takes images"),
    "a live exponent": (lambda x: x.sigmoid() ** x, "'pow' in module 'Spelled' depends on the input in two ways"),
    "a live bound": (lambda x: x.clamp(max=x.mean(1, keepdim=True)), "'clamp' in module 'Spelled' depends on the"),
    "three factors": (lambda x: torch.einsum("ic,ic,ic->i", *[x[..., 0, 0]] * 3), "'einsum' in module 'Spelled' of"),
    "dropout": (lambda x: F.dropout(x, 0.5, True), "'dropout' in module 'Spelled' draws random numbers"),
    "batch statistics": (lambda x: F.batch_norm(x, None, None, training=True), "'batch_norm' in module 'Spelled'"),
    "a staircase": (lambda x: x.div(2, rounding_mode="floor"), "'div' in module 'Spelled' has no rule"),
    "a scripted body": (scripted, "something outside torch's functions"),
    "a foreign function": (Foreign.apply, "something outside torch's functions"),
    "a branch": (lambda x: x.relu() if x.sum() > 0 else x, "'bool' in module 'Spelled' gives numbers of the input"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_rule_is_refused_by_operation_and_module(case, images):
    function, message = REFUSED[case]
    function = torch.jit.script(function) if case == "a scripted body" else function
    network, (x, reference) = Spelled(function), images
    network(x)
    with pytest.raises(UnsupportedError) as error:
        explained(network, x, reference)
    assert message in str(error.value)
    assert not any(module._forward_hooks for module in network.modules())


def test_calls_that_depend_on_the_call_are_refused(images):
    count = itertools.count()
    network, (x, reference) = Spelled(lambda x: x.relu() if next(count) % 2 else x.tanh()), images
    network(x)
    with pytest.raises(UnsupportedError, match="is not what the reference's forward calls here"):
        explained(network, x, reference)


def test_shapes_that_depend_on_the_call_are_refused(images):
    count = itertools.count()
    network, (x, reference) = Spelled(lambda x: x[:, next(count) % 2 :].relu()[:, :5]), images
    network(x), network(x)
    with pytest.raises(UnsupportedError, match="gets something of another shape than in the reference's forward"):
        explained(network, x, reference)


def test_unequal_windows_have_no_shapley_value(images):
    network, (x, reference) = Spelled(nn.AdaptiveMaxPool2d(3)), images
    network(x)
    assert missed(network, x, reference) < 1e-12
    with pytest.raises(
        UnsupportedError, match="'adaptive_max_pool2d' in module 'function' has windows of unequal size"
    ):
        explained(network, x, reference, max_rule="shapley")


def test_kinked_functions_are_functions_of_each_entry():
    assert KINKED <= KNOWN


# RevealCancel ---------------------------------------------------------------------------------------------------------

REVEALED = {
    **{name: function for name, function in ELEMENTWISE.items() if name not in ("relu of a part in place", "sine")},
    "batch norm": COMPOSED["batch norm"],
    "scaled": lambda x: -(2 * x.relu() - 3) / torch.tensor(-0.5),
    "by channel": lambda x: x.relu() * torch.arange(-3.0, 3).view(6, 1, 1),
    "sums": lambda x: x.relu() - x.tanh() + x.roll(1, 2) - 1,
    "sums in place": lambda x: (x + 0).relu_().add_(x, alpha=-2).sub_(x.tanh()),
    "rsub": lambda x: 1 - x.relu() + torch.rsub(x.tanh(), x),
    "average pooling": COMPOSED["average pooling"],
    "interpolation": COMPOSED["interpolation"],
    "pads and slices": lambda x: F.pad(F.relu(x)[:, :, 1:5].roll(1, 2), (1, 1, 0, 2), value=3.0),
    "joined": COMPOSED["joined"],
    "into a buffer": lambda x: masked(x.new_ones(x.shape), x.relu()),
    "matrices": lambda x: torch.arange(-2.0, 2).double().view(1, 4) @ x.relu()[:, :, :4] @ torch.ones(8, 2).double(),
    "convolved": nn.Sequential(
        nn.Conv2d(6, 6, 3, 2, 1, groups=2), nn.ReLU(inplace=True), nn.ConvTranspose2d(6, 5, 2, 2)
    ),
    "dropped": lambda x: F.dropout(x, 0.5, False).relu(),
    "by name": lambda x: F.pad(input=torch.mean(input=F.relu(input=x), dim=1, keepdim=True), pad=(1, 1)),
    "transposed in place": lambda x: F.relu(x.unsqueeze_(1).squeeze_(1).transpose_(2, 3)).mT,
    "by parts": lambda x: torch.stack([each.relu() for each in x.clone().unbind(1)], 1).flip(1),
    "filled": lambda x: x.relu().masked_fill(torch.arange(8) > 5, 4.0),
    "chosen": lambda x: torch.where(torch.arange(8) > 2, x.relu(), 2.0),
}


def masked(buffer, x):
    buffer[:, 1:4] = x[:, 1:4]
    buffer[:, 5] = buffer[:, 5] + x[:, 2]
    return buffer


@pytest.mark.parametrize("case", REVEALED)
def test_parts_add_up(case, images):
    network, (x, reference) = Spelled(REVEALED[case]), images
    network(x.clone())
    assert missed(network, x, reference, rule="reveal_cancel") < 1e-12
    shared = explained(network, x, reference[:1], rule="reveal_cancel").values
    alone = torch.cat([explained(network, x[i : i + 1], reference[:1], rule="reveal_cancel").values for i in range(4)])
    assert (alone - shared).abs().max() <= 1e-12 * shared.abs().max()


@torch.no_grad()
def test_a_large_shift_of_a_norm_costs_no_digits():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 1, bias=False)).double().eval()
    network[1].weight.uniform_(-1, 1)
    network[1].bias.fill_(1e12)
    x, reference = torch.randn(2, 3, 5).double()
    found = explained(network, x, reference, rule="reveal_cancel").values
    weights = network[2].weight * network[1].weight / (1 + network[1].eps) ** 0.5 @ network[0].weight
    torch.testing.assert_close(found, weights * (x - reference), atol=1e-13, rtol=1e-10)


UNREVEALED = {
    "a product": (COMPOSED["x * x"], "DeepLIFT RevealCancel: operation 'mul' in module 'Spelled' has no rule"),
    "a quotient": (COMPOSED["a quotient"], "'div' in module 'Spelled' has no rule"),
    "max pooling": (nn.MaxPool2d(2), "'max_pool2d' in module 'function' has no rule"),
    "softmax": (lambda x: x.softmax(1), "'softmax' in module 'Spelled' has no rule"),
    "a norm": (nn.GroupNorm(2, 6), "'group_norm' in module 'function' has no rule"),
    "attention": (attention(True), "'scaled_dot_product_attention' in module 'Spelled' has no rule"),
    "matrices": (lambda x: x @ x, "'matmul' in module 'Spelled' has no rule"),
    "a larger one": (lambda x: torch.maximum(x, x.flip(1)), "'maximum' in module 'Spelled' has no rule"),
    "bicubic interpolation": (lambda x: F.interpolate(x, size=5, mode="bicubic"), "'upsample_bicubic2d' in module"),
    "a part in place": (ELEMENTWISE["relu of a part in place"], "in module 'Spelled' loses the differences"),
}


@pytest.mark.parametrize("case", UNREVEALED)
def test_what_reveal_cancel_does_not_define_is_refused(case, images):
    function, message = UNREVEALED[case]
    network, (x, reference) = Spelled(function), images
    network(x)
    with pytest.raises(UnsupportedError) as error:
        explained(network, x, reference, rule="reveal_cancel")
    assert message in str(error.value)


def test_both_rules_agree_where_nothing_cancels(images):
    """With weights and differences of one sign there is one part alone."""
    network, (x, _) = Spelled(nn.Sequential(nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Softplus())), images
    network(x)
    with torch.no_grad():
        for each in network.parameters():
            each.abs_()
    x = x.abs()
    rescale, revealed = (explained(network, x, 0 * x[:1], rule=rule).values for rule in ("rescale", "reveal_cancel"))
    assert (rescale - revealed).abs().max() < 1e-13 * rescale.abs().max()


def by_hand(network, x, reference):
    """RevealCancel of a network of linear layers and rectifiers, one unit at a time: sections 3.5.1 to 3.5.3."""
    difference = x - reference
    above, at, layers = [difference.clamp(min=0), difference.clamp(max=0)], reference, []
    for layer in network:
        if isinstance(layer, nn.Linear):
            given = above[0] + above[1]
            shares = layer.weight * given  # (output, input)
            rises = (shares > 0).double() + (shares == 0).double() / 2
            to = [rises, 1 - rises]
            layers.append([each * layer.weight for each in to])
            above = [(m * given).sum(1) for m in layers[-1]]
        else:
            f = torch.relu
            p, n = above
            risen = (f(at + p) - f(at) + f(at + n + p) - f(at + n)) / 2
            fallen = (f(at + n) - f(at) + f(at + n + p) - f(at + p)) / 2
            on, off = (at > 0).double(), (at + n + p > 0).double()
            layers.append(
                [torch.where(part == 0, (on + off) / 2, made / part) for part, made in ((p, risen), (n, fallen))]
            )
            above = [risen, fallen]
        at = layer(at)
    sent = [torch.ones(1).double(), torch.ones(1).double()]
    for layer, own in zip(reversed(network), reversed(layers), strict=True):
        if isinstance(layer, nn.Linear):
            both = own[0].T @ sent[0] + own[1].T @ sent[1]
            sent = [both, both]
        else:
            sent = [m * s for m, s in zip(own, sent, strict=True)]
    return sent[0] * difference.clamp(min=0) + sent[1] * difference.clamp(max=0)


@torch.no_grad()
def test_reveal_cancel_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 1)).double().eval()
    for _ in range(5):
        x, reference = torch.randn(2, 7).double()
        found = explained(network, x[None], reference[None], rule="reveal_cancel").values[0]
        assert (found - by_hand(network, x, reference)).abs().max() < 1e-13
