"""Gradients of any scalar of a forward, with respect to inputs and layers."""

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, Scalar, Unit, gradients, padded, relative, scores
from pipeline.networks.graph.trace import forward_with


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).double().eval()  # fmt: skip


def images(count=3):
    return torch.randn((count, 3, 8, 8), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_differences(function, x, step=1e-6):
    flat, found = x.flatten(), []
    for at in range(len(flat)):
        ends = []
        for sign in (1, -1):
            moved = flat.clone()
            moved[at] += sign * step
            ends.append(function(moved.view_as(x)))
        found.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(found).view_as(x)


@pytest.mark.parametrize(
    "target",
    [
        Logit(torch.tensor([2])),
        Logit(torch.tensor([2]), torch.tensor([0])),
        Logit(torch.tensor([1]), link="probability"),
        Logit(torch.tensor([1]), link="log_probability"),
        Unit("2", (3, 4, 4)),
        Unit("2", (3,)),
        Scalar(lambda output: (output - 1).square().sum(1)),
    ],
    ids=lambda each: type(each).__name__,
)
def test_the_gradient_is_that_of_differences(target):
    net, x = network(), images(1)
    found = gradients(net, x, target)
    torch.testing.assert_close(
        found.inputs, by_differences(lambda p: scores(net, p, target)[0], x), atol=1e-7, rtol=1e-5
    )
    assert torch.equal(found.score, scores(net, x, target))


def test_layers_get_their_values_before_they_are_overwritten():
    net, x = network(), images()
    wanted = net[0](x)
    for of_inputs in (True, False):
        found = gradients(net, x, Logit(torch.tensor([0, 1, 2])), ["0", "2"], of_inputs)
        value, slope = found.layers["0"]
        assert torch.equal(value, wanted)
        rest = by_differences(lambda h: net[1:](h.relu())[:1, 0][0], value[:1])
        torch.testing.assert_close(slope[:1], rest, atol=1e-7, rtol=1e-5)
        assert (found.inputs is None) == (not of_inputs)


def test_a_target_that_is_chosen_from_the_logits_takes_one_forward():
    net, x, calls = network(), images(), []
    net.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(net, x, lambda logits: Logit(logits.argmax(1)))
    assert calls == [1]
    assert torch.equal(found.score, found.output.amax(1))
    assert torch.equal(found.target.classes, found.output.argmax(1))


def test_a_unit_ends_the_forward_at_its_layer():
    net, x, calls = network(), images(), []
    net[6].register_forward_hook(lambda *_: calls.append(1))
    gradients(net, x, Unit("2", (0,)))
    assert not calls


@pytest.mark.parametrize(
    ("target", "layers", "message"),
    [
        (Logit(torch.tensor([0])), [], "1 classes for 3 images, expected one each"),
        (Unit("9", (0,)), [], "no layer '9'"),
        (Logit(torch.zeros(3, dtype=torch.int64)), ["nine"], "no layer 'nine'"),
        (Scalar(lambda output: output.sum()), [], r"the target gives \(\) for 3 images"),
        (Scalar(lambda output: output[:, 0].detach()), [], "does not depend on the input"),
        (Unit("0", (0,)), ["2"], "layer '2' is not called in this forward"),
    ],
)
def test_what_cannot_be_explained_is_refused(target, layers, message):
    with pytest.raises(MicrotomeError, match=message):
        gradients(network(), images(), target, layers)


def test_a_network_in_training_mode_is_refused():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 2)).double()
    with pytest.raises(MicrotomeError, match=r"module '1' is in training mode: call `eval\(\)` first"):
        gradients(net, images(), Logit(torch.zeros(3, dtype=torch.int64)))
    before = net[1].running_mean.clone()
    with pytest.raises(MicrotomeError, match=r"module '1' is in training mode: call `eval\(\)` first"):
        scores(net, images(), Logit(torch.zeros(3, dtype=torch.int64)))
    assert torch.equal(net[1].running_mean, before) and not net[1].num_batches_tracked


