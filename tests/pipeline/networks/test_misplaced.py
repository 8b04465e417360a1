"""Layers that only `similarity` and `sight` read, with positions elsewhere: measured where they do not matter."""

import pytest
import torch

from pipeline.config.networks import Network, NetworkSpec
from pipeline.networks.build import build
from pipeline.networks.checkpoint import sha256, write_safetensors
from pipeline.networks.forward import Model
from pipeline.networks.inspection import inspect
from pipeline.networks.layer import Inspection
from pipeline.stages.grams.tasks import prepare_layers, unreadable
from pipeline.stages.sight import tasks

NETWORK = """
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + self.proj((q @ k.mT).softmax(-1) @ v)


class Net(nn.Module):
    '''Tokens of 8 x 8 patches, in order or window after window or learned queries; special ones in the middle.'''

    def __init__(self, kind):
        super().__init__()
        self.kind, side = kind, torch.arange(64).view(2, 4, 2, 4)
        self.embed, self.turned = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(3, 8, 4, 4)
        self.tokens = nn.Identity()
        self.queries = nn.Parameter(torch.randn(64, 8))
        self.look = nn.MultiheadAttention(8, 2, batch_first=True)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(8, 1 if kind == "one" else 4)
        self.order = side.permute(0, 2, 1, 3).flatten() if kind == "windows" else torch.arange(64)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)[:, self.order]
        if self.kind == "queries":
            x = self.queries + self.look(self.queries.expand(len(x), -1, -1), x, x)[0]
        if self.kind == "between":
            x = torch.cat([x[:, :24], x.mean(1, keepdim=True), x[:, 24:]], 1)
        x = self.tokens(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Flipped(nn.Module):
    '''A map of 8 units at 8 x 8 positions, of the image upside down.'''

    def __init__(self):
        super().__init__()
        self.stem, self.embed, self.out = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 4, 4), nn.Identity()

    def forward(self, images):
        self.stem(images)
        return self.out(self.embed(images.flip(2))).mean((2, 3))


def net(kind):
    return Flipped() if kind == "flipped" else Net(kind)
"""
NAMED = {"windows": "blocks.0", "queries": "blocks.0", "between": "blocks.0", "flipped": "out", "rows": "blocks.0"}
REASON = {
    "windows": "not in row order",
    "queries": "change",  # everywhere alike, or most at one query each
    "between": "stand between the patches",
    "flipped": "not in row order",
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    return tmp_path / "nets.py"


def model(file, kind):
    described = {"module": f"{file}:net", "arguments": {"kind": kind}, "weights": "random", "seed": 1}
    spec = Network.model_validate(described)
    weights = file.parent / f"{kind}.safetensors"
    write_safetensors(weights, build(spec).state_dict())
    return Model(kind, spec.model_dump_json(), weights, sha256(weights), "")


@pytest.mark.parametrize(
    ("kind", "lost"),
    [
        ("windows", []),  # no order matters to the mean of tokens
        ("queries", []),
        ("between", ["class_token", "spatial", "pooled"]),
        ("flipped", ["pooled"]),  # units may be first or last
    ],
)
def test_features_of_positions_elsewhere_are_refused(file, kind, lost):
    prepared = prepare_layers(model(file, kind), (32, 32), [NAMED[kind]], 1)
    (each,) = prepared.misplaced
    assert REASON[kind] in each.reason and list(unreadable([each], ["whole"])) == []
    said = list(unreadable([each], ["whole", "class_token", "spatial", "pooled"]))
    assert [
        part for one in said for part in ("class_token", "spatial", "pooled") if f"{part}" in one.split(":")[1]
    ] == lost
    spec = NetworkSpec(module=f"{file}:net", arguments={"kind": kind}, seed=1)
    found = inspect(spec, (3, 32, 32), ["stem" if kind == "flipped" else "embed"], compare=[NAMED[kind]])
    assert found.misplaced == [each] and Inspection.read(found.json()) == found


@pytest.mark.parametrize("kind", REASON)
def test_sight_measures_no_position_that_lies_elsewhere(file, kind):
    seen = tasks.prepare_seen(model(file, kind), (32, 32), [NAMED[kind]])
    assert REASON[kind] in seen.absent["receptive_field"] and REASON[kind] in seen.absent["localisation"]
    assert seen.gradient_notes[NAMED[kind]].startswith("it ") and seen.localised is None
    assert seen.attention == [] and (kind == "flipped" or REASON[kind] in seen.absent["attention"])
    assert (REASON[kind] in seen.absent.get("skips", "")) == (kind == "between")


def test_sight_measures_the_layers_whose_positions_are_known(file):
    seen = tasks.prepare_seen(model(file, "windows"), (32, 32), ["embed", "blocks.0"])
    assert seen.localised.name == "embed" and "receptive_field" not in seen.absent
    work = tasks.Work(model(file, "windows"), (32, 32), seen, ("receptive_field",), 2, None, 2)
    found = tasks.measured(work, tasks.network_of(work.model), torch.randn(2, 3, 32, 32))
    assert found["receptive_field"][0].any() and not found["receptive_field"][1].any()


def test_tokens_in_rows_are_measured(file):
    seen = tasks.prepare_seen(model(file, "rows"), (32, 32), ["blocks.0", "blocks.1"])
    assert (len(seen.attention), len(seen.skips), seen.misplaced, seen.absent) == (2, 2, [], {})
    assert seen.localised.name == "blocks.1" and seen.attention_unread == ()


def test_one_logit_is_no_prediction(file):
    """The largest of one logit is always its own: an accuracy would be the share of the first class."""
    seen = tasks.prepare_seen(model(file, "one"), (32, 32), ["embed"])
    assert not seen.logits and tasks.prepare_seen(model(file, "rows"), (32, 32), ["embed"]).logits
    (notice,) = inspect(NetworkSpec(module=f"{file}:net", arguments={"kind": "one"}), (3, 32, 32), classes=2).notices
    assert notice.startswith("it gives one logit") and "no accuracy is taken of it elsewhere" in notice
