"""Every way of replacing units against the plain one: a hook that replaces them, and a whole forward in float64."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline.errors import MicrotomeError
from pipeline.networks.graph.tail import cut, unit_dim
from pipeline.networks.graph.trace import UntraceableError, forward_with, trace
from pipeline.networks.layers import Recorder, resolve, to_maps

SIZE = 32
CLASSES = 5


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(4),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(8 * 9, 12),
        nn.ReLU(inplace=True),
        nn.Dropout(),
        nn.Linear(12, CLASSES),
    )


def resnet():
    from torchvision.models import ResNet
    from torchvision.models.resnet import BasicBlock

    return ResNet(BasicBlock, [1, 1, 1, 2], num_classes=CLASSES)


def bottleneck():
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, groups=4, width_per_group=4)


def mobilenet():
    from torchvision.models import MobileNetV2

    return MobileNetV2(num_classes=CLASSES, width_mult=0.25)


def vit():
    from torchvision.models import VisionTransformer

    network = VisionTransformer(
        image_size=SIZE, patch_size=8, num_layers=3, num_heads=2, hidden_dim=12, mlp_dim=20, num_classes=CLASSES
    )
    nn.init.normal_(network.heads.head.weight)
    return network


def swin():
    from torchvision.models import SwinTransformer

    return SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=CLASSES)


class Residual(nn.Module):
    """Sizes read from tensors, functions for modules, and a ReLU in place on what the skip connection reads."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 6, 3, padding=1, groups=3)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))
        self.head = nn.Linear(6 * 16, CLASSES)

    def forward(self, x):
        x = self.norm(self.first(x))
        out = functional.relu(x, inplace=True)
        out = self.second(out) * self.scale
        out += x
        out = functional.max_pool2d(functional.leaky_relu(out, 0.1), 2)
        return self.head(out.view(out.size(0), -1))


class Branching(nn.Module):
    """Which layers run depends on values: no graph tells it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=8)
        self.a, self.b = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        pooled = x.mean((2, 3))
        return (self.a if float(x.detach().abs().max()) > 1e9 else self.b)(pooled).tanh()


class Pair(nn.Module):
    """A layer that returns a tuple."""

    def __init__(self):
        super().__init__()
        self.both = Both()
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        value, size = self.both(x)
        return {"logits": self.head(value.mean((2, 3)) / size), "size": size}


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=5)

    def forward(self, x):
        x = self.conv(x)
        return x, x.shape[2]


class Lying(nn.Module):
    """A view is written through, behind the graph's back."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, stride=5)
        self.head = nn.Linear(4 * 36, CLASSES)

    def forward(self, x):
        x = self.conv(x)
        flat = x.flatten(1)
        functional.relu(x, inplace=True)
        return self.head(flat)


NETWORKS = [
    (vgg, "3", False),  # before the ReLU
    (vgg, "4", False),  # after it
    (vgg, "0", False),
    (vgg, "8", False),
    (resnet, "layer4", False),
    (resnet, "layer4.1.conv1", False),
    (resnet, "layer4.1.bn2", False),
    (resnet, "layer4.0", False),
    (resnet, "layer3.0.conv2", False),
    (bottleneck, "layer4.0.conv1", False),
    (mobilenet, "features.17", False),
    (mobilenet, "features.17.conv.0", False),
    (mobilenet, "features.18", False),
    (vit, "encoder.layers.encoder_layer_2", False),
    (vit, "encoder.layers.encoder_layer_1", False),
    (vit, "encoder.layers.encoder_layer_2.mlp.0", False),
    (vit, "encoder.layers.encoder_layer_1.ln_2", False),
    (vit, "conv_proj", False),
    (swin, "features.2", False),
    (Residual, "first", False),
    (Residual, "norm", False),
    (Residual, "second", False),
    (Branching, "stem", True),
    (Pair, "both", True),
    (Lying, "conv", True),
]


