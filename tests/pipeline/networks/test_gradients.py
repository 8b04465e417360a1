"""Gradients of any scalar of a forward, with respect to inputs and layers."""

import pytest
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, Scalar, Unit, gradients, padded, relative, scores


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
