"""Layer-wise relevance propagation at call sites, against dense matrices, gradients, and its own ledger."""

import math
import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kernels.attribution.relevance import Rule
from pipeline.errors import MicrotomeError
from pipeline.networks import relevance as relevance_module
from pipeline.networks.gradients import Logit, Scalar, Unit
from pipeline.networks.graph.call_sites import UnsupportedError
from pipeline.networks.graph.ledger import Ledger, layout_of
from pipeline.networks.graph.propagated import Plan
from pipeline.networks.relevance import relevance

RULES = {
    "alpha 1": Rule(),
    "alpha 2": Rule(alpha=2.0),
    "alpha 1.5": Rule(alpha=1.5),
    "epsilon": Rule("epsilon", epsilon=0.01),
    "gamma": Rule("gamma", gamma=0.4),
}


def images(count=2, size=8, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, channels, size, size), generator=generator, dtype=torch.float64)


def classes(count, which=1):
    return Logit(torch.full((count,), which))


def explained(network, x, plan=None, target=None, layers=()):
    return relevance(network, x, classes(len(x)) if target is None else target, plan or Plan(), layers)


def residual(found):
    values = found.values.double().flatten(1)
    lacking = found.score.double() - values.sum(1) - found.bias - found.leak
    return float((lacking.abs() / torch.maximum(found.score.double().abs(), values.abs().sum(1))).max())


def lively(network, seed=1):
    """The network with statistics, scales and biases that are not those of an initialisation."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator, dtype=like.dtype)

    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.copy_(draw(module.running_mean, -0.3, 0.3))
            module.running_var.copy_(draw(module.running_var, 0.5, 1.5))
        if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm):
            module.weight.data.copy_(draw(module.weight, -0.5, 1.5))
            module.bias.data.copy_(draw(module.bias, -0.3, 0.3))
    return network.double().eval()


# Against dense matrices -----------------------------------------------------------------------------------------------


def matrix(function, x):
    """The matrix of a linear function of one image, (output, input)."""
    return torch.autograd.functional.jacobian(function, x).reshape(-1, x.numel())


def dense(rule, m, a, b, r):
    """One layer of LRP, contribution by contribution: R of the inputs, of the bias, and what is lost."""
    z = torch.cat([m * a, b[:, None]], 1)
    y = z.sum(1)
    p, n = z.clamp(min=0), z.clamp(max=0)
    shares = torch.zeros_like(z)
    for k in range(len(z)):
        if rule.kind == "alpha_beta":
            if p[k].sum() > 0:
                shares[k] += rule.alpha * p[k] / p[k].sum()
            if n[k].sum() < 0:
                shares[k] -= rule.beta * n[k] / n[k].sum()
        elif rule.kind == "epsilon":
            shares[k] = z[k] / (y[k] + math.copysign(rule.epsilon, y[k]))
        else:
            own = p[k] if y[k] > 0 else n[k]
            shares[k] = (z[k] + rule.gamma * own) / (y[k] + rule.gamma * own.sum())
    given = (shares * r[:, None]).sum(0)
    return given[:-1], float(given[-1]), float(r.sum() - given.sum())


class Small(nn.Module):
    """Convolutions with all that is in residual networks."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.other = nn.BatchNorm2d(4, eps=0.1)
        self.head = nn.Linear(4 * 4 * 4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.relu(self.norm(self.first(x)))
        y = self.other(self.second(x))
        y += x
        y = F.max_pool2d(self.relu(y), 2)
        return self.head(torch.flatten(y, 1))


def small():
    torch.manual_seed(2)
    net = lively(Small())
    net.head.bias.data.abs_()  # where it is negative, alpha 1 leaves it nothing
    return net


def by_matrices(net, x, rule, cls):
    """LRP of one image through `Small`, with BatchNorm in the matrices, and additions in proportion."""

    def folded(conv, norm, value):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - norm.running_mean * scale
        shift = shift if conv.bias is None else shift + conv.bias * scale
        side = (1, -1, 1, 1)
        m = matrix(lambda v: F.conv2d(v, conv.weight, padding=1) * scale.view(side), value)
        return m, shift.view(side).expand(1, 4, 8, 8).flatten()

    m1, b1 = folded(net.first, net.norm, x)
    h1 = (m1 @ x.flatten() + b1).relu()
    m2, b2 = folded(net.second, net.other, h1.view(1, 4, 8, 8))
    h2 = m2 @ h1 + b2
    h3 = (h2 + h1).relu()
    pooled, where = F.max_pool2d(h3.view(4, 8, 8), 2, return_indices=True)
    last = net.head.weight @ pooled.flatten() + net.head.bias
    r = torch.zeros(3, dtype=torch.float64)
    r[cls] = last[cls]
    bias = leak = 0.0

    def book(found):
        nonlocal bias, leak
        bias, leak = bias + found[1], leak + found[2]
        return found[0]

    r = book(dense(rule, net.head.weight, pooled.flatten(), net.head.bias, r)).view(4, 16)
    r = torch.zeros(4, 64, dtype=torch.float64).scatter_add(1, where.flatten(1), r).flatten()
    total = torch.where(h2 + h1 == 0, 1.0, h2 + h1)
    straight = r * h1 / total
    through = book(dense(rule, m2, h1, b2, r * h2 / total))
    values = book(dense(rule, m1, x.flatten(), b1, straight + through))
    return float(last[cls]), values.view_as(x), bias, leak


@pytest.mark.parametrize("rule", RULES)
def test_a_residual_network_agrees_with_matrices(rule):
    net, x = small(), images()
    with torch.no_grad():
        found = explained(net, x, Plan(RULES[rule]))
        for at in range(2):
            score, values, bias, leak = by_matrices(net, x[at : at + 1], RULES[rule], 1)
            assert float(found.score[at]) == pytest.approx(score, abs=1e-13)
            torch.testing.assert_close(found.values[at], values[0], atol=1e-13, rtol=1e-11)
            assert float(found.bias[at]) == pytest.approx(bias, abs=1e-12)
            assert float(found.leak[at]) == pytest.approx(leak, abs=1e-12)
    assert residual(found) < 1e-14


def test_without_epsilon_it_is_gradient_times_input():
    net, x = small(), images(3)
    found = explained(net, x, Plan(Rule("epsilon", epsilon=0.0)))
    given = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(given)[:, 1].sum(), given)
    torch.testing.assert_close(found.values, gradient * x, atol=1e-13, rtol=1e-10)
    near = explained(net, x, Plan(Rule("epsilon", epsilon=1e-13)))
    torch.testing.assert_close(near.values, gradient * x, atol=1e-10, rtol=1e-10)
    biases = found.score - (gradient * x).flatten(1).sum(1)
    torch.testing.assert_close(found.bias, biases, atol=1e-12, rtol=0)
    assert found.leak.abs().max() < 1e-14