class Ends(nn.Module):
    """A function between a network's layers and its logits."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = network(), function

    def forward(self, x):
        return self.function(self.net(x))


RANDOM = {
    "dropout": lambda x: F.dropout(x),
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "noise": lambda x: x + torch.randn_like(x),
    "a path left out": lambda x: x * torch.empty(len(x), 1, dtype=x.dtype).bernoulli_(0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], dropout_p=0.5)[:, 0],
}


@pytest.mark.parametrize("case", RANDOM)
def test_a_network_that_draws_random_numbers_is_refused(case):
    net, target = Ends(RANDOM[case]).eval(), Logit(torch.zeros(3, dtype=torch.int64))
    for explain in (gradients, scores):
        with pytest.raises(MicrotomeError, match="the network draws random numbers in its forward"):
            explain(net, images(), target)
    gradients(net, images(), Unit("net.2", (0,)), ["net.0"])  # which ends before


def test_dropout_that_drops_nothing_is_no_reason():
    net = Ends(lambda x: F.dropout(F.dropout(x, training=False), 0.0)).eval()
    target = Logit(torch.zeros(3, dtype=torch.int64))
    assert torch.equal(gradients(net, images(), target, ["net.2"]).score, net(images())[:, 0].detach())


Pair = namedtuple("Pair", "x extra")


def model_output(x):
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=x.mean())


FORMS = {
    "tensor": (lambda x: x, lambda y: y),
    "tuple": (lambda x: (x, 1), lambda y: y[0]),
    "list": (lambda x: [None, x], lambda y: y[1]),
    "dict": (lambda x: {"n": 3, "x": x}, lambda y: y["x"]),
    "namedtuple": (lambda x: Pair(x, 1), lambda y: y.x),
    "ModelOutput": (model_output, lambda y: y.last_hidden_state),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_may_return_its_tensor_in_any_form(form):
    given, read = FORMS[form]
    if form == "ModelOutput":
        pytest.importorskip("transformers")

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = Ends(given), nn.Linear(5, 5).double()

        def forward(self, x):
            return self.head(read(self.inner(x)))

    torch.manual_seed(0)
    net, target = Reads().eval(), Logit(torch.zeros(3, dtype=torch.int64))
    value, slope = gradients(net, images(), target, ["inner"]).layers["inner"]
    assert torch.equal(value, net.inner.net(images()))
    torch.testing.assert_close(slope, net.head.weight[:1].expand_as(slope), atol=0, rtol=0)
    with torch.no_grad():
        changed = forward_with(net, "inner", images(), torch.zeros_like)
    assert torch.equal(changed, net.head.bias.expand_as(changed))


@pytest.mark.parametrize("wrong", [5, 7, -1])
def test_a_class_without_a_logit_is_refused(wrong):
    for target in (Logit(torch.tensor([0, wrong, 1])), Logit(torch.tensor([0, 1, 2]), torch.tensor([0, 0, wrong]))):
        with pytest.raises(MicrotomeError, match=f"class {wrong} of a network of 5 logits, expected 0 to 4"):
            scores(network(), images(), target)


def test_parameters_keep_their_gradients_after_an_error():
    net = network()
    net[0].weight.requires_grad_(False)
    with pytest.raises(MicrotomeError):
        gradients(net, images(), Unit("nowhere", (0,)))
    assert [each.requires_grad for each in net.parameters()] == [False, *[True] * 5]
    assert all(not module._forward_hooks for module in net.modules())


def test_rows_are_padded_with_the_last():
    assert padded(torch.tensor([1, 2]), 4).tolist() == [1, 2, 2, 2]
    assert padded(torch.tensor([1, 2]), 2).tolist() == [1, 2]


def test_a_relative_error_without_a_scale_is_nan():
    found = relative(torch.tensor([1.0, 0, 0]), torch.tensor([2.0, 0, 1]), torch.tensor([4.0, 0, 0]))
    assert found[:1].tolist() == [0.25] and found[1].isnan() and found[2] == 0


def test_a_network_that_writes_into_its_input_gets_a_copy():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x.sub_(1.0))

    net, x = Shifts().eval(), images()
    before = x.clone()
    for of_inputs in (True, False):
        found = gradients(net, x, Logit(torch.zeros(3, dtype=torch.int64)), ["net.2"], of_inputs)
        assert torch.equal(x, before)
    assert torch.equal(scores(net, x, found.target), found.score) and torch.equal(x, before)
