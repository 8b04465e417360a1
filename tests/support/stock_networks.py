"""Networks of torchvision, timm and transformers with random weights, for the laws and the oracles of attribution."""

from functools import partial

import pytest
import torch
from torch import nn

SIZE = 64
CLASSES = 10


class Logits(nn.Module):
    """A network of transformers that gives its logits."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x).logits


def _torchvision(name, **options):
    return pytest.importorskip("torchvision.models").get_model(name, num_classes=CLASSES, **options)


def _vgg(name):
    """VGG with 256 units in the two hidden layers of its classifier, of 4,096: they hold nine tenths of the weights."""
    network = _torchvision(name)
    wide = [nn.Linear(25088, 256), nn.Linear(256, 256), nn.Linear(256, CLASSES)]
    relu, drop = nn.ReLU(inplace=True), nn.Dropout()
    network.classifier = nn.Sequential(wide[0], relu, drop, wide[1], relu, drop, wide[2])
    return network


def _vit():
    """The twelve layers and heads of ViT-B/16, an eighth as wide."""
    models = pytest.importorskip("torchvision.models")
    return models.VisionTransformer(
        image_size=SIZE, patch_size=16, num_layers=12, num_heads=12, hidden_dim=96, mlp_dim=192, num_classes=CLASSES
    )


def _timm(name):
    return pytest.importorskip("timm").create_model(name, pretrained=False, num_classes=CLASSES, img_size=SIZE)


def _transformers(kind, attention, **options):
    library = pytest.importorskip("transformers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": SIZE, "patch_size": 16}
    config = getattr(library, f"{kind}Config")(num_labels=CLASSES, **sizes, **options)
    config._attn_implementation = attention
    return Logits(getattr(library, f"{kind}ForImageClassification")(config))


CNNS = {
    "vgg16_bn": partial(_vgg, "vgg16_bn"),
    "resnet18": partial(_torchvision, "resnet18"),
    "resnet50": partial(_torchvision, "resnet50"),
    "densenet121": partial(_torchvision, "densenet121"),
    "googlenet": partial(_torchvision, "googlenet", aux_logits=False, init_weights=False),
    "mobilenet_v3_small": partial(_torchvision, "mobilenet_v3_small"),
    "efficientnet_b0": partial(_torchvision, "efficientnet_b0"),
}
NETWORKS = CNNS | {
    "convnext_tiny": partial(_torchvision, "convnext_tiny"),
    "swin_t": partial(_torchvision, "swin_t"),
    "vit_b_16": _vit,
    "deit of timm": partial(_timm, "deit_tiny_distilled_patch16_224"),
    "vit of transformers": partial(_transformers, "ViT", "sdpa", intermediate_size=96),
    "eager vit of transformers": partial(_transformers, "ViT", "eager", intermediate_size=96),
    "dinov2 of transformers": partial(_transformers, "Dinov2", "sdpa", mlp_ratio=2),
    "eager dinov2 of transformers": partial(_transformers, "Dinov2", "eager", mlp_ratio=2),
}
OTHERS = {
    "squeezenet1_1": partial(_torchvision, "squeezenet1_1"),
    "vgg11_bn": partial(_vgg, "vgg11_bn"),
    "mobilenet_v2": partial(_torchvision, "mobilenet_v2"),
}


def stock(name, dtype):
    """A network of random weights, whose norms and scales do something, and which tells images apart."""
    torch.manual_seed(0)
    network = (NETWORKS | OTHERS)[name]().eval()
    drawn = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.2, 0.2),
            ):
                values.copy_(low + (high - low) * torch.rand(values.shape, generator=drawn))
        elif isinstance(module, nn.Linear | nn.Conv2d) and module.bias is not None:
            module.bias.data.copy_(0.05 * torch.randn(module.bias.shape, generator=drawn))
    for key, values in network.named_parameters():
        if any(part in key for part in ("layer_scale", "gamma", "lambda1", "norm")) and values.ndim < 4:
            values.data.add_(0.1 * torch.randn(values.shape, generator=drawn))
        elif values.ndim == 2 and len(values) == CLASSES and not values.any():
            values.data.normal_(std=0.2)
    return network.to(dtype)
