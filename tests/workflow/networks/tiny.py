"""Networks of a few hundred weights, built without torchvision: its import costs more than everything they do."""

import torch
from torch import nn


def tiny(classes: int = 3) -> nn.Module:
    """Two convolutions and a head: (batch, 3, y, x) -> (batch, classes).

    The head is drawn last, so at one seed networks with another number of classes have the same convolutions.
    """
    features = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, 2, 1), nn.ReLU())
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, classes))


def brightest_is_one(classes: int = 3) -> nn.Module:
    """`tiny` behind a layer that divides an image by its largest value: for a black one that is 0 / 0."""
    return nn.Sequential(Brightest(), tiny(classes))


class Brightest(nn.Module):
    """Images in [0, 1], each scaled so that its largest value is 1."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images / images.amax(dim=(1, 2, 3), keepdim=True)
