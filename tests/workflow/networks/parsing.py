"""A segmentation network of two heads and a few weights."""

import torch
from torch import nn


class Parsing(nn.Module):
    """(batch, 3, y, x) -> scores of three things, the first of them background, and of two materials."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 6, 3, 2, 1)
        self.thing = nn.Conv2d(6, 3, 1, bias=False)
        self.material = nn.Conv2d(6, 2, 1, bias=False)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = torch.tanh(4 * self.trunk(images))
        return {"thing": self.thing(features), "material": self.material(features)}
