"""The networks of "Striving for simplicity" by their layer table, and p-norm pooling as a module of them."""

from pathlib import Path

import pytest
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import build

FILE = Path(__file__).parents[3] / "config/networks/allcnn.py"
COUNTS = {
    ("plain", "a"): 839_242,
    ("plain", "b"): 885_610,
    ("plain", "c"): 954_730,
    ("strided", "a"): 839_242,
    ("strided", "b"): 885_610,
    ("strided", "c"): 954_730,
    ("conv_pool", "a"): 1_254_250,
    ("conv_pool", "b"): 1_300_618,
    ("conv_pool", "c"): 1_369_738,
    ("all_cnn", "a"): 1_254_250,
    ("all_cnn", "b"): 1_300_618,
    ("all_cnn", "c"): 1_369_738,
}


def network(kind, **arguments):
    return build(NetworkSpec(module=f"{FILE}:{kind}", arguments=arguments))


@pytest.mark.parametrize(("kind", "model"), COUNTS)
def test_parameters_and_shapes(kind, model):
    """Maps of 16 x 16 and 8 x 8 after the two reductions, 6 x 6 before the mean, as in the paper's tables."""
    net = network(kind, model=model)
    assert sum(each.numel() for each in net.parameters()) == COUNTS[kind, model]
    sizes = {}
    for name, module in net.features.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: sizes.update({name: tuple(out.shape[1:])}))
    with torch.no_grad():
        assert net(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert sizes["dropout1"] == (96, 16, 16) and sizes["dropout2"] == (192, 8, 8)
    assert [size for name, size in sizes.items() if name.startswith("conv")][-3:] == [
        (192, 6, 6),
        (192, 6, 6),
        (10, 6, 6),
    ]


def test_a_variant_without_pooling_has_none():
    for kind in ("strided", "all_cnn"):
        assert not any(isinstance(each, torch.nn.MaxPool2d) for each in network(kind).modules())
    with_one = [sum(isinstance(m, torch.nn.MaxPool2d) for m in network(k).modules()) for k in ("plain", "conv_pool")]
    assert with_one == [2, 2]


@pytest.mark.parametrize("pooling", [1, 2, "learnt"])
def test_p_norm_pooling_in_a_network(pooling):
    net = network("plain", pooling=pooling)
    pools = [each for each in net.modules() if type(each).__name__ == "PNormPool"]
    assert len(pools) == 2
    images = torch.rand(1, 3, 32, 32)
    loss = net(images).square().sum()
    loss.backward()
    if pooling == "learnt":
        assert float(pools[0].p.detach()) == pytest.approx(2)
        assert all(float(each.above_one.grad) != 0 for each in pools)
    else:
        assert pools[0].p == pooling and not list(pools[0].parameters())


def test_an_unknown_model_is_refused():
    with pytest.raises(Exception, match="model 'd'"):
        network("plain", model="d")
