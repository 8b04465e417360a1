"""The check of positions, on networks whose order is known."""

import pytest
import torch
from torch import nn

from pipeline.config.networks import Reading
from pipeline.errors import MicrotomeError
from pipeline.networks.layers import choose, survey
from pipeline.networks.positions import place

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


class Special(nn.Module):
    """Special tokens before, between (after 24 patches) and after the patches; no convolution shows the grid."""

    def __init__(self, first=0, between=0, last=0, patch=(4, 4)):
        super().__init__()
        self.count = first, between, last
        self.patch = patch
        self.embed = nn.Linear(3 * patch[0] * patch[1], 8)
        self.tokens = nn.Identity()

    def forward(self, images):
        patches = nn.functional.unfold(images, self.patch, stride=self.patch).transpose(1, 2)
        patches = self.embed(patches)
        first, between, last = (patches.mean(1, keepdim=True).expand(-1, count, -1) for count in self.count)
        return self.tokens(torch.cat([first, patches[:, :24], between, patches[:, 24:], last], 1))


class Queries(nn.Module):
    """64 learned queries look at the patches, as in a perceiver or a decoder; `same`: they do not look at all."""

    def __init__(self, same=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4))
        self.queries = nn.Parameter(torch.randn(1, 64, 8))
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2))
        self.same = same

    def forward(self, images):
        patches = self.stem(images).flatten(2).transpose(1, 2)
        tokens = self.queries.expand(len(images), -1, -1)
        tokens = tokens if self.same else tokens + self.look(tokens, patches, patches)[0]
        for block in self.blocks:
            tokens = block(tokens)
        return tokens.mean(1)


class Shaped(nn.Module):
    """A convolution with as many units as positions along a side, given with its units first or last."""

    def __init__(self, layout, before=False, turn=None):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 2, 2)
        self.norm, self.out = nn.LayerNorm(16), nn.Identity()
        self.layout, self.before, self.turn = layout, before, turn

    def forward(self, images):
        x = self.conv(images if self.turn is None else self.turn(images))
        if self.before:  # an output of the other layout and the same shape comes first
            x = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.out(x if self.layout == "map" else x.permute(0, 2, 3, 1))


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.weights = nn.Conv2d(3, 8, 4, 4), nn.Softmax(-1)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.weights(torch.stack([tokens @ tokens.mT, -tokens @ tokens.mT], 1))


