"""The generator of scenes: compositions as numbers, and planted units that see one kind of object alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.data.scenes import KINDS, draw_scene
from pipeline.data.scenes.composed import EACH, GRID, SHAPE, composition, kinds_of
from pipeline.networks.build import build
from pipeline.networks.training.decoder import examples, fit

MODULE = Path(__file__).parents[3] / "config/networks/scene_decoder.py"
UNITS = 6


def decoder(planted):
    return build(NetworkSpec(module=f"{MODULE}:decoder", arguments={"planted": planted, "width": 8})).eval()


def test_a_composition_says_where_objects_are():
    scene = draw_scene(0, "train", 3, 48)
    found = composition(scene)
    assert found.shape == SHAPE and found.dtype == np.float32
    for number, thing in enumerate(scene.things, 1):
        at = np.argwhere(scene.instance_map == number)
        if not len(at):
            continue
        (y, x), (bottom, right) = at.min(0), at.max(0) + 1
        row, column = int((y + bottom) / 2 / 4), int((x + right) / 2 / 4)
        kind = EACH * KINDS.index(thing.kind)
        assert found[kind, row, column] == 1
    (empty,) = scene.pictures(np.zeros((1, len(scene.things)), bool))
    assert found[-1, 0, 0] == pytest.approx(empty[2, :4, :4].mean() / 255)


def test_a_composition_without_a_kind_lacks_its_channels_alone():
    drawn = (draw_scene(0, "train", at, 48) for at in range(30))
    scene = next(one for one in drawn if any(thing.kind == "tree" for thing in one.things))
    whole, less = composition(scene), composition(scene, kinds_of("tree"))
    first = EACH * KINDS.index("tree")
    assert whole[first].any() and not less[first : first + EACH].any()
    others = np.delete(np.arange(len(whole)), np.arange(first, first + EACH))
    assert (whole[others] == less[others]).all()


def test_kinds_of_concepts():
    assert kinds_of("tree") == ("tree",)
    assert kinds_of("person") == ("person", "skier")
    assert kinds_of("grass") == ()


def test_planted_units_see_their_kind_alone():
    """Of the other kinds' channels nothing reaches them, and without their kind they give zero before any training."""
    network, random = decoder(True), torch.Generator().manual_seed(0)
    inputs = torch.rand(1, *SHAPE, generator=random)
    kept = {}
    for layer in ("l1", "l2", "l3"):
        network.get_submodule(layer).register_forward_hook(lambda _, __, out, layer=layer: kept.update({layer: out}))
    for kind in (0, 4, len(KINDS) - 1):
        network(inputs)
        whole, less = dict(kept), inputs.clone()
        less[:, EACH * kind : EACH * (kind + 1)] = 0
        network(less)
        for layer, output in kept.items():
            own = slice(UNITS * kind, UNITS * (kind + 1))
            changed = (output != whole[layer]).any(3).any(2)[0]
            assert changed[own].any() and not changed[: own.start].any() and not changed[own.stop :].any()
            assert not output[:, own].any()


def test_removal_of_planted_units_is_the_picture_without_the_kind():
    network, kind = decoder(True).double(), KINDS.index("tree")
    inputs = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    less = inputs.clone()
    less[:, EACH * kind : EACH * (kind + 1)] = 0
    own = slice(UNITS * kind, UNITS * (kind + 1))

    def removed(_, __, output):
        output = output.clone()
        output[:, own] = 0
        return output

    with torch.no_grad():
        wanted, whole = network(less), network(inputs)
        assert (wanted - whole).abs().max() > 1e-6, "before any training objects hardly show"
        for layer in ("l1", "l2", "l3"):
            handle = network.get_submodule(layer).register_forward_hook(removed)
            assert (network(inputs) - wanted).abs().max() < 1e-13
            handle.remove()


@pytest.mark.slow
def test_training_lowers_the_difference():
    given = examples(8, 48)
    assert given.composition.shape == (8, *SHAPE) and GRID == 12
    network, inputs = decoder(True), torch.from_numpy(given.composition.astype(np.float32))

    def difference():
        with torch.no_grad():
            return float((network(inputs) - torch.from_numpy(given.image) / 255).abs().mean())

    before = difference()
    fit(network, given, steps=25, batch=4)
    assert difference() < 0.8 * before