@pytest.mark.parametrize(
    ("build", "name", "whole", "dtype"),
    # The ResNets are wide, and have no operations that others lack: once is enough.
    [(*each, torch.float32) for each in NETWORKS]
    + [(*each, torch.float64) for each in NETWORKS if each[0] not in (resnet, bottleneck)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_units_and_sets_as_whole_forwards_give_them(build, name, whole, dtype):
    network, images, info = made(build, name, dtype)
    tail = cut(network, info, images[:3])
    assert tail.whole is whole
    output = recorded(network, name, images)
    replaced = output.roll(1, 0) - 0.25
    dim = unit_dim(info)
    twin = copy.deepcopy(network).double()

    def plain(units):
        index = torch.tensor(units, dtype=torch.long)

        def change(value):
            return value.index_copy(dim, index, replaced.double().index_select(dim, index))

        with torch.no_grad():
            return forward_with(twin, name, images.double(), change)

    state = tail.begin(output, replaced, tail.beside(images))
    truth = plain([])
    accuracy = (1e-5 if dtype == torch.float32 else 1e-10) * float(truth.abs().max())
    base = tail.logits(state, 3)
    torch.testing.assert_close(base.double(), truth, rtol=0, atol=accuracy)
    units = sorted({0, 1, tail.units // 2, tail.units - 1})
    found = {unit: base.clone() for unit in units}
    for unit, image, logits in tail.without_units(state, units, 3):
        for u, i, row in zip(unit.tolist(), image.tolist(), logits, strict=True):
            found[u][i] = row
    for unit in units:
        torch.testing.assert_close(found[unit].double(), plain([unit]), rtol=0, atol=accuracy)
    sets = [list(range(tail.units)), list(range(0, tail.units, 2)), [tail.units - 1], []]
    masks = torch.zeros((len(sets), tail.units), dtype=torch.bool)
    for row, chosen in enumerate(sets):
        masks[row, chosen] = True
    found = [base.clone() for _ in sets]
    for chosen, image, logits in tail.without_sets(state, masks, 3):
        for s, i, row in zip(chosen.tolist(), image.tolist(), logits, strict=True):
            found[s][i] = row
    for row, chosen in enumerate(sets):
        torch.testing.assert_close(found[row].double(), plain(chosen), rtol=0, atol=accuracy)
    assert (plain(sets[0]) - truth).abs().max() > 100 * accuracy  # the test can fail


def made(build, name, dtype=torch.float32):
    torch.manual_seed(sum(map(ord, build.__name__)))
    network = build().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    images = torch.randn(5, 3, SIZE, SIZE)
    (info,) = resolve(network, [name], (3, SIZE, SIZE))
    return network.to(dtype), images.to(dtype), info


def recorded(network, name, images):
    with Recorder(network, [name]) as record:
        record(images)
        values = []
        # The recorder keeps float32; here the value itself is wanted.
        handle = network.get_submodule(name).register_forward_hook(
            lambda _, __, output: values.append((output[0] if isinstance(output, tuple) else output).clone())
        )
        with torch.no_grad():
            network(images)
        handle.remove()
    return values[0]


def test_a_unit_that_is_zero_costs_nothing():
    network, images, info = made(vgg, "4")
    output = recorded(network, "4", images)
    output[:, 2] = 0
    output[1:3, 5] = 0
    tail = cut(network, info, images[:3])
    state = tail.begin(output, torch.zeros_like(output))
    assert state.differs.dtype == torch.bool and not state.differs[2].any()
    pairs = [
        (u, i)
        for unit, image, _ in tail.without_units(state, range(8), 100)
        for u, i in zip(unit.tolist(), image.tolist(), strict=True)
    ]
    alive = output.abs().flatten(2).amax(2) > 0
    assert pairs == [(u, i) for u in range(8) for i in range(5) if alive[i, u]]
    assert pairs == [(u, i) for u in range(8) for i in range(5) if state.differs[u, i]]


def test_negative_values_before_a_relu_make_no_difference_either():
    network, images, info = made(vgg, "3")
    tail = cut(network, info, images[:3])
    output = -torch.rand(2, *info.shape)
    output[0, 4] = 1
    differs = tail.begin(output, torch.zeros_like(output)).differs
    assert differs.nonzero().tolist() == [[4, 0]]


def test_only_the_class_token_goes_through_the_last_norm():
    network, images, info = made(vit, "encoder.layers.encoder_layer_2")
    tail = cut(network, info, images[:3])
    assert [tail.traced.shapes[node] for node in tail.rest] == [(2, 12), (2, CLASSES)]
    assert not tail.needs_images
    # All tokens are replaced, the class token among them: the others do not reach the logits from here.
    output = recorded(network, info.name, images)
    changed = output.clone()
    changed[:, 1:] = 0
    assert not tail.begin(output, changed).differs.any()
    _, special = to_maps(output, info)
    assert special is not None and bool(tail.begin(output, torch.zeros_like(output)).differs.all())


def test_what_goes_around_the_layer_is_kept():
    network, images, info = made(resnet, "layer4.1.bn2")
    tail = cut(network, info, images[:3])
    assert tail.needs_images and list(tail.traced.sides.values()) == [1]
    (side,) = tail.beside(images).values()
    torch.testing.assert_close(side, recorded(network, "layer4.0", images))
    assert not tail.rest  # the sum and its ReLU keep units apart, and the head is linear


def test_the_cost_is_that_of_one_channel():
    network, _, info = made(vgg, "4")
    cost = cut(network, info, torch.randn(3, 3, SIZE, SIZE)).cost()
    assert cost.pair_flops == 2 * (9 * 12 + 12 * CLASSES)
    meta = copy.deepcopy(network).to("meta")
    from pipeline.networks.graph.tail import Tail

    assert Tail(trace(meta, "4", torch.zeros(3, 3, SIZE, SIZE, device="meta")), info).cost() == cost
    network, _, info = made(mobilenet, "features.17")
    height, width = info.shape[1:]
    cost = cut(network, info, torch.randn(3, 3, SIZE, SIZE)).cost()
    assert cost.pair_flops == 2 * (1280 * height * width + 1280 * CLASSES)


@pytest.mark.parametrize("pairs", [1, 4, 1000])
def test_any_number_of_pairs_at_once(pairs):
    network, images, info = made(mobilenet, "features.17", torch.float64)
    tail = cut(network, info, images[:3])
    output = recorded(network, info.name, images)
    state = tail.begin(output, torch.zeros_like(output))
    logits = torch.cat([logits for _, _, logits in tail.without_units(state, [3, 4, 9], pairs)])
    whole = torch.cat([logits for _, _, logits in tail.without_units(state, [3, 4, 9], 10**6)])
    torch.testing.assert_close(logits, whole)


class Unused(nn.Module):
    def __init__(self, traceable=True):
        super().__init__()
        self.traceable = traceable
        self.used, self.aside = nn.Conv2d(3, 4, 8), nn.Conv2d(3, 4, 8)

    def forward(self, x):
        self.aside(x)
        if not self.traceable and float(x.sum()) > 1e30:
            return None
        return self.used(x).mean((2, 3))


@pytest.mark.parametrize("traceable", [True, False])
def test_nothing_depends_on_the_layer(traceable):
    network = Unused(traceable).eval()
    (info,) = resolve(network, ["aside"], (3, SIZE, SIZE))
    with pytest.raises(MicrotomeError, match=r"layer 'aside': the network's output does not depend on it"):
        cut(network, info, torch.randn(3, 3, SIZE, SIZE))


def test_a_layer_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(self.conv(x)).mean((2, 3))

    network = Twice().eval()
    with pytest.raises(MicrotomeError, match="called 2 times in one forward"):
        resolve(network, ["conv"], (3, SIZE, SIZE))
    with pytest.raises(MicrotomeError, match="called 2 times in one forward"):
        trace(network, "conv", torch.randn(3, 3, SIZE, SIZE))


def test_a_unit_out_of_range():
    network, images, info = made(vgg, "4")
    tail = cut(network, info, images[:3])
    state = tail.begin(*[recorded(network, "4", images)] * 2)
    for unit in (8, -1):
        with pytest.raises(MicrotomeError, match=f"unit {unit} is not in layer '4', whose units are 0 to 7"):
            list(tail.without_units(state, [0, unit], 10))


def test_training_mode_is_refused():
    network, images, info = made(vgg, "4")
    with pytest.raises(ValueError, match="eval mode"):
        cut(network.train(), info, images)


def test_why_a_network_cannot_be_traced():
    with pytest.raises(UntraceableError, match="Proxy"):
        trace(Branching().eval(), "stem", torch.randn(3, 3, SIZE, SIZE))


def test_no_warning_and_the_network_stays_as_it_was():
    network, images, info = made(resnet, "layer4.1.bn2")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cut(network, info, images[:3])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    assert math.prod(info.shape) == 512


class Gathering(nn.Module):
    """Traceable, but the shape of an intermediate result depends on values: the meta device cannot run it."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images):
        pooled = self.conv(images).mean((2, 3))
        return self.head(pooled[torch.nonzero(pooled[:, 0] == pooled[:, 0]).flatten()])


def test_an_operation_that_the_meta_device_lacks_is_no_crash():
    with torch.device("meta"):
        network = Gathering().eval()
    with pytest.raises(UntraceableError, match="NotImplementedError"):
        trace(network, "conv", torch.zeros((3, 3, 8, 8), device="meta"))