@pytest.mark.parametrize("rule", RULES)
def test_a_norm_on_its_own_is_a_map_of_one_entry(rule):
    def by_hand(net, x):
        scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
        shift = net.norm.bias - net.norm.running_mean * scale
        return F.relu(F.conv2d(F.relu(net.first(x)), scale.view(4, 1, 1, 1), shift, groups=4))

    x, others = images(), (("head", Rule()), ("first", Rule()))
    one = lively(Function(lambda net, x: F.relu(net.norm(F.relu(net.first(x))))))
    found = explained(one, x, Plan(RULES[rule], others))
    assert residual(found) < 1e-14
    alone = Rule() if rule.startswith("alpha") else RULES[rule]
    wanted = explained(lively(Function(by_hand)), x, Plan(alone, others))
    torch.testing.assert_close(found.values, wanted.values, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(found.bias, wanted.bias, atol=1e-13, rtol=1e-10)


# The ledger -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_a_booking_that_is_left_out_shows(rule, monkeypatch):
    net, x = small(), images()
    assert residual(explained(net, x, Plan(RULES[rule]))) < 1e-14
    count = []
    real = Ledger.book_bias
    monkeypatch.setattr(Ledger, "book_bias", lambda *given: count.append(1) or real(*given))
    explained(net, x, Plan(RULES[rule]))
    total = len(count)
    assert total == 3
    for left_out in range(total):
        count.clear()
        monkeypatch.setattr(
            Ledger,
            "book_bias",
            lambda *given, skip=left_out: count.append(1) or (len(count) - 1 == skip) or real(*given),
        )
        assert residual(explained(net, x, Plan(RULES[rule]))) > 1e-6


def test_a_leak_that_is_left_out_shows(monkeypatch):
    net, x = small(), images()
    monkeypatch.setattr(Ledger, "book_leak", lambda *given: None)
    assert residual(explained(net, x, Plan(Rule("epsilon", epsilon=0.01)))) > 1e-4


def test_layouts_are_found_by_one_and_two_images():
    one = torch.arange(6.0).view(1, 2, 3)
    other = one + 10
    both = torch.cat([one, other])
    assert layout_of(one, both).axis == 0
    layout = layout_of(one.flatten(0, 1), both.flatten(0, 1))
    assert layout.first and layout.per_image(both.flatten(0, 1), 2).tolist() == [15, 75]
    swapped = both.transpose(0, 1).flatten(0, 1)
    layout = layout_of(one[0], swapped)
    assert not layout.first and layout.per_image(swapped, 2).tolist() == [15, 75]
    assert layout_of(one[0], both.transpose(0, 1)) is None
    assert layout_of(one, both + both.mean()) is None
    assert layout_of(one, both.mean(0, keepdim=True)) is None
    assert layout_of(torch.ones(1, 3), torch.ones(2, 3)).axis == 0
    assert layout_of(torch.ones(2, 3), torch.ones(4, 3)) is None  # which of the rows are of the first image?


# Spellings ------------------------------------------------------------------------------------------------------------


class Function(nn.Module):
    def __init__(self, function, size=8 * 8 * 4):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(4), nn.Linear(size, 3)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self, x).flatten(1))


