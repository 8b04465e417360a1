"""Compositions of scenes as numbers on a grid: what a generator of scenes paints its pictures from."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scenes.composition import KINDS
from pipeline.data.scenes.scene import Scene
from pipeline.errors import MicrotomeError

GRID = 12
EACH = 8
"""Numbers of an object: that it is there, where in its cell (x, y), half its width and height, its colour."""
SHAPE = (EACH * len(KINDS) + 3, GRID, GRID)
LARGE = 4.0
"""Cells of half a width or height that is written as 1, about a quarter of the picture."""


def composition(scene: Scene, without: Sequence[str] = ()) -> NDArray[np.float32]:
    """Return the composition of a scene, float32 `SHAPE`, with objects of some kinds left out.

    In the cell of the middle of what is seen of an object, its kind's eight channels say that it is there, where its
    middle lies from that of the cell, half its height and width, and its mean colour from -1 to 1. Of two objects of a
    kind in one cell the nearer one counts. The last three channels are a thumbnail of the picture without any object.
    """
    size = scene.image.shape[-1]
    if size % GRID:
        raise MicrotomeError(f"compositions lie on a grid of {GRID} x {GRID}, which does not divide {size} pixels")
    found = np.zeros(SHAPE, np.float32)
    step = size // GRID
    for number, thing in enumerate(scene.things, 1):
        seen = scene.instance_map == number
        if thing.kind in without or not seen.any():
            continue
        (top, bottom), (left, right) = (_range(seen.any(axis)) for axis in (1, 0))
        y, x = (top + bottom) / 2 / step, (left + right) / 2 / step
        row, column = min(int(y), GRID - 1), min(int(x), GRID - 1)
        half = (bottom - top) / 2 / step / LARGE, (right - left) / 2 / step / LARGE
        colour = scene.image[:, seen].mean(1) / 127.5 - 1
        first = EACH * KINDS.index(thing.kind)
        found[first : first + EACH, row, column] = (1, x - column - 0.5, y - row - 0.5, *half, *colour)
    (empty,) = scene.pictures(np.zeros((1, len(scene.things)), bool))
    found[-3:] = empty.reshape(3, GRID, step, GRID, step).mean((2, 4)) / 255
    return found


def kinds_of(concept: str) -> tuple[str, ...]:
    """Return the kinds of objects that show a concept of the category `object`; none for ground, water and sky."""
    found = [kind for kind in KINDS if kind == concept]
    return (*found, *(["skier"] if concept in ("person", "skis") else []))


def _range(there: NDArray[np.bool_]) -> tuple[int, int]:
    at = np.flatnonzero(there)
    return int(at[0]), int(at[-1]) + 1
