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
    """A vision transformer of three blocks, width 96, on a grid of one token for 8 x 8 pixels and a class token.

    The tokens come from a stem of four convolutions (Xiao et al., "Early convolutions help transformers see better",
    NeurIPS 2021), without which it learns several times as slowly.
    """
    from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer

    return VisionTransformer(
        image_size=image_size,
        patch_size=8,
        num_layers=3,
        num_heads=4,
        hidden_dim=96,
        mlp_dim=192,
        num_classes=num_classes,
        conv_stem_configs=[
            ConvStemConfig(out_channels=24, kernel_size=3, stride=2),
            ConvStemConfig(out_channels=48, kernel_size=3, stride=2),
            ConvStemConfig(out_channels=64, kernel_size=3, stride=1),
            ConvStemConfig(out_channels=96, kernel_size=3, stride=2),
        ],
    )


def _block(channels: int, units: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, units, 3, stride, padding=1, bias=False), nn.BatchNorm2d(units), nn.ReLU())
