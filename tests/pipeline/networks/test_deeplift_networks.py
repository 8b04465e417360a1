"""DeepLIFT of stock networks: contributions add up to the difference of the logits, transformers included."""

import pytest
import torch
from stock_networks import NETWORKS, stock
from torch import nn

from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel
from tests.bench.residuals_table import of_deeplift, rescale

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("reference", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_add_up(name, reference):
    assert of_deeplift(stock(name, torch.float64), rescale, torch.float64, reference) <= 1e-9
    assert of_deeplift(stock(name, torch.float32), rescale, torch.float32, reference) <= 1e-4


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "densenet121", "googlenet"])
def test_contributions_through_shapley_maxima_add_up(name):
    def rules(network, images, _):
        return Rescale(network, images, "shapley")

    assert of_deeplift(stock(name, torch.float64), rules, torch.float64, 1) <= 1e-9


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50"])
def test_parts_add_up_without_max_pooling(name):
    def smooth(network):
        for parent in list(network.modules()):
            for each, child in parent.named_children():
                if isinstance(child, nn.MaxPool2d):
                    setattr(parent, each, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        return network

    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        network = smooth(stock(name, dtype))
        assert of_deeplift(network, RevealCancel, dtype, 1) <= allowed
