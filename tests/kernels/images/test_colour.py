"""Colour names on colours nobody argues about, and the table against the rule it was made from."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from kernels.images.colour_names import COLOURS, _partition, colour_names, colour_table

PROTOTYPES = {
    "black": [(0, 0, 0), (20, 20, 20), (25, 18, 15)],
    "grey": [(128, 128, 128), (80, 80, 84), (180, 180, 178), (112, 122, 130)],
    "white": [(255, 255, 255), (245, 245, 250), (240, 238, 232)],
    "red": [(255, 0, 0), (220, 20, 60), (200, 30, 30), (139, 0, 0)],
    "orange": [(255, 165, 0), (255, 128, 0), (250, 140, 30)],
    "yellow": [(255, 255, 0), (255, 215, 0), (240, 230, 80)],
    "green": [(0, 255, 0), (0, 128, 0), (34, 139, 34), (60, 90, 50), (128, 128, 0), (150, 220, 120)],
    "blue": [(0, 0, 255), (70, 130, 180), (135, 206, 235), (0, 0, 128), (30, 60, 110)],
    "purple": [(128, 0, 128), (148, 0, 211), (75, 0, 130), (90, 50, 120)],
    "pink": [(255, 192, 203), (255, 105, 180), (255, 20, 147), (240, 150, 160), (255, 0, 255)],
    "brown": [(165, 42, 42), (139, 69, 19), (101, 67, 33), (160, 82, 45), (190, 150, 110)],
}


@pytest.mark.parametrize(("colour", "rgb"), [(c, rgb) for c, many in PROTOTYPES.items() for rgb in many])
def test_prototypes(colour, rgb):
    assert COLOURS[colour_names(np.array(rgb, np.uint8))] == colour


def test_every_colour_has_a_share_of_the_cube():
    share = np.bincount(colour_table(), minlength=len(COLOURS)) / colour_table().size
    assert share.min() > 0.004
    assert len(COLOURS) == 11


@settings(deadline=None, max_examples=60)
@given(
    arrays(np.uint8, array_shapes(min_dims=0, max_dims=4, max_side=6).map(lambda shape: (*shape, 3))),
    st.booleans(),
)
def test_table_is_the_rule_at_the_bin_centres(rgb, channel_first):
    if channel_first:
        rgb = np.moveaxis(np.ascontiguousarray(np.moveaxis(rgb, -1, 0)), 0, -1)
    expected = _partition(((rgb >> 3) + 0.5) / 32)
    found = colour_names(rgb)
    assert found.dtype == np.uint8
    assert np.array_equal(found, expected)


def test_blocks_do_not_matter(monkeypatch):
    rgb = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    whole = colour_names(rgb)
    monkeypatch.setattr("kernels.images.colour_names.BLOCK", 5)
    assert np.array_equal(colour_names(rgb), whole)


@pytest.mark.parametrize("wrong", [np.zeros((2, 3)), np.zeros((3, 2), np.uint8), np.array(3, np.uint8)])
def test_wrong_arrays_are_refused(wrong):
    with pytest.raises(ValueError, match="uint8 of shape"):
        colour_names(wrong)
