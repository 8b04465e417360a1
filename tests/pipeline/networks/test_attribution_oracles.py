"""Captum on stock networks, where it is right: gradients, rectified backwards, and Grad-CAM of convolutional ones."""

import pytest
import torch
from stock_networks import stock
from torch import nn

from pipeline import attribute

captum = pytest.importorskip("captum.attr", reason="captum is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def tame(name):
    """A network with rectifiers that write nothing in place: captum hooks modules."""
    network = stock(name, torch.float64)
    for module in network.modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return network


def images(size=64):
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1)).double()


def agree(found, wanted, tolerance=1e-6):
    assert (found - wanted.detach()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v2", "vit_b_16"])
def test_gradients(name):
    network, x, classes = tame(name), images(), torch.tensor([3, 5])
    agree(attribute.saliency(network, x, classes).map, captum.Saliency(network).attribute(x, classes).amax(1))
    agree(
        attribute.gradient_x_input(network, x, classes).values,
        captum.InputXGradient(network).attribute(x.clone().requires_grad_(), classes),
    )
    wanted = captum.IntegratedGradients(network).attribute(x, 0 * x, classes, n_steps=8, method="gausslegendre")
    agree(attribute.integrated_gradients(network, x, classes, steps=8, max_steps=8).values, wanted)


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg11_bn"])
def test_rectified_backwards(name):
    network, x, classes = tame(name), images(), torch.tensor([3, 5])
    given = x.clone().requires_grad_()
    agree(
        attribute.guided_backprop(network, x, classes).values, captum.GuidedBackprop(network).attribute(given, classes)
    )
    agree(attribute.deconvnet(network, x, classes).values, captum.Deconvolution(network).attribute(given, classes))


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("squeezenet1_1", "features.11")])
def test_grad_cam(name, layer):
    network, x, classes = tame(name), images(), torch.tensor([3, 5])
    wanted = captum.LayerGradCam(network, network.get_submodule(layer)).attribute(x.requires_grad_(), classes)
    agree(attribute.grad_cam(network, x.detach(), classes, layer=layer).map, wanted[:, 0])


def test_occlusion_of_windows_that_tile():
    network, x, classes = tame("squeezenet1_1"), images(), torch.tensor([3, 5])
    wanted = captum.Occlusion(network).attribute(x, (3, 16, 16), (3, 16, 16), baselines=0, target=classes)
    agree(attribute.occlusion(network, x, classes, window=16, stride=16).map, wanted[:, 0])
