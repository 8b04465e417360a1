"""Scenes drawn again without some objects: against painting them and taking them back, and what must not change."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.datasets import Npz, Scenes
from pipeline.data import kinds
from pipeline.data.scenes import CLASSES, DEFINING, draw_scene, generate, render
from pipeline.data.scenes.canvas import Canvas, Draw
from pipeline.data.scenes.composition import RULES, STRAYS, paint_scene
from pipeline.errors import MicrotomeError


class TakenBack(Canvas):
    """The slow way: an object is painted, so that all is drawn, and the map is put back to what it was."""

    without = frozenset()

    def __init__(self, size, draw):
        super().__init__(size, draw)
        self.painted = []

    def put(self, painter, x, y, h):
        before = self.map.copy()
        painter(self, x, y, h)
        self.painted.append(self.map != before)
        if len(self.painted) - 1 in self.without:
            self.map[...] = before


def twin(index, size, without, split="validation"):
    """Return a scene, the same without objects (outside what they covered: as it was), and what each object covered."""
    found = []
    for left_out in ((), without):
        canvas = TakenBack(size, Draw(render.key(0, split, index)))
        canvas.without = frozenset(left_out)
        light = paint_scene(canvas, CLASSES[index % len(CLASSES)])
        film = render.film(canvas.surfaces, size, light, canvas.draw)
        found.append(film.exposed(canvas.map.reshape(-1)).reshape(3, size, size))
        if not left_out:
            painted = canvas.painted
    touched = np.logical_or.reduce([painted[k] for k in without])
    return found[0], np.where(touched, found[1], found[0]), painted


@pytest.mark.parametrize("size", [16, 64])
def test_each_object_left_out_against_painting_it_and_taking_it_back(size):
    for index in range(12):
        scene = draw_scene(0, "validation", index, size)
        pictures = scene.pictures(~np.eye(len(scene.things), dtype=bool))
        for k, picture in enumerate(pictures):
            whole, expected, painted = twin(index, size, [k])
            assert np.array_equal(scene.image, whole)
            assert np.array_equal(scene.things[k].painted, painted[k])
            assert np.array_equal(picture, expected), (index, k)


def test_the_empty_stage_against_painting_all_and_taking_it_back():
    for index in range(24):
        scene = draw_scene(0, "validation", index, 64)
        every = range(len(scene.things))
        found = scene.pictures(np.zeros((1, len(every)), bool))[0]
        assert np.array_equal(found, twin(index, 64, list(every))[1])


def check_scenes(start, count, size, split):
    known = generate(0, start, count, size, split, label_map=False, instance_map=True)
    hidden = 0
    for at in range(count):
        scene = draw_scene(0, split, start + at, size)
        assert np.array_equal(scene.image, known.image[at])
        assert np.array_equal(scene.instance_map, known.instance_map[at])
        objects = len(scene.things)
        shown = np.random.default_rng(at).random((6, objects)) < 0.6
        shown = np.concatenate([np.ones((1, objects), bool), shown, ~np.eye(objects, dtype=bool)])
        whole, *others = scene.pictures(shown)
        assert np.array_equal(whole, scene.image)
        for row, picture in zip(shown[1:], others, strict=True):
            left_out = [thing.painted for thing, there in zip(scene.things, row, strict=True) if not there]
            touched = np.logical_or.reduce(left_out, axis=0) if left_out else np.zeros((size, size), bool)
            assert not ((picture != scene.image).any(0) & ~touched).any()
        for k, thing in enumerate(scene.things):
            assert not ((scene.instance_map == k + 1) & ~thing.body).any()
            assert not (thing.body & ~thing.painted).any()
            hidden += np.array_equal(others[k - objects], scene.image)
    assert 0 < hidden < 0.05 * objects * count  # some lie behind others: without them, nothing changes


def test_nothing_changes_outside_what_an_object_and_its_shadow_covered():
    check_scenes(0, 204, 64, "validation")


@pytest.mark.slow
def test_nothing_changes_in_many_scenes():
    check_scenes(5000, 1500, 64, "train")
    check_scenes(0, 120, 224, "validation")


@settings(deadline=None, max_examples=20)
@given(index=st.integers(0, 10**9), size=st.sampled_from([16, 33, 64]), seed=st.integers(0, 1000))
def test_a_picture_depends_on_its_own_objects_alone(index, size, seed):
    """Not on the other pictures of a call, and hiding what is hidden behind others changes no pixel."""
    scene = draw_scene(seed, "train", index, size)
    shown = np.random.default_rng(seed).random((5, len(scene.things))) < 0.5
    together = scene.pictures(shown)
    for row, picture in zip(shown, together, strict=True):
        assert np.array_equal(scene.pictures(row[None])[0], picture)


def test_instance_maps_number_the_objects_from_the_back():
    known = generate(0, 0, 120, 64, label_map=True, instance_map=True)
    objects = list(range(1 + known.instance_map.max()))
    assert len(objects) > 10
    named = {"skier": {"person", "skis"}}
    for at in range(120):
        scene = draw_scene(0, "train", at, 64)
        for k, thing in enumerate(scene.things):
            concepts = known.label_map[at, 0][known.instance_map[at] == k + 1]
            assert {kinds_of_concepts(number) for number in set(concepts.tolist())} <= named.get(
                thing.kind, {thing.kind}
            )
    assert generate(0, 0, 2, 64).instance_map.shape == (0, 64, 64)


def kinds_of_concepts(number):
    from pipeline.data.scenes import CONCEPTS

    return CONCEPTS["object"][number - 1]


def test_the_sky_and_the_ground_are_no_objects():
    known = generate(0, 0, 60, 64, instance_map=True)
    grounds = {"sky", "snow", "grass", "sand", "water", "field", "road", "pavement"}
    for maps, instances in zip(known.label_map[:, 0], known.instance_map, strict=True):
        assert {kinds_of_concepts(number) for number in set(maps[instances == 0].tolist())} <= grounds
        assert not {kinds_of_concepts(number) for number in set(maps[instances > 0].tolist())} & grounds


def test_a_shadow_stays_where_it_fell_and_leaves_no_trace_of_what_it_fell_beside():
    """Hand-made: a shadow on sand, half of it hidden behind an object that is left out; and one on an object."""
    from pipeline.data.scenes.layers import Recorder

    def stage(foot):
        canvas = Recorder(16, Draw(0))
        canvas.surface("sand", "", "sand", (0.8, 0.7, 0.5))

        def block(own, x, y, h):
            own.rectangle(own.surface("rock", "", "rock", (0.4, 0.4, 0.4)), x - h, y - h, x + h, y + h)

        def lamp(own, x, y, h):
            number = own.surface("lamp", "", "metal", (0.2, 0.2, 0.2))
            own.shadow(x, y, h, h)
            own.rectangle(number, x - 1, y - 1, x + 1, y + 1)

        canvas.put(block, 32, 32, 8)
        canvas.put(lamp, *foot, 10)
        return canvas, len(canvas.surfaces)

    canvas, lit = stage((32, 50))  # on the sand: its ellipse reaches up to 40, where the block ends
    whole, without = canvas.maps(np.array([[True, True], [False, True]]))
    assert (whole == lit).sum() == (without == lit).sum() > 0  # all of it fell beside the block
    canvas, lit = stage((32, 44))  # its ellipse reaches up to 34: the block hides the ground there
    whole, without = (each.reshape(16, 16) for each in canvas.maps(np.array([[True, True], [False, True]])))
    body = canvas.things[0].at
    assert not (whole.reshape(-1)[body] == lit).any()
    assert (without.reshape(-1)[body] == lit).any()  # what is uncovered is in the shadow, too
    canvas, lit = stage((32, 32))  # on the block
    whole, without = canvas.maps(np.array([[True, True], [False, True]]))
    outside = np.setdiff1d(np.arange(256), body)
    assert np.array_equal(whole[outside], without[outside])
    assert ((whole == lit + 1) == (without == lit)).all()
    assert (without == lit).any()


def test_the_defining_kinds():
    assert DEFINING["forest"] == "tree"
    assert len(set(DEFINING.values())) == len(CLASSES)
    assert list(DEFINING) == list(CLASSES)
    painters = {cast.painter.__name__ for rule in RULES.values() for cast in rule.cast} | {
        stray.painter.__name__ for stray in STRAYS
    }
    assert set(DEFINING.values()) <= painters


def test_bad_input():
    scene = draw_scene(0, "train", 0, 32)
    with pytest.raises(ValueError, match=r"expected \(scene, \d+\), one per object"):
        scene.pictures(np.ones((1, 1), bool))
    with pytest.raises(MicrotomeError, match="no split"):
        draw_scene(0, "test", 0, 32)
    with pytest.raises(MicrotomeError, match="pixels wide"):
        draw_scene(0, "train", 0, 3)


def test_a_data_set_that_can_be_drawn_again():
    scenes = Scenes(kind="scenes", size=32, seed=3)
    scene = kinds.draw_again(scenes, "validation/0000007")
    assert np.array_equal(scene.image, generate(3, 7, 1, 32, "validation").image[0])
    other = Npz(kind="npz", file="x.npz", x="x", y="y")
    assert scenes.redrawable and not other.redrawable
    with pytest.raises(MicrotomeError, match="cannot be drawn again"):
        kinds.draw_again(other, "x:0")
