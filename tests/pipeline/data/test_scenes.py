"""The scenes: identity of every image, agreement of picture and label maps, and what classes are made of."""

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.images.colour_names import COLOURS
from pipeline.data.scenes import CATEGORIES, CLASSES, CONCEPTS, generate, render
from pipeline.data.scenes.canvas import SHADE, Canvas, Draw
from pipeline.data.scenes.composition import RULES, STRAYS, paint_scene
from pipeline.data.scenes.textures import PERIOD, noise_table, textures
from pipeline.data.scenes.vocabulary import MATERIALS, OBJECT_NUMBER, PART_NUMBER
from pipeline.errors import MicrotomeError

ROOT = Path(__file__).parents[3]
LABEL_MAPS, IMAGES = "b5cbbee4bc91b804", "033d426799c8a9ce"  # of the first 24 training images at 48 pixels


def digest(scenes):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in scenes)).hexdigest()


@pytest.fixture(scope="module")
def scenes():
    return generate(0, 0, 240, 64)


def test_shapes_and_numbers(scenes):
    assert scenes.image.shape == (240, 3, 64, 64)
    assert scenes.image.dtype == np.uint8
    assert scenes.label.dtype == np.int64
    assert np.array_equal(scenes.label, np.arange(240) % 12)
    assert scenes.label_map.shape == (240, len(CATEGORIES), 64, 64)
    assert tuple(CONCEPTS) == CATEGORIES
    for category, names in enumerate(CONCEPTS.values()):
        assert len(set(names)) == len(names)
        assert scenes.label_map[:, category].max() <= len(names)
    assert (scenes.label_map[:, 0] > 0).all()  # every pixel belongs to an object ...
    assert (scenes.label_map[:, 3] > 0).all()  # ... and has a colour
    assert CONCEPTS["colour"] == COLOURS


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(-3, 2**70),
    start=st.integers(0, 10**12),
    split=st.sampled_from(["train", "validation"]),
    cuts=st.lists(st.integers(0, 6), max_size=2).map(sorted),
    size=st.sampled_from([16, 33, 64]),
)
def test_an_image_depends_on_seed_split_and_index_alone(seed, start, split, cuts, size):
    whole = generate(seed, start, 6, size, split)
    edges = [0, *cuts, 6]
    parts = [generate(seed, start + a, b - a, size, split) for a, b in pairwise(edges)]
    for name in ("image", "label", "label_map"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


def test_halves_can_be_left_out(scenes):
    pictures = generate(0, 5, 20, 64, label_map=False)
    maps = generate(0, 5, 20, 64, image=False)
    assert np.array_equal(pictures.image, scenes.image[5:25])
    assert np.array_equal(maps.label_map, scenes.label_map[5:25])
    assert pictures.label_map.shape == (0, 4, 64, 64)
    assert maps.image.shape == (0, 3, 64, 64)
    assert np.array_equal(pictures.label, maps.label)


def test_another_process_draws_the_same_bits():
    code = (
        "import hashlib, numpy as np; from pipeline.data.scenes import generate;"
        "s = generate(3, 7, 24, 48, 'validation');"
        "print(hashlib.sha256(b''.join(np.ascontiguousarray(a).tobytes() for a in s)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest(generate(3, 7, 24, 48, "validation"))


def test_splits_and_seeds_share_no_image():
    seen = [
        image.tobytes() for seed in (0, 1) for split in ("train", "validation") for image in
        generate(seed, 0, 120, 32, split, label_map=False).image
    ]  # fmt: skip
    assert len(set(seen)) == 480


def test_a_scene_is_the_same_at_every_size():
    small, large = (generate(0, 0, 60, size).label_map[:, 0] for size in (48, 96))
    shared = (large[:, ::2, ::2] == small).mean()
    assert shared > 0.93  # the rest are edges


def test_label_maps_are_the_surfaces_of_the_map():
    """Against a slow twin: the surface of each pixel, looked up one by one."""
    for index in range(12):
        found = generate(0, index, 1, 32).label_map[0]
        canvas = Canvas(32, _draw(index))
        paint_scene(canvas, CLASSES[index % 12])
        for row in range(32):
            for column in range(0, 32, 5):
                surface = canvas.surfaces[canvas.map[row, column]]
                assert tuple(found[:3, row, column]) == (surface.object, surface.part, surface.material)


def _draw(index):
    return Draw(render.key(0, "train", index))


def test_parts_lie_on_their_objects(scenes):
    owner = {part: part.split()[0] for part in CONCEPTS["part"]}
    objects, parts = scenes.label_map[:, 0], scenes.label_map[:, 1]
    for part, object_ in owner.items():
        assert (objects[parts == PART_NUMBER[part]] == OBJECT_NUMBER[object_]).all()


def test_colour_is_that_of_the_surface_whatever_the_light():
    """At night pictures get dark, but the colour category does not."""
    canvas = Canvas(64, _draw(3))
    light, found, names = paint_scene(canvas, "farm"), [], []
    for factor in (1.0, 0.3):
        film = render.film(canvas.surfaces, 64, tuple(factor * channel for channel in light), Draw(1))
        found.append(film.exposed(canvas.map.reshape(-1)))
        label_map = np.empty((4, 64, 64), np.uint8)
        render._label(canvas, label_map)
        names.append(label_map[3])
    bright, dark = found
    assert dark.mean() < 0.8 * bright.mean()
    assert np.array_equal(names[0], names[1])


def test_a_shadow_darkens_without_touching_the_labels():
    canvas = Canvas(32, Draw(0))
    canvas.surface("sand", "", "sand", (0.8, 0.7, 0.5))
    other = canvas.surface("water", "", "water", (0.2, 0.4, 0.6))
    canvas.rectangle(other, 0, 0, 64, 20)
    canvas.shadow(32, 30, 20, 20)
    shaded = [surface for surface in canvas.surfaces if surface.light == SHADE]
    assert len(shaded) == 1
    assert shaded[0][:4] == canvas.surfaces[0][:4]
    assert (canvas.map[:10] == other).all()  # only what lies at the centre gets dark
    assert (canvas.map == 2).sum() > 50


@settings(deadline=None, max_examples=40)
@given(
    x=st.floats(-20, 84), y=st.floats(-20, 84), rx=st.floats(0.3, 30), ry=st.floats(0.3, 30),
    size=st.sampled_from([16, 64, 96]),
)  # fmt: skip
def test_ellipse_against_its_equation(x, y, rx, ry, size):
    canvas = Canvas(size, Draw(0))
    canvas.ellipse(1, x, y, rx, ry)
    for row in range(0, size, 3):
        for column in range(0, size, 3):
            across, down = ((column + 0.5) * 64 / size - x) / rx, ((row + 0.5) * 64 / size - y) / ry
            distance = across * across + down * down
            if abs(distance - 1) > 1e-3:
                assert canvas.map[row, column] == (distance < 1)


def test_the_class_is_in_the_objects():
    """Every class shows its own kind of object at least twice, and no other class shows as many."""
    own = {rule.cast[0].painter: name for name, rule in RULES.items()}
    assert len(own) == len(RULES)
    for name, rule in RULES.items():
        assert min(rule.cast[0].counts) >= 2
        for member in rule.cast[1:]:
            if member.painter in own and own[member.painter] != name:
                assert max(member.counts) < 7 if own[member.painter] == "forest" else max(member.counts) <= 2
    assert all(stray.counts == (1,) for stray in STRAYS)


def test_every_concept_occurs():
    maps = generate(1, 0, 1200, 48, image=False).label_map
    for category, names in enumerate(CONCEPTS.values()):
        counts = np.bincount(maps[:, category].ravel(), minlength=len(names) + 1)[1:]
        assert not [name for name, count in zip(names, counts, strict=True) if count == 0]


def test_a_scene_has_room_for_its_surfaces():
    most = 0
    for key in range(600):
        canvas = Canvas(16, Draw(key))
        paint_scene(canvas, CLASSES[key % 12])
        most = max(most, len(canvas.surfaces))
    assert most < 200  # of the 256 that the map can number


def test_textures_are_level_and_survive_other_roundings():
    table = textures()
    assert table.shape == (1 + len(MATERIALS), PERIOD, PERIOD)
    assert not table[0].any()
    assert (table[1:].reshape(len(MATERIALS), -1).std(1) > 0.005).all()
    assert np.array_equal(table * 1024, np.round(table * 1024))
    assert noise_table(100).shape == (3, 356, 356)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0, 1, 64, "test"), "no split 'test'; expected one of: train, validation"),
        ((0, 0, 1, 8), "16 to 1024 pixels wide, found size 8"),
        ((0, -1, 1, 64), "found start -1"),
        ((0, 0, -1, 64), "count -1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(MicrotomeError, match=message):
        generate(*arguments)


def test_no_images_is_fine():
    empty = generate(0, 5, 0, 64)
    assert empty.image.shape == (0, 3, 64, 64)
    assert empty.label.shape == (0,)


def test_pixels_are_those_of_this_version():
    """A change of a picture changes every result made from the scenes: raise `pipeline.data.scenes.VERSION`."""
    scenes = generate(0, 0, 24, 48)
    assert hashlib.sha256(scenes.label_map.tobytes()).hexdigest()[:16] == LABEL_MAPS
    assert hashlib.sha256(scenes.image.tobytes()).hexdigest()[:16] == IMAGES