def reused(net, x):
    return F.relu(net.second(F.relu(net.second(F.relu(net.first(x))))))


def skipped(net, x):
    h = F.relu(net.first(x))
    return F.relu(net.norm(net.second(h) + h))


def partly(y):
    y[:, :2].relu_()
    return y


SAME = {
    "in place": (
        lambda net, x: F.relu(net.first(x)) + F.relu(net.second(F.relu(net.first(x)))),
        lambda net, x: F.relu(net.second(F.relu_(y := net.first(x))), inplace=True).add_(y),
    ),
    "a norm after a rectifier in place": (
        lambda net, x: F.relu(net.norm(F.relu(net.first(x)))),
        lambda net, x: F.relu(net.norm(nn.ReLU(inplace=True)(net.first(x)))),
    ),
    "a norm after a functional rectifier in place": (
        lambda net, x: F.relu(net.norm(F.relu(net.first(x)))),
        lambda net, x: F.relu(net.norm(torch.relu_(net.first(x)))),
    ),
    "a norm after a sum in place": (
        skipped,
        lambda net, x: F.relu(net.norm(operator.iadd(net.second(h := F.relu(net.first(x))), h))),
    ),
    "a norm after a functional sum in place": (
        skipped,
        lambda net, x: F.relu(net.norm(net.second(h := F.relu(net.first(x))).clone().add_(h))),
    ),
    "a norm after a write into a part": (
        lambda net, x: F.relu(net.norm(torch.cat([(y := net.first(x))[:, :2].relu(), y[:, 2:]], 1))),
        lambda net, x: F.relu(net.norm(partly(net.first(x)))),
    ),
    "a buffer": (
        lambda net, x: F.relu(net.first(x)),
        lambda net, x: written(net.first(x).relu()),
    ),
    "a norm by hand": (
        lambda net, x: F.relu(net.norm(net.first(x))),
        lambda net, x: torch.relu(
            F.batch_norm(net.first(x), net.norm.running_mean, net.norm.running_var, net.norm.weight, net.norm.bias)
        ),
    ),
    "a convolution by hand": (
        reused,
        lambda net, x: reused(
            net, torch.conv2d(x, torch.eye(3, dtype=x.dtype)[:, :, None, None], None, 1, 0)
        ),
    ),
    "padding": (
        lambda net, x: F.conv2d(F.pad(x, (1, 1, 1, 1)), net.first.weight, net.first.bias).relu(),
        lambda net, x: F.relu(net.first(x)),
    ),
    "a product with one": (
        lambda net, x: F.relu(net.first(x)),
        lambda net, x: 1 * (F.relu(net.first(x)) / torch.ones(4, 1, 1).to(x) - 0 + torch.zeros(1).to(x)),
    ),
    "pooling": (
        lambda net, x: F.relu(net.first(x)).mean((2, 3), keepdim=True).expand(-1, -1, 8, 8),
        lambda net, x: F.interpolate(F.adaptive_avg_pool2d(F.relu(net.first(x)), 1), 8),
    ),
    "a matrix": (
        lambda net, x: F.relu(torch.einsum("oi,bihw->bohw", net.second.weight[:, :, 1, 1], F.relu(net.first(x)))),
        lambda net, x: F.relu(F.conv2d(F.relu(net.first(x)), net.second.weight[:, :, 1:2, 1:2])),
    ),
    "read twice": (  # by a norm, and by something else
        lambda net, x: F.relu(net.norm(y := net.first(x)) + y),
        lambda net, x: F.relu(net.norm(net.first(x)) + net.first(x)),
    ),
    "a sign": (
        lambda net, x: F.relu(net.second(-F.relu(net.first(x)))),
        lambda net, x: F.relu(net.second(F.relu(net.first(x)) * -1)),
    ),
    "a shift": (
        lambda net, x: F.relu(net.second(F.relu(net.first(x)).add(-0.5))),
        lambda net, x: F.relu(net.second(F.relu(net.first(x)) - 0.5)),
    ),
    "bounds": (
        lambda net, x: F.relu(net.second(F.relu(net.first(x)).clamp(0, 9))),
        lambda net, x: F.relu(net.second(F.threshold(F.hardtanh(net.first(x), -9, 9), 0, 0))),
    ),
    "another value below a threshold": (
        lambda net, x: F.relu(net.second(F.threshold(net.first(x), 0, -0.5))),
        lambda net, x: F.relu(net.second(F.threshold(net.first(x), 0, -0.5) * 1)),
    ),
    "magnitudes": (  # the sign of the input is known on one side alone
        lambda net, x: F.relu(net.second(F.relu(net.first(x)))),
        lambda net, x: F.relu(net.second(F.leaky_relu(net.first(x), 0.0))),
    ),
    "a product of matrices": (
        lambda net, x: F.relu((F.relu(net.first(x)).flatten(2).mT @ net.second.weight[:, :, 1, 1].T).mT),
        lambda net, x: F.relu(net.second.weight[:, :, 1, 1] @ F.relu(net.first(x)).flatten(2)),
    ),
}  # fmt: skip


