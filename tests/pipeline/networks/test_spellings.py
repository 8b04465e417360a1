"""Attention, skips and cut gradients in many spellings: as the plain spelling has them, or named as not readable."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import MicrotomeError
from pipeline.networks.graph.arithmetic import factors, terms
from pipeline.networks.graph.gradient_flow import ends
from pipeline.networks.graph.operations import Operations, find
from pipeline.networks.layers import survey
from pipeline.stages.sight import tasks as sight

SIDE, PATCH, DIM, HEADS = 16, 4, 6, 2


def plain(x, f):
    return x + 0.5 * f


ADDITIONS = {
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "keyword": lambda x, f: torch.add(input=x, other=f, alpha=0.5),
    "add_": lambda x, f: x.clone().add_(f, alpha=0.5),
    "out": lambda x, f: torch.add(x, 0.5 * f, out=torch.empty(x.shape, dtype=x.dtype)),
    "addcmul": lambda x, f: torch.addcmul(x, f, torch.full_like(f, 0.5)),
    "addcdiv": lambda x, f: torch.addcdiv(x, f, torch.full_like(f, 2.0)),
    "sub": lambda x, f: x - (-0.5) * f,
    "sub alpha": lambda x, f: torch.sub(x, f, alpha=-0.5),
    "rsub": lambda x, f: torch.rsub(-0.5 * f, x),
    "stack": lambda x, f: torch.stack([x, 0.5 * f]).sum(0),
    "stack last": lambda x, f: torch.stack([x, 0.5 * f], -1).sum(-1),
    "cat": lambda x, f: torch.cat([x[None], 0.5 * f[None]]).sum(dim=0),
    "sum": lambda x, f: sum([x, 0.5 * f]),
    "layer scale": lambda x, f: x + torch.full((DIM,), 0.5, dtype=x.dtype) * f,
}
UNREAD_ADDITIONS = {
    "weighted stack": lambda x, f: (torch.stack([x, f]) * torch.tensor([1, 0.5]).view(2, 1, 1, 1)).sum(0),
    "hypot": torch.hypot,
    "three at once": lambda x, f: torch.stack([x, f, f]).sum(0),
    "broadcast": lambda x, f: x + f.mean(1, keepdim=True),
}


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def scores_of(q, k):
    return q @ k.mT / math.sqrt(q.shape[-1])


def fold(x):
    return x.flatten(0, 1)


def by_head(x):
    return x.transpose(0, 1).flatten(0, 1)


def by_hand(scores, dim=-1, shift=True):
    weights = (scores - scores.amax(dim, keepdim=True) if shift else scores).exp()
    return weights / weights.sum(dim, keepdim=True)


def folded_heads_first(q, k, v):
    weights = torch.bmm(by_head(q) / math.sqrt(q.shape[-1]), by_head(k).mT).softmax(-1)
    return torch.bmm(weights, by_head(v)).unflatten(0, (HEADS, -1)).transpose(0, 1)


SPELLINGS = {
    "plain": lambda q, k, v: scores_of(q, k).softmax(-1) @ v,
    "scaled_dot_product": functional.scaled_dot_product_attention,
    "folded": lambda q, k, v: torch.bmm(scores_of(fold(q), fold(k)).softmax(-1), fold(v)).unflatten(0, (-1, HEADS)),
    "folded, heads first": folded_heads_first,
    "folded, scaled_dot_product": lambda q, k, v: functional.scaled_dot_product_attention(
        fold(q), fold(k), fold(v)
    ).unflatten(0, (-1, HEADS)),
    "baddbmm": lambda q, k, v: torch.bmm(
        torch.baddbmm(torch.zeros(1, 1, 1, dtype=q.dtype), fold(q), fold(k).mT, alpha=q.shape[-1] ** -0.5).softmax(-1),
        fold(v),
    ).unflatten(0, (-1, HEADS)),
    "by hand": lambda q, k, v: by_hand(scores_of(q, k)) @ v,
    "by hand, no maximum": lambda q, k, v: by_hand(scores_of(q, k), shift=False) @ v,
    "divided afterwards into columns": lambda q, k, v: (v.mT @ by_hand(scores_of(k, q), -2)).mT,
    "softmax down": lambda q, k, v: (v.mT @ scores_of(k, q).softmax(-2)).mT,
    "softmax down, transposed": lambda q, k, v: scores_of(k, q).softmax(-2).mT @ v,
    "log_softmax": lambda q, k, v: scores_of(q, k).log_softmax(-1).exp() @ v,
    "einsum": lambda q, k, v: torch.einsum("bhij,bhjd->bhid", scores_of(q, k).softmax(-1), v),
    "einsum, heads last": lambda q, k, v: torch.einsum(
        "bijh,bhjd->bhid", scores_of(q, k).softmax(-1).permute(0, 2, 3, 1), v
    ),
    "einsum, implicit": lambda q, k, v: torch.einsum("...ij,...jd->...id", by_hand(scores_of(q, k)), v),
}
UNREAD_ATTENTION = {
    "over the queries": lambda q, k, v: scores_of(q, k).softmax(-2) @ v,
    "divided last": lambda q, k, v: (lambda e: (e @ v) / e.sum(-1, keepdim=True))(scores_of(q, k).exp()),
    "linear": lambda q, k, v: (q.relu() @ (k.relu().mT @ v)) / 10,
    "all with all": lambda q, k, v: (scores_of(q, k).softmax(-1)[..., None] * v[:, :, None]).sum(-2),
}


class Block(nn.Module):
    def __init__(self, attend, add):
        super().__init__()
        self.attend, self.add = attend, add
        self.qkv, self.proj, self.mlp = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        q, k, v = map(heads_of, self.qkv(x).chunk(3, -1))
        x = self.add(x, self.proj(self.attend(q, k, v).transpose(1, 2).flatten(2)))
        return self.add(x, self.mlp(x))


class Net(nn.Module):
    def __init__(self, attend=SPELLINGS["plain"], add=plain):
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.blocks = nn.Sequential(Block(attend, add), Block(attend, add))
        self.head = nn.Linear(DIM, 3)

    def forward(self, x):
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def built(network):
    generator = torch.Generator().manual_seed(1)
    for weight in network.parameters():
        weight.data = 0.5 * torch.randn(weight.shape, generator=generator)
    return network.eval()


def images(count=3):
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def found_in(network):
    with torch.no_grad():
        layers = survey(network.float(), (3, SIDE, SIDE)).layers
    return find(network.double(), images(2), {layer.name: layer for layer in layers})


class Measured(Operations):
    """Attention weights and the terms of skips, in the order of a forward; without a skip if one is given."""

    def __init__(self, network, found, without=None):
        super().__init__(network)
        self.attention = {each.place: each for each in found.attention}
        self.skips = {each.place: each for each in found.skips}
        self.without, self.values = without, []

    def on_product(self, product):
        each = self.attention.get(product.place)
        if each is not None:
            self.values.append(each.reading.weights(product.operand(each.operand), len(images())))

    def on_addition(self, place, operands):
        skip = self.skips.get(place)
        if skip is not None:
            self.values += [each.make().clone() for each in (operands if skip.first else operands[::-1])]
        return None if skip is None or skip is not self.without else 0 if skip.first else 1


def measured(network, at=None):
    found = found_in(network)
    with torch.no_grad(), Measured(network, found, found.skips[at] if at is not None else None) as seen:
        output = network(images())
    return [*seen.values, output]


def same(network, twin, at=None):
    ours, theirs = measured(network, at), measured(twin, at)
    assert len(ours) == len(theirs) == 2 * (1 + 2 * 2) + 1
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_is_that_of_the_plain_spelling(spelling):
    network = built(Net(SPELLINGS[spelling]))
    found = found_in(network)
    assert [(each.name, each.heads) for each in found.attention] == [("blocks.0", HEADS), ("blocks.1", HEADS)]
    assert found.attention_unread == () and [each.branch for each in found.skips] == ["attention", "mlp"] * 2
    same(network, built(Net()))


@pytest.mark.parametrize("spelling", ADDITIONS)
@pytest.mark.parametrize("at", [None, 0, 3])
def test_skips_are_those_of_the_plain_spelling(spelling, at):
    same(built(Net(add=ADDITIONS[spelling])), built(Net()), at)


def test_lerp_adds_both_parts():
    network = built(Net(add=lambda x, f: torch.lerp(x, f, 0.25)))
    same(network, built(Net(add=lambda x, f: 0.75 * x + 0.25 * f)), 1)


@pytest.mark.parametrize("spelling", UNREAD_ATTENTION)
def test_attention_that_cannot_be_read_is_not_denied(spelling):
    found = found_in(built(Net(UNREAD_ATTENTION[spelling])))
    assert found.attention == [] and "'blocks.0'" in found.without_attention
    assert "it has no self-attention" not in found.without_attention


@pytest.mark.parametrize("spelling", UNREAD_ADDITIONS)
def test_additions_that_cannot_be_read_are_not_denied(spelling):
    found = found_in(built(Net(add=UNREAD_ADDITIONS[spelling])))
    assert "'blocks.0'" in found.without_skips and "cannot be read" in found.without_skips


@pytest.mark.parametrize(
    "hide", [lambda x: torch.from_numpy(x.numpy() * 2), lambda x: torch.tensor(x.tolist(), dtype=x.dtype)]
)
def test_code_that_no_function_of_torch_shows_is_named(hide):
    class Unseen(nn.Module):
        def forward(self, x):
            return hide(x)

    network = built(nn.Sequential(nn.Conv2d(3, 4, 3), Unseen(), nn.Conv2d(4, 4, 3)))
    found = found_in(network)
    for why in (found.without_attention, found.without_skips):
        assert "cannot be read: '1" in why and "cannot be followed" in why


class Cut(nn.Module):
    def __init__(self, cut):
        super().__init__()
        self.conv1, self.conv2, self.cut = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), cut

    def forward(self, x):
        return self.cut(self, x)


def under(mode):
    def cut(self, x):
        with mode():
            x = self.conv1(x)
        return self.conv2(x)

    return cut


@pytest.mark.parametrize(
    ("cut", "layers", "said"),
    [
        (under(torch.no_grad), ["conv1", "conv2"], "`torch.no_grad` in 'net'"),
        (under(torch.inference_mode), ["conv1", "conv2"], "`torch.inference_mode` in 'net'"),
        (torch.no_grad()(lambda self, x: self.conv2(self.conv1(x))), ["conv1", "conv2"], "`torch.no_grad` in 'net'"),
        (lambda self, x: self.conv2(self.conv1(x).detach()), ["conv2"], "`detach` in 'net'"),
        (lambda self, x: self.conv2(self.conv1(x).data), ["conv2"], "`data` in 'net'"),
    ],
)
def test_where_gradients_end_is_named(cut, layers, said):
    network = nn.Sequential()
    network.add_module("net", Cut(cut).requires_grad_(False))
    notes = ends(network, torch.randn(2, 3, 8, 8), ["net.conv1", "net.conv2"])
    assert sorted(notes) == [f"net.{layer}" for layer in layers]
    assert all(note == f"no gradient reaches the input: it ends at {said}" for note in notes.values())


def test_a_gradient_that_leaves_a_part_out_is_told():
    network = Cut(lambda self, x: self.conv2(self.conv1(x) + self.conv1(x).detach())).requires_grad_(False)
    notes = ends(network, images(2).float(), ["conv2"])
    assert notes == {"conv2": "its gradient leaves out what passes through `detach` in the network's own forward"}


def test_whole_gradients_have_no_notes():
    assert ends(built(Net()).float(), images(2).float(), ["embed", "blocks.0", "blocks.1"]) == {}


class Branching(Net):
    """Adds or attends once more on bright images."""

    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        bright, x = bool(x.mean() > 0.5), self.embed(x).flatten(2).transpose(1, 2)
        x = self.blocks[0](x)
        if bright:
            x = x + 0.1 * self.blocks[1].mlp(x) if self.what == "adds" else self.blocks[1](x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("what", ["adds", "attends"])
@pytest.mark.parametrize("measure", ["skips", "attention"])
def test_other_operations_than_those_of_the_inspection_are_refused(what, measure):
    network = built(Branching(what)).float()
    layers = survey(network, (3, SIDE, SIDE)).layers
    found = find(network, images(2).float() - 1, {layer.name: layer for layer in layers})
    parts = {"skips": found.skips, "attention": found.attention, "trail": found.trail}
    seen = sight.Seen(
        [layers[0]], 0, 0, **parts, localised=None, absent={}, unread=(), attention_unread=(), gradient_notes={},
        values=0, logits=True,
    )  # fmt: skip
    work = sight.Work(None, (SIDE, SIDE), seen, (measure,), 1, None, 2)
    sight.measured(work, network, images(4).float() - 1)
    with pytest.raises(MicrotomeError, match="adds or multiplies other things for these images"):
        sight.measured(work, network, images(4).float() + 1)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda a, b: terms("lerp", (a, b, 0.5, 3), {}),
            r"`lerp` is called with 4 arguments .* most 3 \(input, end",
        ),
        (lambda a, b: terms("addcmul", (a, 1, b, b, 2), {}), "`addcmul` is called with 5 arguments"),
        (lambda a, b: terms("add", (a, b, 2, 3), {}), "`add` is called with 4 arguments"),
        (lambda a, b: factors("matmul", (a, b, 1), {}), "`matmul` is called with 3 arguments"),
        (lambda a, b: factors("baddbmm", (a, 1, a, 1, a, b), {}), "`baddbmm` is called with 6 arguments"),
    ],
)
def test_arguments_beyond_those_that_are_known_are_an_error(call, said):
    with pytest.raises(MicrotomeError, match=said):
        call(torch.ones(2, 3, 3), torch.ones(2, 3, 3))


def test_numbers_before_what_they_multiply_are_read_as_of_old():
    a, b, c = (torch.randn(2, 3, 3) for _ in range(3))
    left, right = terms("baddbmm", (0.5, a, 2.0, b, c), {})
    torch.testing.assert_close(left.make() + right.make(), torch.baddbmm(a, b, c, beta=0.5, alpha=2.0))
    left, right = terms("add", (a, 0.5, b), {})
    torch.testing.assert_close(left.make() + right.make(), a + 0.5 * b)
    left, right = terms("addcmul", (a, 0.5, b, c), {})
    torch.testing.assert_close(left.make() + right.make(), a + 0.5 * b * c)


def fields_of(network):
    with torch.no_grad():
        layers = survey(network.float(), (3, SIDE, SIDE)).layers
    own = [layer for layer in layers if layer.name in ("blocks.0", "blocks.1")]
    return sight.gradients(network.double(), images(), own)[0]


@pytest.mark.parametrize("attend", SPELLINGS)
def test_receptive_fields_of_attention_are_those_of_the_plain_spelling(attend):
    expected = fields_of(built(Net()))
    assert expected.shape == (2, SIDE, SIDE) and expected.all()
    assert fields_of(built(Net(SPELLINGS[attend]))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("add", ADDITIONS)
def test_receptive_fields_of_additions_are_those_of_the_plain_spelling(add):
    network = built(Net(add=ADDITIONS[add]))
    if add == "out":
        with pytest.raises(RuntimeError, match=r"functions with out=.* don't support automatic differentiation"):
            fields_of(network)
    else:
        assert fields_of(network) == pytest.approx(fields_of(built(Net())), rel=1e-6)
