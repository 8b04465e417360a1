"""Small networks for the embedded scenes, to be named in a config as `module: config/networks/scenes.py:cnn`."""

from collections import OrderedDict

from torch import nn


def cnn(num_classes: int = 12) -> nn.Module:
    """Six convolutions and a narrow last layer: (batch, 3, y, x) -> (batch, num_classes).

    Maps of conv1 and conv2 have half the input's side, those of conv3 to conv6 a quarter. The last layer has 64 units
    only, so that single units have to mean something.
    """
    blocks = OrderedDict(
        conv1=_block(3, 32, stride=2),
        conv2=_block(32, 32),
        pool2=nn.MaxPool2d(2),
        conv3=_block(32, 64),
        conv4=_block(64, 64),
        conv5=_block(64, 64),
        conv6=_block(64, 64),
    )
    return nn.Sequential(
        OrderedDict(
            features=nn.Sequential(blocks),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            head=nn.Linear(64, num_classes),
        )
    )


def vit(num_classes: int = 12, image_size: int = 64) -> nn.Module:
    """A vision transformer of four blocks, width 128, on patches of 8 x 8 pixels and a class token."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=image_size,
        patch_size=8,
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=256,
        num_classes=num_classes,
    )


def _block(channels: int, units: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, units, 3, stride, padding=1, bias=False), nn.BatchNorm2d(units), nn.ReLU())