def written(x):
    buffer = x.new_zeros(x.shape)
    buffer[:, :2] = x[:, :2]
    buffer[:, 2:] = x[:, 2:]
    return buffer


@pytest.mark.parametrize("rule", ["alpha 1", "alpha 2", "epsilon", "gamma"])
@pytest.mark.parametrize("case", SAME)
def test_spellings_of_the_same_network_have_the_same_relevance(case, rule):
    x, plan = images(2), Plan(RULES[rule])
    one, other = (explained(lively(Function(each)), x, plan) for each in SAME[case])
    if case == "a convolution by hand":  # a layer more, whose contributions are one to one
        assert residual(one) < 1e-14 and residual(other) < 1e-14
        return
    torch.testing.assert_close(one.values, other.values, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(one.bias, other.bias, atol=1e-12, rtol=1e-10)
    assert residual(one) < 1e-14 and residual(other) < 1e-14


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", ["a norm after a rectifier in place", "a norm after a sum in place"])
def test_a_norm_of_what_was_written_into_agrees_with_matrices(case, rule):
    net, x = lively(Function(SAME[case][1])), images()
    rule = RULES[rule]
    scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    shift = (net.norm.bias - net.norm.running_mean * scale).repeat_interleave(64)
    diagonal = torch.diag(scale.repeat_interleave(64))
    alone = Rule() if rule.kind == "alpha_beta" else rule

    def convolved(conv, value):
        return matrix(lambda v: F.conv2d(v, conv.weight, padding=1), value), conv.bias.repeat_interleave(64)

    with torch.no_grad():
        found = explained(net, x, Plan(rule))
        for at, one in enumerate(x.split(1)):
            m1, b1 = convolved(net.first, one)
            u = hidden = (m1 @ one.flatten() + b1).relu()
            if "sum" in case:
                m2, b2 = convolved(net.second, hidden.view(1, 4, 8, 8))
                u = m2 @ hidden + b2 + hidden
            y = (diagonal @ u + shift).relu()
            score = net.head.weight[1:2] @ y + net.head.bias[1:2]
            torch.testing.assert_close(found.score[at : at + 1], score)
            r = dense(rule, net.head.weight[1:2], y, net.head.bias[1:2], score)[0]
            r = dense(alone, diagonal, u, shift, r)[0]
            if "sum" in case:
                share = r / torch.where(u == 0, 1.0, u)
                r = share * hidden + dense(rule, m2, hidden, b2, share * (u - hidden))[0]
            values = dense(rule, m1, one.flatten(), b1, r)[0]
            torch.testing.assert_close(found.values[at].flatten(), values, atol=1e-12, rtol=1e-9)


def test_a_norm_of_a_map_whose_input_was_written_into_since_is_refused():
    def function(net, x):
        y = net.second(h := F.relu(net.first(x)))
        h += 1
        return F.relu(net.norm(y) + h)

    with pytest.raises(UnsupportedError, match="'batch_norm' in module 'norm' normalises a linear map whose input was"):
        explained(lively(Function(function)), images())


class Token(nn.Module):
    """Joined constants, images along another axis, and rows in which images alternate."""

    def __init__(self, function=None):
        super().__init__()
        torch.manual_seed(4)
        self.patches, self.mix, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6), nn.Linear(6, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 6))
        self.places = nn.Parameter(torch.randn(5, 1, 6))
        self.function = function or (lambda x: x)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1).transpose(0, 1) + self.places
        rows = self.function(x).reshape(-1, 6)
        rows = rows + F.relu(self.mix(rows))
        return self.head(rows.view(5, -1, 6).mean(0))


