"""DeepLIFT of stock networks: contributions add up to the difference of the logits, transformers included."""

import pytest
import torch
from torch import nn

from pipeline.networks.contributions import contributions
from pipeline.networks.gradients import Logit, scores
from pipeline.networks.graph.rescale import Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
SIZE = 64


class Logits(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).logits


def torchvision(name, **options):
    models = pytest.importorskip("torchvision.models")
    return getattr(models, name)(num_classes=10, **options)


def vit():
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=12, num_heads=12, hidden_dim=96, mlp_dim=192, num_classes=10
    )


def timm(name):
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=10, img_size=SIZE)


def transformers(kind, attention, **options):
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIZE, "patch_size": 16}
    config = getattr(library, f"{kind}Config")(num_labels=10, **sizes, **options)
    config._attn_implementation = attention
    return Logits(getattr(library, f"{kind}ForImageClassification")(config))


NETWORKS = {
    "vgg16_bn": lambda: torchvision("vgg16_bn"),
    "resnet18": lambda: torchvision("resnet18"),
    "resnet50": lambda: torchvision("resnet50"),
    "densenet121": lambda: torchvision("densenet121"),
    "googlenet": lambda: torchvision("googlenet", aux_logits=False, init_weights=False),
    "mobilenet_v3_small": lambda: torchvision("mobilenet_v3_small"),
    "efficientnet_b0": lambda: torchvision("efficientnet_b0"),
    "convnext_tiny": lambda: torchvision("convnext_tiny"),
    "swin_t": lambda: torchvision("swin_t"),
    "vit_b_16": vit,
    "deit of timm": lambda: timm("deit_tiny_distilled_patch16_224"),
    "vit of transformers": lambda: transformers("ViT", "sdpa", intermediate_size=96),
    "eager vit of transformers": lambda: transformers("ViT", "eager", intermediate_size=96),
    "dinov2 of transformers": lambda: transformers("Dinov2", "sdpa", mlp_ratio=2),
    "eager dinov2 of transformers": lambda: transformers("Dinov2", "eager", mlp_ratio=2),
}


def stock(name, dtype):
    """A network of random weights, whose norms and scales do something, and which tells images apart."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1), nn.init.uniform_(module.running_var, 0.2, 0.8)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.8, 1.6), nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.05)
    for each, value in network.named_parameters():
        if each.endswith(("layer_scale", "lambda1", "gamma")):
            nn.init.uniform_(value, 0.5, 1.5)
        if each.endswith("weight") and value.ndim == 2 and len(value) == 10:
            nn.init.normal_(value, std=0.2)
    return network.to(dtype)


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
