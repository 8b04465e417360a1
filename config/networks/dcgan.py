"""DCGANs whose weights others trained (Radford et al., ICLR 2016)."""

from torch import nn


class Digits(nn.Module):
    """z (image, 64, 1, 1) to digits (image, 1, 28, 28) from -1 to 1."""

    def __init__(self, latent: int = 64, width: int = 64) -> None:
        super().__init__()
        self.gen = nn.Sequential(
            up(latent, 4 * width, 3, 2),
            up(4 * width, 2 * width, 4, 1),
            up(2 * width, width, 3, 2),
            nn.Sequential(nn.ConvTranspose2d(width, 1, 4, 2), nn.Tanh()),
        )

    def forward(self, z):
        return self.gen(z)


def up(before: int, after: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(before, after, kernel, stride), nn.BatchNorm2d(after), nn.ReLU())


def digits() -> Digits:
    return Digits()
