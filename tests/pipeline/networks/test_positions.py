"""The check of places, on networks whose order is known."""

import pytest
import torch
from pipeline.networks.token_order import check_places
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.layers import resolve

SHAPE = (3, 32, 32)


class Ordered(nn.Module):
    """Patches of 4 x 4 as tokens, in an order of their own; `mix` adds the mean of all tokens to each."""

    def __init__(self, order, mix=0.0):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.tokens = nn.Identity()
        self.order = order
        self.mix = mix

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)[:, self.order]
        return self.tokens(tokens + self.mix * tokens.mean(1, keepdim=True))


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, images):
        return self.conv(images + torch.randn_like(images))


def windows(side, window):
    """Numbers of the positions of a square grid, window after window."""
    grid = torch.arange(side * side).view(side // window, window, side // window, window)
    return grid.permute(0, 2, 1, 3).reshape(-1)


def check(network, layer="tokens"):
    network.eval()
    check_places(network, resolve(network, [layer], SHAPE), SHAPE, "net")


@pytest.mark.parametrize("mix", [0.0, 1.0, 5.0])
def test_rows_pass_and_windows_do_not(mix):
    check(Ordered(torch.arange(64), mix))
    for order in (windows(8, 4), windows(8, 2), torch.arange(63, -1, -1), torch.arange(64).view(8, 8).T.reshape(-1)):
        with pytest.raises(
            MicrotomeError, match=r"layer 'tokens' of net has positions that are not in row order .* 8x8 map"
        ):
            check(Ordered(order, mix))


def test_what_is_spread_out_says_nothing():
    check(Ordered(torch.arange(63, -1, -1), mix=1e4))


@pytest.mark.parametrize("seed", range(40))
def test_narrow_convolutions_pass(seed):
    """Where four channels change most is often two positions from the square."""
    torch.manual_seed(seed)
    check(nn.Sequential(nn.Conv2d(3, 4, 7, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1)), "2")


def test_random_numbers_do_not():
    with pytest.raises(MicrotomeError, match="the forward draws random numbers"):
        check(Noisy(), "conv")