def of_rows(function):
    """A function of rows (token, image), in which images alternate, given as (token, image, unit)."""
    return lambda x: function(x.reshape(-1, 6)).view(x.shape)


BOOKED = {
    "rows and a number": of_rows(lambda rows: rows + 0.3),
    "rows and a bias": of_rows(lambda rows: 2 - rows * torch.arange(6.0)),
    "masked rows": of_rows(lambda rows: rows.masked_fill(torch.arange(6) == 2, 0.7)),
    "chosen rows": of_rows(lambda rows: torch.where(torch.arange(6) < 3, rows, 0.3)),
    "padded rows": of_rows(lambda rows: F.pad(rows, (1, 0), value=0.5)[:, :6]),
    "larger rows": of_rows(lambda rows: torch.maximum(rows, torch.full((), 0.2))),
    "joined rows": of_rows(lambda rows: torch.cat([rows[:, :5], torch.ones(1).expand(len(rows), 1)], -1)),
    "broadcast rows": of_rows(lambda rows: rows.mean(1, keepdim=True) + torch.arange(6.0)),
    "plain": None,
    "masked": lambda x: x.masked_fill(torch.arange(6) == 2, 0.7),
    "chosen": lambda x: torch.where(torch.arange(6) < 3, x, 0.3),
    "padded": lambda x: F.pad(x, (1, 0), value=0.5)[..., :6],
    "less": lambda x: 2 - x - 0.5,
    "over": lambda x: (x + 1) / 2,
    "the larger": lambda x: torch.maximum(x, torch.full((), 0.2)),
    "joined": lambda x: torch.cat([x[..., :5], torch.ones(1).expand(*x.shape[:2], 1)], -1),
    "an affine map": lambda x: torch.addcmul(torch.ones(6), torch.full((6,), 0.3), x),
    "a sigmoid": lambda x: x * torch.sigmoid(x.mean(-1, keepdim=True)),
    "exp": lambda x: torch.exp(-x) + F.silu(x),
    "a sigmoid's logarithm": nn.LogSigmoid(),
    "a power": lambda x: 2**x + torch.log10(x.absolute() + 1) + torch.erfc(x),
    "leaks at random": lambda x: F.rrelu(x, training=False),
    "a quotient": lambda x: x / (1 + x.square().sum(-1, keepdim=True)),
    "a reciprocal": lambda x: 1 / (2 + x.sigmoid()),
    "softmax": lambda x: x * x.softmax(-1),
    "its logarithm": lambda x: x.log_softmax(-1),
    "a norm": lambda x: F.layer_norm(x, (6,), torch.full((6,), 2.0), torch.ones(6)),
    "a norm of squares": lambda x: F.rms_norm(x, (6,), torch.full((6,), 2.0)),
    "groups": lambda x: F.group_norm(x.permute(1, 2, 0), 3, torch.full((6,), 2.0), torch.ones(6)).permute(2, 0, 1),
    "attention": lambda x: F.scaled_dot_product_attention(*(each := x.transpose(0, 1), each, each)).transpose(0, 1),
}


