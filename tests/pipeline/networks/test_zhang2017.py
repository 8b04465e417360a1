"""The networks of Zhang et al. (2017): exactly the parameters of their table 1."""

import pytest
import torch
from torch import nn

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import build


@pytest.mark.parametrize(
    ("function", "arguments", "parameters"),
    [
        ("inception", {}, 1_649_402),
        ("inception", {"norm": False}, 1_649_402),
        ("alexnet", {}, 1_387_786),
        ("mlp", {"hidden": 3}, 1_735_178),
        ("mlp", {"hidden": 1}, 1_209_866),
    ],
)
def test_parameters(function, arguments, parameters):
    network = build(NetworkSpec(module=f"config/networks/zhang2017.py:{function}", arguments=arguments))
    assert sum(each.numel() for each in network.parameters()) == parameters
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, 28, 28)).shape == (2, 10)
    norms = any(isinstance(each, nn.BatchNorm2d) for each in network.modules())
    assert norms == (function == "inception" and arguments == {})


def test_response_norm():
    norm = build(NetworkSpec(module="config/networks/zhang2017.py:alexnet")).get_submodule("norm1")
    plain = nn.LocalResponseNorm(9, alpha=0.001, beta=0.75, k=1.0)
    x = torch.randn(3, 64, 5, 4) * 40
    torch.testing.assert_close(norm(x), plain(x))
    assert not norm.state_dict()


def test_a_shift_alone_is_a_batch_norm_of_scale_one():
    network = build(NetworkSpec(module="config/networks/zhang2017.py:inception"))
    shift = network.get_submodule("blocks.stem.1")
    plain = nn.BatchNorm2d(96)
    x = torch.randn(4, 96, 5, 5) * 3 + 1
    for mode in (True, False):
        shift.train(mode), plain.train(mode)
        torch.testing.assert_close(shift(x), plain(x))
    torch.testing.assert_close(shift.running_var, plain.running_var)