def windows(side, window):
    """Numbers of the positions of a square grid, window after window."""
    grid = torch.arange(side * side).view(side // window, window, side // window, window)
    return grid.permute(0, 2, 1, 3).reshape(-1)


def found(network, layers=("tokens",), shape=SHAPE, **told):
    network.eval()
    surveyed = survey(network, shape, Reading(**told))
    wanted = layers if layers == "auto" else list(layers)
    place(network, surveyed, [wanted], shape, "net", lambda: network, every=True)
    return choose(network, surveyed, wanted, "net")


@pytest.mark.parametrize("mix", [0.0, 1.0, 5.0])
def test_rows_pass_and_windows_do_not(mix):
    found(Ordered(torch.arange(64), mix))
    swapped = torch.arange(64) ^ 1  # each one cell from its place
    columns = torch.arange(64).view(8, 8).T.reshape(-1)
    for order in (windows(8, 4), windows(8, 2), torch.arange(63, -1, -1), columns, swapped, torch.arange(64).roll(1)):
        with pytest.raises(
            MicrotomeError, match=r"layer 'tokens' of net has positions that are not in row order .* 8x8 map"
        ):
            found(Ordered(order, mix))


@pytest.mark.parametrize("seed", range(40))
def test_narrow_convolutions_pass(seed):
    """Where four channels change most is often two positions from the square."""
    torch.manual_seed(seed)
    found(nn.Sequential(nn.Conv2d(3, 4, 7, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1)), ["2"])


@pytest.mark.parametrize(("first", "last"), [(1, 0), (0, 1), (5, 0), (0, 5), (1, 4), (0, 0)])
def test_special_tokens_are_found_where_they_stand(first, last):
    (layer,) = found(Special(first, 0, last))
    assert (layer.shape, layer.first, layer.last) == ((8, 8, 8), first, last)
    (told,) = found(Special(first, 0, last), special_tokens={"first": first, "last": last})
    assert told == layer


@pytest.mark.parametrize(("special", "told"), [((0, 0, 1), (1, 0)), ((1, 0, 4), (5, 0)), ((2, 0, 0), (1, 1))])
def test_special_tokens_that_are_told_wrongly_are_refused(special, told):
    with pytest.raises(
        MicrotomeError, match=rf"stand before and after the patches: {special[0]} and {special[2]}\. Correct"
    ):
        found(Special(*special), special_tokens={"first": told[0], "last": told[1]})


@pytest.mark.parametrize("special", [(0, 1, 0), (1, 2, 0), (0, 1, 1)])
def test_special_tokens_between_patches_are_refused(special):
    with pytest.raises(MicrotomeError, match=r"layer 'tokens' of net .* special tokens stand between the patches"):
        found(Special(*special))


@pytest.mark.parametrize("patch", [(2, 4), (8, 4), (4, 2)])
def test_patches_of_any_proportion_have_a_key(patch):
    grid = 32 // patch[0], 32 // patch[1]
    with pytest.raises(MicrotomeError, match=r"grid: \[y, x\]|not in row order"):
        found(Special(1, patch=patch))
    (layer,) = found(Special(1, patch=patch), grid=grid)
    assert (layer.shape, layer.special) == ((8, *grid), 1)
    with pytest.raises(MicrotomeError, match=r"not in row order"):
        found(Special(1, patch=patch), grid=grid[::-1])


@pytest.mark.parametrize("same", [False, True])
def test_queries_are_no_positions(same):
    torch.manual_seed(0)
    network = Queries(same)
    for named in ("blocks.1", "blocks.*"):
        with pytest.raises(MicrotomeError, match=r"layer 'blocks\.\d' of net has 64 tokens that do not change where"):
            found(network, [named])
    assert [layer.name for layer in found(network, "auto")] == ["stem"]
    (told,) = found(network, ["blocks.1"], layout={"blocks.*": "tokens"})
    assert told.shape == (8, 8, 8)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("layout", ["map", "channels_last"])
def test_a_shape_of_two_layouts_is_read_as_it_is(layout, before):
    (layer,) = found(Shaped(layout, before), ["out"])
    assert (layer.shape, layer.layout) == ((16, 16, 16), layout)
    assert found(Shaped(layout, before), ["out"], layout={"out": layout}) == [layer]
    other = {"map": "channels_last", "channels_last": "map"}[layout]
    with pytest.raises(MicrotomeError, match="not in row order"):
        found(Shaped(layout, before), ["out"], layout={"out": other})


@pytest.mark.parametrize(
    "turn", [lambda x: x.flip(3), lambda x: x.flip(2), lambda x: x.rot90(1, (2, 3)), lambda x: x.mT]
)
def test_a_network_that_turns_its_images_is_refused(turn):
    with pytest.raises(MicrotomeError, match=r"layer 'conv' of net .* after a flip or rotation of the image"):
        found(Shaped("map", turn=turn), ["conv"])


@pytest.mark.parametrize("layout", ["map", "channels_last"])
@pytest.mark.parametrize(
    "move", [lambda x: x[..., 16:, 16:].repeat_interleave(2, 2).repeat_interleave(2, 3), lambda x: x.flip(2)]
)
def test_positions_elsewhere_do_not_make_the_other_layout_right(layout, move):
    """Read with units and positions exchanged, changes are spread out, which tells nothing."""
    with pytest.raises(MicrotomeError, match="not in row order"):
        found(Shaped(layout, turn=move), ["out"])


def test_complex_outputs_are_no_layer():
    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.fft2(x)

    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), Spectrum())
    with pytest.raises(MicrotomeError, match="layer '1' of net gives complex numbers, of which only the real parts"):
        found(network, ["1"])


def test_weights_of_attention_are_no_layer():
    with pytest.raises(MicrotomeError, match=r"layer 'weights' of net gives weights of attention"):
        found(Attends(), ["weights"])


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(MicrotomeError, match=r"gives \(64, 8\) for an image, which is not laid out as map"):
        found(Ordered(torch.arange(64)), layout={"tokens": "map"})
