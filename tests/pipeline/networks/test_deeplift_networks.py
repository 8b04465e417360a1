"""DeepLIFT of stock networks: contributions add up to the difference of the logits, transformers included."""

import pytest
import torch
from stock_networks import NETWORKS, SIZE, stock
from torch import nn

from pipeline.networks.contributions import contributions
from pipeline.networks.gradients import Logit, scores
from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def missed(network, rules, dtype, reference):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, SIZE, SIZE, generator=generator).to(dtype)
    x0 = torch.randn(reference, 3, SIZE, SIZE, generator=generator).to(dtype) * (0.3 if reference == 2 else 0)
    target = Logit(torch.tensor([1, 3]))
    found = contributions(network, x, x0, target, lambda images: rules(network, images, x0))
    difference = found.score.double() - found.reference_score.double()
    score, base = scores(network, x, target).double(), scores(network, x0, target, 2).double()
    rounded = 1e-12 if dtype == torch.float64 else 1e-4
    assert ((score - base - difference).abs() <= rounded * torch.maximum(score.abs(), difference.abs())).all()
    lacking = found.values.double().flatten(1).sum(1) - (score - base)
    return float((lacking.abs() / torch.maximum(score.abs(), (score - base).abs())).max())


@pytest.mark.parametrize("reference", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_contributions_add_up(name, reference):
    def rules(network, images, _):
        return Rescale(network, images)

    assert missed(stock(name, torch.float64), rules, torch.float64, reference) <= 1e-9
    assert missed(stock(name, torch.float32), rules, torch.float32, reference) <= 1e-4


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "densenet121", "googlenet"])
def test_contributions_through_shapley_maxima_add_up(name):
    def rules(network, images, _):
        return Rescale(network, images, "shapley")

    assert missed(stock(name, torch.float64), rules, torch.float64, 1) <= 1e-9


@pytest.mark.parametrize("name", ["vgg16_bn", "resnet18", "resnet50"])
def test_parts_add_up_without_max_pooling(name):
    def smooth(network):
        for parent in list(network.modules()):
            for each, child in parent.named_children():
                if isinstance(child, nn.MaxPool2d):
                    setattr(parent, each, nn.AvgPool2d(child.kernel_size, child.stride, child.padding))
        return network

    for dtype, allowed in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        assert missed(smooth(stock(name, dtype)), RevealCancel, dtype, 1) <= allowed
