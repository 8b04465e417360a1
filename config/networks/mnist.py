"""Small networks for grey digits, to be named in a config as `module: config/networks/mnist.py:vit`.

They take one channel: give one number each as `preprocessing: {mean: [...], std: [...]}`.
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional


def lenet5(classes: int = 10) -> nn.Module:
    """LeNet-5 (LeCun et al. 1998, figure 2) with ReLU and maximum pooling: (batch, 1, 32, 32) -> (batch, classes)."""
    return nn.Sequential(
        OrderedDict(
            convnet=nn.Sequential(
                OrderedDict(
                    c1=nn.Conv2d(1, 6, 5),
                    relu1=nn.ReLU(),
                    s2=nn.MaxPool2d(2),
                    c3=nn.Conv2d(6, 16, 5),
                    relu3=nn.ReLU(),
                    s4=nn.MaxPool2d(2),
                    c5=nn.Conv2d(16, 120, 5),
                    relu5=nn.ReLU(),
                )
            ),
            flatten=nn.Flatten(),
            fc=nn.Sequential(OrderedDict(f6=nn.Linear(120, 84), relu6=nn.ReLU(), f7=nn.Linear(84, classes))),
        )
    )


def vit(classes: int = 10) -> nn.Module:
    """A vision transformer of six blocks, width 64, on patches of 4 x 4: (batch, 1, 28, 28) -> (batch, classes)."""
    return Vit(image_size=28, patch=4, width=64, depth=6, heads=4, head_width=64, hidden=128, classes=classes)


class Vit(nn.Module):
    """A transformer with norms before attention and MLP, no bias of queries, keys and values, and a class token."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        head_width: int,
        hidden: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.randn(1, (image_size // patch) ** 2 + 1, width))
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.to_patch_embedding = nn.Sequential(Patches(patch), nn.Linear(patch * patch, width))
        blocks = [Block(width, heads, head_width, hidden) for _ in range(depth)]
        self.transformer = nn.ModuleDict({"layers": nn.ModuleList(blocks)})
        self.mlp_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.to_patch_embedding(images)
        tokens = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], dim=1) + self.pos_embedding
        for block in self.transformer["layers"]:
            tokens = block(tokens)
        return self.mlp_head(tokens[:, 0])


class Patches(nn.Module):
    """(batch, channel, y, x) -> (batch, patch, pixel of the patch)."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return functional.unfold(images, self.side, stride=self.side).transpose(1, 2)


class Block(nn.ModuleList):
    """Attention and MLP, each added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, hidden: int) -> None:
        mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(0.0), nn.Linear(hidden, width))
        branches = [Branch(width, Attention(width, heads, head_width)), Branch(width, nn.ModuleDict({"net": mlp}))]
        super().__init__(branches)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        for branch in self:
            tokens = tokens + branch(tokens)
        return tokens


class Branch(nn.Module):
    """A norm, then attention or an MLP."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fn = inner

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.norm(tokens)
        return self.fn["net"](normed) if isinstance(self.fn, nn.ModuleDict) else self.fn(normed)


class Attention(nn.Module):
    """Softmax attention of several heads."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(width, 3 * heads * head_width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * head_width, width), nn.Dropout(0.0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = self.to_qkv(tokens).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = functional.scaled_dot_product_attention(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))
