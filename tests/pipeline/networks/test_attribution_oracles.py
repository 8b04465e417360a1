"""Captum on stock networks, where it is right: gradients, rectified backwards, and Grad-CAM of convolutional ones."""

import pytest
import torch
from torch import nn

from pipeline import attribute

captum = pytest.importorskip("captum.attr", reason="captum is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")


def stock(name):
    """A network with rectifiers that write nothing in place: captum hooks modules."""
    import torchvision

    torch.manual_seed(0)
    network = torchvision.models.get_model(name, num_classes=10).double().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5), nn.init.normal_(module.running_mean, std=0.1)
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.inplace = False
    return network


def images(size=64):
    return torch.randn((2, 3, size, size), generator=torch.Generator().manual_seed(1)).double()


def agree(found, wanted, tolerance=1e-6):
    assert (found - wanted.detach()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "vgg11_bn", "mobilenet_v2", "vit"])
def test_gradients(name):
    if name == "vit":
        import torchvision

        torch.manual_seed(0)
        network = torchvision.models.VisionTransformer(64, 16, 2, 2, 16, 32, num_classes=10).double().eval()
        nn.init.normal_(network.heads.head.weight)
    else:
        network = stock(name)
    x, classes = images(), torch.tensor([3, 5])
    agree(attribute.saliency(network, x, classes).map, captum.Saliency(network).attribute(x, classes).amax(1))
    agree(
        attribute.gradient_x_input(network, x, classes).values,
        captum.InputXGradient(network).attribute(x.clone().requires_grad_(), classes),
    )
    wanted = captum.IntegratedGradients(network).attribute(x, 0 * x, classes, n_steps=8, method="gausslegendre")
    agree(attribute.integrated_gradients(network, x, classes, steps=8, max_steps=8).values, wanted)


@pytest.mark.parametrize("name", ["squeezenet1_1", "vgg11_bn"])
def test_rectified_backwards(name):
    network, x, classes = stock(name), images(), torch.tensor([3, 5])
    given = x.clone().requires_grad_()
    agree(
        attribute.guided_backprop(network, x, classes).values, captum.GuidedBackprop(network).attribute(given, classes)
    )
    agree(attribute.deconvnet(network, x, classes).values, captum.Deconvolution(network).attribute(given, classes))


@pytest.mark.parametrize(("name", "layer"), [("resnet18", "layer4"), ("squeezenet1_1", "features.11")])
def test_grad_cam(name, layer):
    network, x, classes = stock(name), images(), torch.tensor([3, 5])
    wanted = captum.LayerGradCam(network, network.get_submodule(layer)).attribute(x.requires_grad_(), classes)
    agree(attribute.grad_cam(network, x.detach(), classes, layer=layer).map, wanted[:, 0])


def test_occlusion_of_windows_that_tile():
    network, x, classes = stock("squeezenet1_1"), images(), torch.tensor([3, 5])
    wanted = captum.Occlusion(network).attribute(x, (3, 16, 16), (3, 16, 16), baselines=0, target=classes)
    agree(attribute.occlusion(network, x, classes, window=16, stride=16).map, wanted[:, 0])
