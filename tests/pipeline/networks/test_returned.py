"""What a network returns: which tensor is its logits; and kinds of networks that cannot be read."""

import pytest
import torch

from pipeline.config.networks import Network, NetworkSpec, Segmenter
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.graph.trace import forward_with, trace
from pipeline.networks.identity import architecture
from pipeline.networks.inspection import inspect
from pipeline.networks.layers import Recorder
from pipeline.networks.training.repeatable import count_classes

SOURCE = """
from collections import OrderedDict, namedtuple
import torch
from torch import nn

Named = namedtuple("Named", "features logits")

class Net(nn.Module):
    def __init__(self, form, wide=4):
        super().__init__()
        self.form, self.conv = form, nn.Conv2d(3, 6, 3, 2, 1)
        self.embed, self.fc = nn.Linear(6, wide), nn.Linear(wide, 4)
    def forward(self, x):
        maps = self.conv(x)
        e = self.embed(maps.mean((2, 3)))
        z = self.fc(e)
        form = self.form
        if form == "tuple": return e, z
        if form == "list": return [z, e]
        if form == "first": return z, maps
        if form == "maps": return maps, z
        if form == "features": return maps, e
        if form == "mapping": return {"embedding": e, "head": z}
        if form == "logits": return OrderedDict(embedding=e, logits=z)
        if form == "named": return Named(e, z)
        if form == "squeeze": return self.fc(self.embed(nn.functional.adaptive_avg_pool2d(maps, 1).squeeze()))
        if form == "softmax": return z.softmax(1)
        return z

def net(form="plain", wide=4): return Net(form, wide)

def lazy():
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(4))

def half(): return Net("plain").half()
def double(): return Net("plain").double()
class OptimizedModule(nn.Module): pass  # as torch.compile calls what it returns, which takes it seconds
def compiled(): return OptimizedModule()
def scripted(): return torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
def quantised(): return torch.ao.quantization.quantize_dynamic(Net("plain"), {nn.Linear})

class Stays(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
    def train(self, mode=True): return self
    def forward(self, x): return self.conv(x)

class Refuses(Stays):
    def train(self, mode=True): raise NotImplementedError("not supported")

class NoReturn(Stays):
    def train(self, mode=True): nn.Module.train(self, mode)

def stays(): return Stays()
def refuses(): return Refuses()
def inside(): return nn.Sequential(nn.Conv2d(3, 3, 1), Stays())
def no_return(): return NoReturn()
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "nets.py").write_text(SOURCE)
    return lambda function="net", output=None, **arguments: NetworkSpec(
        module=f"{tmp_path}/nets.py:{function}", arguments=arguments, output=output
    )


SIZE = (3, 16, 16)


@pytest.mark.parametrize(
    ("form", "wide", "classes"),
    [("tuple", 4, 4), ("tuple", 7, 4), ("tuple", 7, None), ("list", 4, 4), ("mapping", 7, 4), ("maps", 7, 4)],
)
def test_several_tensors_without_clear_logits_are_refused(spec, form, wide, classes):
    with pytest.raises(MicrotomeError, match=r"returns several tensors for an image, .*`output: "):
        inspect(spec(form=form, wide=wide), SIZE, ["conv"], classes=classes)


@pytest.mark.parametrize(
    ("form", "wide", "classes", "found"),
    [
        ("list", 7, 4, 4),  # the first alone has the width of the classes
        ("first", 7, 4, 4),
        ("first", 7, 12, 4),
        ("logits", 4, 4, 4),
        ("named", 4, 12, 4),
        ("features", 7, 4, None),  # no head
        ("maps", 7, None, None),
        ("plain", 7, 4, 4),
    ],
)
def test_logits_are_found_by_their_name_or_as_the_only_ones(spec, form, wide, classes, found):
    assert inspect(spec(form=form, wide=wide), SIZE, ["conv"], classes=classes).classes == found


@pytest.mark.parametrize(
    ("form", "output"), [("tuple", 1), ("tuple", -1), ("mapping", "head"), ("maps", 1), ("named", 1)]
)
def test_an_output_that_is_named_is_what_every_reader_gets(spec, form, output):
    given = spec(form=form, output=output)
    images = torch.randn(3, *SIZE)
    network, plain = build(given), build(spec(form="plain"))
    expected = plain(images)
    assert inspect(given, SIZE, ["conv"], classes=4).classes == 4
    with torch.no_grad():
        assert torch.equal(network(images), expected)
        with Recorder(network, ["conv"]) as record:
            assert torch.equal(record(images)[0], expected)
        assert torch.equal(forward_with(network, "conv", images, lambda value: value), expected)
    cut = trace(network, "conv", images)
    assert str(cut.output.target) == "fc"
    assert list(network.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("form", "output", "said"),
    [
        ("tuple", 2, "no entry `output: 2`; it returns 0, 1"),
        ("mapping", "logits", "it returns 'embedding', 'head'"),
        ("plain", 0, "returns one tensor, .* leave out `output`"),
    ],
)
def test_an_output_that_is_not_there_is_refused(spec, form, output, said):
    with pytest.raises(MicrotomeError, match=said):
        inspect(spec(form=form, output=output), SIZE, ["conv"])


def test_an_output_that_is_not_set_is_in_no_id(spec):
    plain, chosen = spec(), spec(output=1)
    assert "output" not in plain.model_dump() and chosen.model_dump()["output"] == 1
    assert architecture(plain, str) | {"output": 1} == architecture(chosen, str)
    network = Network(torchvision="resnet18", weights="random", output="logits")
    assert (
        network.model_dump()["output"] == "logits" and "output" not in Network(timm="x", weights="random").model_dump()
    )
    with pytest.raises(ValueError, match="name the outputs of a segmenter under `categories`"):
        Segmenter(
            torchvision="fcn_resnet50", weights="DEFAULT", output="out", categories={"object": {"classes": "a.txt"}}
        )


def test_another_width_than_the_classes_is_told(spec):
    assert inspect(spec(), SIZE, ["conv"], classes=4).notices == []
    (said,) = inspect(spec(), SIZE, ["conv"], classes=12).notices
    assert said.startswith("it gives 4 logits, and the images have 12 classes")


def test_transform_input_is_told_where_a_file_gives_the_weights(tmp_path):
    plain = {"aux_logits": False, "init_weights": False}
    made = build(NetworkSpec(torchvision="googlenet", arguments=plain), device="meta")
    torch.save(
        {key: torch.zeros_like(each, device="cpu") for key, each in made.state_dict().items()}, tmp_path / "w.pt"
    )
    given = {"torchvision": "googlenet", "weights": str(tmp_path / "w.pt")}
    (said,) = inspect(NetworkSpec(**given, arguments=plain), (3, 64, 64), ["conv1"]).notices
    assert "transform_input: true" in said
    for value in (True, False):
        arguments = plain | {"transform_input": value}
        assert inspect(NetworkSpec(**given, arguments=arguments), (3, 64, 64), ["conv1"]).notices == []


def test_what_goes_wrong_with_one_image_is_told(spec):
    found = inspect(spec(form="squeeze"), SIZE, ["conv"], classes=4)
    assert found.alone == "it returns (4,), expected (1, 4)" and "`squeeze()` without a dimension" in found.notices[0]
    assert inspect(spec(), SIZE, ["conv"]).alone == ""


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("lazy", r"lazy has lazy modules: '0\.weight' has no shape"),
        ("scripted", "scripted is scripted .TorchScript."),
        ("compiled", r"compiled is compiled \(torch.compile\): return the module that was compiled"),
        ("quantised", "quantised is quantised: 'embed' holds integers"),
        ("half", r"its weights are float16, and images are float32: call `\.float\(\)`"),
        ("double", r"its weights are float64, and images are float32"),
        ("stays", "stays in training mode after `eval\\(\\)`: module '.the whole.'"),
        ("inside", "inside stays in training mode after `eval\\(\\)`: module '1'"),
        ("refuses", "refuses refuses `eval\\(\\)`: NotImplementedError: not supported"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_kinds_of_networks_are_refused_with_advice(spec, function, said):
    with pytest.raises(MicrotomeError, match=said):
        inspect(spec(function), SIZE, ["conv"])


def test_an_eval_that_returns_nothing_is_enough(spec):
    assert not build(spec("no_return")).training


def test_training_on_probabilities_is_refused(spec):
    images = torch.randn(2, *SIZE)
    assert count_classes(build(spec()), images) == 4
    with pytest.raises(MicrotomeError, match=r"gives probabilities .* leave out its last softmax"):
        count_classes(build(spec(form="softmax")), images)
