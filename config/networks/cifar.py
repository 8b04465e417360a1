"""Small networks for 32x32 images, to be named in a config as `module: config/networks/cifar.py:resnet20`."""

import torch
from torch import nn
from torch.nn import functional


def resnet20(classes: int = 10) -> nn.Module:
    """ResNet-20 for CIFAR (He et al. 2016, section 4.2): 6n+2 layers with n = 3."""
    return CifarResNet(blocks=3, classes=classes)


def resnet56(classes: int = 10) -> nn.Module:
    """ResNet-56 for CIFAR: 6n+2 layers with n = 9."""
    return CifarResNet(blocks=9, classes=classes)


def vit(classes: int = 10) -> nn.Module:
    """A four-block vision transformer with patches of 4x4 pixels: 64 tokens and the class token, width 128."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=128, mlp_dim=256, num_classes=classes
    )


class CifarResNet(nn.Module):
    """Three stages of `blocks` residual blocks with 16, 32 and 64 units at strides 1, 2 and 4.

    (batch, 3, 32, 32) -> (batch, classes).
    """

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = functional.relu(self.bn1(self.conv1(images)))
        features = self.layer3(self.layer2(self.layer1(features)))
        return self.linear(features.mean(dim=(2, 3)))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters (option A of the paper).

    Where the block halves the map, the shortcut takes every second position and fills the new units with zeros, half
    of them before the old ones and half after.
    """

    def __init__(self, units_in: int, units: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(units_in, units, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(units)
        self.conv2 = nn.Conv2d(units, units, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(units)
        self.stride = stride
        self.new_units = units - units_in

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        shortcut = features[:, :, :: self.stride, :: self.stride]
        before = self.new_units // 2
        shortcut = functional.pad(shortcut, (0, 0, 0, 0, before, self.new_units - before))
        residual = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(features)))))
        return functional.relu(residual + shortcut)


def _stage(units_in: int, units: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(units_in, units, stride)
    return nn.Sequential(first, *(ResidualBlock(units, units, stride=1) for _ in range(blocks - 1)))