@pytest.mark.parametrize("preset", ["cp_lrp", "attn_lrp"])
@pytest.mark.parametrize("rule", ["alpha 1", "epsilon", "gamma"])
@pytest.mark.parametrize("case", BOOKED)
def test_what_is_kept_and_lost_is_booked_by_image(case, rule, preset):
    torch.set_default_dtype(torch.float64)
    try:
        net, x = lively(Token(BOOKED[case])), images(3)
    finally:
        torch.set_default_dtype(torch.float32)

    def doubled(*given):
        torch.set_default_dtype(torch.float64)
        try:
            return explained(*given)
        finally:
            torch.set_default_dtype(torch.float32)

    plan = Plan(RULES[rule], preset=preset)
    found = doubled(net, x, plan)
    assert residual(found) < 1e-13
    for at in range(3):
        alone = doubled(net, x[at : at + 1], plan)
        torch.testing.assert_close(alone.values[0], found.values[at], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(alone.bias[0], found.bias[at], atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(alone.leak[0], found.leak[at], atol=1e-12, rtol=1e-10)


def test_what_a_logarithm_of_softmax_subtracts_is_no_bias():
    net, x = lively(Function(lambda net, x: F.relu(net.first(x)))), images(3)
    for module in (net.first, net.head):
        nn.init.zeros_(module.bias)
    logits = net.head
    net.head = nn.Sequential(logits, nn.LogSoftmax(1))
    found = explained(net, x, Plan(Rule("epsilon", epsilon=0.0)))
    assert residual(found) < 1e-14
    assert not found.bias.any()
    with torch.no_grad():
        torch.testing.assert_close(found.leak, -logits(F.relu(net.first(x)).flatten(1)).logsumexp(1))


# At the input ---------------------------------------------------------------------------------------------------------


def test_bounds_and_squares_at_the_input():
    net, x = small(), images().clamp(-1, 2)
    low, high = torch.full((3, 1, 1), -1.0, dtype=torch.float64), torch.full((3, 1, 1), 2.0, dtype=torch.float64)
    scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    hidden = explained(net, x, Plan(Rule()), layers=["norm"]).layers["norm"]
    for kind in ("z_b", "w_squared"):
        plan = Plan(Rule(), (("first", Rule(kind)),), low=low, high=high)
        found = explained(net, x, plan)
        assert residual(found) < 1e-14
        for at in range(2):
            with torch.no_grad():
                one = x[at : at + 1]
                m = matrix(lambda v: F.conv2d(v, net.first.weight, padding=1) * scale.view(1, -1, 1, 1), one)
                bounded = m * one.flatten() - m.clamp(min=0) * -1 - m.clamp(max=0) * 2
                z = bounded if kind == "z_b" else m.square()
                share = z / z.sum(1, keepdim=True)
                wanted = (share * hidden[at].flatten()[:, None]).sum(0)
            torch.testing.assert_close(found.values[at].flatten(), wanted, atol=1e-13, rtol=1e-9)


def test_the_bounds_have_to_be_given_and_the_rule_is_for_the_input():
    with pytest.raises(MicrotomeError, match="z_b needs the bounds"):
        explained(small(), images(), Plan(Rule(), (("first", Rule("z_b")),)))
    with pytest.raises(UnsupportedError, match="'w_squared' in module 'second' is a rule of the layer that reads"):
        explained(small(), images(), Plan(Rule(), (("second", Rule("w_squared")),)))


@pytest.mark.parametrize("rule", RULES)
def test_relevance_and_counter_relevance_add_up(rule):
    net, x = small(), images()
    plain = explained(net, x, Plan(RULES[rule]))
    found = explained(net, x, Plan(RULES[rule], signs=True))
    torch.testing.assert_close(found.values, plain.values, atol=1e-13, rtol=1e-10)
    torch.testing.assert_close(found.bias, plain.bias, atol=1e-13, rtol=1e-10)
    assert residual(found) < 1e-14
    # What comes of the units: alpha R / P times positive contributions, by matrices.
    scale = net.norm.weight / (net.norm.running_var + net.norm.eps).sqrt()
    shift = net.norm.bias + (net.first.bias - net.norm.running_mean) * scale
    hidden = explained(net, x, Plan(RULES[rule]), layers=["norm"]).layers["norm"]
    if RULES[rule].kind == "alpha_beta":
        with torch.no_grad():
            one = x[:1]
            m = matrix(lambda v: F.conv2d(v, net.first.weight, padding=1) * scale.view(1, -1, 1, 1), one)
            z = torch.cat([m * one.flatten(), shift.view(-1, 1, 1).expand(4, 8, 8).reshape(-1, 1)], 1).clamp(min=0)
            total = z.sum(1)
            share = torch.where(total > 0, RULES[rule].alpha * hidden[0].flatten() / total, 0.0)
            wanted = (z * share[:, None]).sum(0)[:-1]
        torch.testing.assert_close(found.positive[0].flatten(), wanted, atol=1e-13, rtol=1e-9)
    if rule == "alpha 1":
        torch.testing.assert_close(found.positive, found.values)


def test_signs_need_a_linear_map_of_the_input():
    net = lively(Function(lambda net, x: F.relu(net.first(x.exp()))))
    with pytest.raises(UnsupportedError, match="`signs` needs a convolution or linear map of the input itself"):
        explained(net, images(), Plan(signs=True))


# Composites and layers ------------------------------------------------------------------------------------------------


def test_rules_by_pattern_and_by_depth():
    net, x = small(), images()
    epsilon, alpha = Rule("epsilon", epsilon=0.01), Rule(alpha=2.0)
    wanted = explained(net, x, Plan(epsilon, (("first", alpha),))).values
    for rules in ((("f*st", alpha),), (("depth 1", alpha),), (("depth 2-", epsilon), ("*", alpha))):
        torch.testing.assert_close(explained(net, x, Plan(epsilon, rules)).values, wanted, atol=0, rtol=0)
    assert (wanted - explained(net, x, Plan(epsilon)).values).abs().max() > 1e-3
    assert (wanted - explained(net, x, Plan(alpha)).values).abs().max() > 1e-3
    with pytest.raises(MicrotomeError, match=r"rules: 'frist' matches no module; nearest: first"):
        explained(net, x, Plan(epsilon, (("frist", alpha),)))


@pytest.mark.parametrize("rule", RULES)
def test_relevance_of_layers_is_that_of_the_rest_of_the_network(rule):
    net, x = small(), images()
    plain = explained(net, x, Plan(RULES[rule]))
    found = explained(net, x, Plan(RULES[rule]), layers=["norm", "other", "head"])
    torch.testing.assert_close(found.values, plain.values, atol=0, rtol=0)
    torch.testing.assert_close(found.layers["head"].sum(1), found.score)
    assert found.layers["norm"].shape == (2, 4, 8, 8)
    with pytest.raises(MicrotomeError, match="layer 'first' has no relevance of its own: it is folded into the Batch"):
        explained(net, x, Plan(RULES[rule]), layers=["first"])
    with pytest.raises(MicrotomeError, match="no layer 'frist'; nearest: first"):
        explained(net, x, Plan(RULES[rule]), layers=["frist"])


def test_only_what_ends_with_a_folded_map_has_no_relevance_of_its_own():
    class Block(nn.Module):
        """Calls the functions of a convolution and of a BatchNorm by itself."""

        def __init__(self, first, norm):
            super().__init__()
            self.first, self.norm = first, norm

        def forward(self, x):
            y = F.conv2d(x, self.first.weight, self.first.bias, padding=1)
            of_norm = self.norm.running_mean, self.norm.running_var, self.norm.weight, self.norm.bias
            return F.batch_norm(y, *of_norm)

    net, x = small(), images()
    wanted = explained(net, x, layers=["norm"]).layers["norm"]
    block = small()
    block.first, block.norm = Block(block.first, block.norm), nn.Identity()
    torch.testing.assert_close(explained(block, x, layers=["first"]).layers["first"], wanted)
    net.first = nn.Sequential(nn.Sequential(net.first))
    for name in ("first", "first.0", "first.0.0"):
        with pytest.raises(MicrotomeError, match=f"layer '{name}' has no relevance of its own"):
            explained(net, x, layers=["norm", name])
    changed = small()
    explained(changed, x, layers=["norm"])
    changed.other = nn.Identity()  # after which nothing is folded into it
    assert explained(changed, x, layers=["second"]).layers["second"].shape == (2, 4, 8, 8)


def test_units_and_other_functions_are_targets():
    net, x = small(), images()
    found = explained(net, x, Plan(Rule()), Unit("other", (2,)))
    assert residual(found) < 1e-14
    probability = explained(net, x, Plan(Rule()), Logit(torch.tensor([1, 2]), link="probability"))
    assert residual(probability) < 1e-14 and probability.leak.abs().min() > 1e-4
    contrast = explained(net, x, Plan(Rule()), Logit(torch.tensor([1, 2]), torch.tensor([0, 0])))
    assert residual(contrast) < 1e-14 and contrast.leak.abs().max() < 1e-14
    distance = explained(net, x, Plan(Rule()), Scalar(lambda output: output.square().sum(1)))
    torch.testing.assert_close(distance.leak, -distance.score)  # twice the score is shared


# What holds of every pass ---------------------------------------------------------------------------------------------


def test_neighbours_change_no_bit_and_the_batch_little():
    net = small()
    x = images(8)
    for plan in (Plan(), Plan(Rule(alpha=2.0)), Plan(Rule("epsilon"))):
        among = explained(net, x, plan)
        again = explained(net, torch.cat([x[:1], images(7, seed=5)]), plan)
        assert torch.equal(among.values[0], again.values[0]) and torch.equal(among.bias[0], again.bias[0])
        alone = torch.cat([explained(net, one[None], plan).values for one in x])
        assert (alone - among.values).abs().max() <= 1e-12 * among.values.abs().max()


@pytest.mark.parametrize("preset", ["cp_lrp", "attn_lrp"])
def test_the_place_of_an_image_changes_no_bit_of_a_transformer(preset):
    import torchvision

    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(16, 4, 2, 2, 12, 20, num_classes=3).eval()
    for weight in net.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.6)
    x, plan = images(4, 16).float(), Plan(preset=preset)
    found = explained(net, x, plan).values
    for places in (1, 2, 3):
        assert torch.equal(explained(net, x.roll(places, 0), plan).values.roll(-places, 0), found)


def test_nothing_stays_on_the_network_and_a_changed_one_is_studied_again():
    net, x = small(), images()
    before = explained(net, x).values
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in net.modules())
    assert all(each.requires_grad for each in net.parameters())
    net.head = nn.Sequential(nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    after = explained(net, x)
    assert residual(after) < 1e-14 and not torch.equal(before, after.values)
    net.second = nn.Sequential(net.second, nn.ReLU())
    assert residual(explained(net, x)) < 1e-14


HOSTILE = {
    "a mask by hand": (lambda net, x: net.first(x) * (net.first(x) > 0), "'mul' in module 'Function' depends on the"),
    "a detached factor": (lambda net, x: net.first(x) * net.first(x).detach(), "'mul' in module 'Function' depends on"),
    "a cumulative product": (lambda net, x: net.first(x).cumprod(1), "operation 'cumprod' in module 'Function' has no"),
    "sorted": (lambda net, x: net.first(x).sort(1).values, "operation 'sort' in module 'Function' has no rule"),
    "a norm": (
        lambda net, x: net.first(x) + net.first(x).norm(),
        "operation 'linalg_vector_norm' in module 'Function' has",
    ),
    "image by image": (
        lambda net, x: torch.cat([net.first(row[None]) for row in x]),
        "the network calls other functions for two images than for one",
    ),
    "live weights": (
        lambda net, x: F.conv2d(net.first(x), net.second.weight * x.mean()),
        "'conv2d' in module 'Function' has weights that depend on the input",
    ),
    "the mean image": (
        lambda net, x: F.relu(net.second(net.first(x) - net.first(x).mean(0))),
        "operation 'conv2d' in module 'second' mixes the images of a batch",
    ),
    "constants in a buffer": (
        lambda net, x: torch.ones(len(x), 4, 8, 8).to(x).index_put((torch.tensor([0]),), net.first(x)[:1]),
        "operation 'index_put' in module 'Function' has no rule",
    ),
    "written among constants": (lambda net, x: among(net.first(x)), "'setitem' in module 'Function' writes values of"),
    "training": (lambda net, x: F.dropout(net.first(x), 0.5, True), "'dropout' in module 'Function' draws random"),
    "leaks in training": (lambda net, x: F.rrelu(net.first(x), training=True), "'rrelu' in module 'Function' draws"),
    "in training": (
        lambda net, x: F.batch_norm(net.first(x), None, None, training=True),
        "'batch_norm' in module 'Function' in training mode depends",
    ),
}


def among(x):
    buffer = torch.ones_like(x)
    buffer[:, :2] = x[:, :2]
    return buffer


@pytest.mark.parametrize("case", HOSTILE)
def test_what_has_no_rule_is_refused_by_operation_and_module(case):
    function, message = HOSTILE[case]
    with pytest.raises(UnsupportedError) as error:
        explained(lively(Function(function)), images())
    assert message in str(error.value)


def test_alpha_above_one_needs_a_rectifier():
    net = lively(Function(lambda net, x: F.gelu(net.second(F.gelu(net.first(x))))))
    with pytest.raises(UnsupportedError, match="calls no ReLU, so alpha above 1 would make relevance grow"):
        explained(net, images(), Plan(Rule(alpha=2.0)))
    assert residual(explained(net, images())) < 1e-14
    assert residual(explained(net, images(), Plan(Rule(alpha=2.0), (("*", Rule()),)))) < 1e-14


def test_padding_modes_groups_and_transposes():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.a = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect", groups=3)
            self.b = nn.Conv2d(6, 6, 3, padding=2, dilation=2, padding_mode="circular")
            self.norm = nn.BatchNorm2d(4)
            self.c, self.d = nn.ConvTranspose2d(6, 4, 2, 2, groups=2), nn.Conv2d(4, 3, 16, bias=False)

        def forward(self, x):
            x = F.relu6(self.b(F.relu(self.a(x))))
            return self.d(F.leaky_relu(self.norm(self.c(x)))).flatten(1)

    net, x = lively(Odd()), images()
    for rule in RULES.values():
        assert residual(explained(net, x, Plan(rule))) < 1e-13


def test_the_study_is_remembered():
    net, x = small(), images()
    explained(net, x)
    calls = []
    handle = net.first.register_forward_hook(lambda *given: calls.append(len(given[2])))
    explained(net, x)
    handle.remove()
    assert calls == [2]
    assert len(relevance_module._STUDIES[net]) == 1
