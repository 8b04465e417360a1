"""Composite functions taken apart compute what torch's own do, and meet rules call by call."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.networks.graph.call_sites import Call, CallSites, UnsupportedError, named
from pipeline.networks.graph.taken_apart import (
    NORMS,
    SOFTMAXES,
    multi_head_attention_forward,
    norm_of,
    normalisation_of,
    over_keys,
    scaled_dot_product_attention,
    softmax_of,
)

GENERATOR = torch.Generator().manual_seed(0)
SITES = CallSites(nn.Identity())


def drawn(*shape):
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def close(found, wanted):
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= 1e-12 * wanted.abs().max()


FUSED = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3},
    "masked": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "biased": {"attn_mask": drawn(2, 1, 5, 5)},
}


@pytest.mark.parametrize("case", FUSED)
def test_fused_attention(case):
    query, key, value = drawn(2, 4, 5, 3), drawn(2, 4, 5, 3), drawn(2, 4, 5, 6)
    found = scaled_dot_product_attention(SITES, over_keys, query, key, value, **FUSED[case])
    close(found, F.scaled_dot_product_attention(query, key, value, **FUSED[case]))


def test_grouped_queries():
    query, key, value = drawn(2, 4, 5, 3), drawn(2, 2, 7, 3), drawn(2, 2, 7, 3)
    found = scaled_dot_product_attention(SITES, over_keys, query, key, value, enable_gqa=True)
    close(found, F.scaled_dot_product_attention(query, key, value, enable_gqa=True))


class Seen(CallSites):
    """Take attention apart, and keep the shapes that softmax meets."""

    method = "seen"
    strict = False

    def __init__(self, network):
        super().__init__(network)
        self.shapes = []

    def rule(self, call):
        if call.name == "multi_head_attention_forward":
            with self:
                return multi_head_attention_forward(self, *call.args, **call.kwargs)
        if call.name == "softmax":
            self.shapes.append(tuple(softmax_of(call).x.shape))
        return NotImplemented


OPTIONS = {
    "batch first": {"batch_first": True},
    "batch second": {},
    "without biases": {"bias": False},
    "other keys": {"kdim": 5, "vdim": 7},
}
CALLS = {
    "with weights": {},
    "without": {"need_weights": False},
    "by head": {"average_attn_weights": False},
    "causal": {"attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1), "is_causal": True},
    "added": {"attn_mask": drawn(6, 6)},
    "by image and head": {"attn_mask": drawn(3 * 2, 6, 6)},
    "padded": {"key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [5]])},
    "padded and masked": {
        "key_padding_mask": torch.arange(6) >= torch.tensor([[6], [4], [5]]),
        "attn_mask": torch.ones(6, 6, dtype=torch.bool).triu(1),
    },
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", CALLS)
def test_multi_head_attention_has_the_images_first(options, case):
    torch.manual_seed(0)
    own = OPTIONS[options]
    module = nn.MultiheadAttention(8, 2, **own).double().eval()
    shape = (3, 6) if own.get("batch_first") else (6, 3)
    query = drawn(*shape, 8).requires_grad_()
    key = value = query
    if "kdim" in own:
        key, value = drawn(*shape, 5), drawn(*shape, 7)
    wanted, weights = module(query, key, value, **CALLS[case])
    sites = Seen(module)
    with sites:
        found, shown = module(query, key, value, **CALLS[case])
    close(found, wanted)
    assert (weights is None) == (shown is None)
    if weights is not None:
        close(shown, weights)
    assert sites.shapes == [(3, 2, 6, 6)]


def test_attention_without_a_batch():
    module = nn.MultiheadAttention(8, 2).double().eval()
    x = drawn(6, 8).requires_grad_()
    wanted, weights = module(x, x, x)
    with Seen(module):
        found, shown = module(x, x, x)
    close(found, wanted), close(shown, weights)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_keys_of_its_own_are_refused(options):
    module = nn.MultiheadAttention(8, 2, **options).double().eval()
    x = drawn(6, 3, 8).requires_grad_()
    with (
        pytest.raises(UnsupportedError, match=r"'multi_head_attention_forward' in module .* with keys or values"),
        Seen(module),
    ):
        module(x, x, x)


def called(function, *args, **kwargs):
    return Call(named(function)[0], function, args, kwargs)


SOFTMAX = {
    "functional": called(F.softmax, drawn(2, 3, 4), -1),
    "by name": called(F.softmax, input=drawn(2, 3, 4), dim=1),
    "method": called(torch.Tensor.softmax, drawn(2, 3, 4), 1),
    "in another type": called(torch.softmax, drawn(2, 3), 1, torch.float32),
    "in another type by name": called(F.softmax, drawn(2, 3), -1, dtype=torch.float32),
    "logarithm": called(F.log_softmax, drawn(2, 3), -1),
}


@pytest.mark.parametrize("case", SOFTMAX)
def test_softmax(case):
    call = SOFTMAX[case]
    assert call.name in SOFTMAXES
    read = softmax_of(call)
    function = torch.log_softmax if call.name == "log_softmax" else torch.softmax
    torch.testing.assert_close(function(read.x, read.dim, dtype=read.dtype), call.run())


W, B = drawn(6), drawn(6)
NORM = {
    "layer norm": called(F.layer_norm, drawn(2, 5, 6), (6,), W, B),
    "layer norm of two": called(F.layer_norm, drawn(2, 5, 6), normalized_shape=(5, 6), eps=1e-2),
    "torch's layer norm": called(torch.layer_norm, drawn(2, 6), (6,), W),
    "rms norm": called(F.rms_norm, drawn(2, 5, 6), (6,), W),
    "rms norm with eps": called(torch.rms_norm, drawn(2, 5, 6), (6,), None, 0.1),
    "group norm": called(F.group_norm, drawn(2, 6, 3, 2), 3, W, B, 1e-3),
    "torch's group norm": called(torch.group_norm, drawn(2, 6, 3), num_groups=2),
    "instance norm": called(F.instance_norm, drawn(2, 6, 3, 2), weight=W, bias=B),
    "torch's instance norm": called(
        torch.instance_norm, drawn(2, 6, 3, 2), W, B, None, None, True, 0.1, 1e-4, False
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NORM)
def test_norms(case):
    call = NORM[case]
    assert call.name in NORMS
    close(norm_of(SITES, call).taken_apart(), call.run())


BATCH_NORM = {
    "functional": called(F.batch_norm, drawn(2, 6, 3), B, W.square(), W, B, False, 0.1, 1e-3),
    "by name": called(F.batch_norm, drawn(2, 6), running_mean=B, running_var=W.square(), eps=0.1),
    "torch's": called(torch.batch_norm, drawn(2, 6, 3), W, B, B, W.square(), False, 0.1, 1e-4, False),
}


@pytest.mark.parametrize("case", BATCH_NORM)
def test_batch_norm_is_a_scale_and_a_shift(case):
    call = BATCH_NORM[case]
    x, scale, shift = (
        each if at == 0 else each.view(-1, *(1,) * (call.args[0].ndim - 2))
        for at, each in enumerate(normalisation_of(call))
    )
    close(x * scale + shift, call.run())
