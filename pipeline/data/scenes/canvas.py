"""Drawing: a painter's algorithm on one map of surface numbers.

Every primitive writes the number of a surface into the map, later ones over earlier ones; none of them knows the colour
of a pixel. Pictures and label maps are look-ups of the finished map, so they agree at every pixel. Coordinates are in
scene units, 64 to the picture's width and height, x to the right and y down, so that one scene can be drawn at any
size. Only additions, multiplications and comparisons decide which pixel belongs to a surface: every machine rounds them
the same way.
"""

import math
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scenes.vocabulary import MATERIAL_NUMBER, OBJECT_NUMBER, PART_NUMBER

UNITS = 64  # scene units along a side of the picture
FADED = 0.45  # share of the sky's colour in things at the horizon
SHADE = 0.62  # share of light left in a shadow

Colour = tuple[float, float, float]
T = TypeVar("T")


class Draw(random.Random):
    """Random draws that are the same in every version of Python: all of them come from `random()`."""

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self.random() * len(options))]

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def near(self, colour: Colour, spread: float = 0.06) -> Colour:
        """Return a colour up to `spread` away in every channel."""
        draw, width = self.random, 2 * spread
        red, green, blue = (channel - spread + width * draw() for channel in colour)
        if 0.02 <= red <= 1 and 0.02 <= green <= 1 and 0.02 <= blue <= 1:
            return red, green, blue
        return min(max(red, 0.02), 1.0), min(max(green, 0.02), 1.0), min(max(blue, 0.02), 1.0)


class Surface(NamedTuple):
    """The meaning of a surface number."""

    object: int
    part: int
    material: int
    colour: Colour  # of the surface itself, sRGB in [0, 1], before light, haze and noise
    light: float  # 1, or SHADE in a shadow
    glow: float  # 0: lit from outside; 1: shines by itself (lamps, windows at night)
    haze: float  # share of the sky's colour


@lru_cache(maxsize=4)
def _centres(size: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return pixel centres in scene units: x of shape (1, size) and y of shape (size, 1)."""
    centres = ((np.arange(size) + 0.5) * (UNITS / size)).astype(np.float32)
    return centres[None], centres[:, None]


class Canvas:
    """A map of surface numbers (size, size) uint8 and the surfaces it refers to."""

    def __init__(self, size: int, draw: Draw):
        self.size = size
        self.scale = size / UNITS
        self.draw = draw
        self.map = np.zeros((size, size), np.uint8)
        self.x, self.y = _centres(size)
        self.surfaces: list[Surface] = []
        self.haze = 0.0  # of the surfaces made from now on
        self.night = False
        self.winter = False
        self.shadows: dict[int, int] = {}  # by surface, the number of the same in a shadow

    def surface(self, object_: str, part: str, material: str, colour: Colour, glow: float = 0.0) -> int:
        """Register a surface and return its number."""
        numbers = OBJECT_NUMBER[object_], PART_NUMBER[part], MATERIAL_NUMBER[material]
        self.surfaces.append(Surface(*numbers, colour, 1.0, glow, self.haze))
        return len(self.surfaces) - 1

    def put(self, painter: "Painter", x: float, y: float, h: float) -> None:
        """Draw one object with its shadow, standing at (x, y) and `h` high. `layers.Recorder` knows it afterwards."""
        painter(self, x, y, h)

    def stand_at(self, depth: float) -> None:
        """Set the depth of the surfaces made from now on: 0 is the horizon, 1 the lower edge of the picture."""
        self.haze = FADED * (1 - depth) ** 3

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice] | None:
        """Return rows and columns of the pixels that a box touches, or None if it misses the picture."""
        scale, size = self.scale, self.size
        first, last = max(math.floor(left * scale), 0), min(math.ceil(right * scale), size)
        upper, lower = max(math.floor(top * scale), 0), min(math.ceil(bottom * scale), size)
        if first >= last or upper >= lower:
            return None
        return slice(upper, lower), slice(first, last)

    def rectangle(self, surface: int, left: float, top: float, right: float, bottom: float) -> None:
        """Draw a box, rounded to whole pixels and at least one pixel wide and high."""
        scale, size = self.scale, self.size
        first, upper = math.floor(left * scale + 0.5), math.floor(top * scale + 0.5)
        last, lower = max(math.floor(right * scale + 0.5), first + 1), max(math.floor(bottom * scale + 0.5), upper + 1)
        if first < size and upper < size and last > 0 and lower > 0:
            self.map[max(upper, 0) : lower, max(first, 0) : last] = surface

    def ellipse(self, surface: int, x: float, y: float, rx: float, ry: float) -> None:
        """Draw an ellipse about (x, y)."""
        box = self.window(x - rx, y - ry, x + rx, y + ry)
        if box:
            self.map[box][self._in_ellipse(box, x, y, rx, ry)] = surface

    def dome(self, surface: int, x: float, y: float, rx: float, ry: float) -> None:
        """Draw the upper half of an ellipse about (x, y)."""
        box = self.window(x - rx, y - ry, x + rx, y)
        if box:
            self.map[box][self._in_ellipse(box, x, y, rx, ry)] = surface

    def _in_ellipse(self, box: tuple[slice, slice], x: float, y: float, rx: float, ry: float) -> NDArray[np.bool_]:
        rows, columns = box
        across = (self.x[:, columns] - x) * (1 / rx)
        down = (self.y[rows] - y) * (1 / ry)
        return across * across <= 1 - down * down

    def trapezoid(
        self, surface: int, top: float, left: float, right: float, bottom: float, low_left: float, low_right: float
    ) -> None:
        """Draw a shape between two level edges: left..right at `top`, low_left..low_right at `bottom`."""
        box = self.window(min(left, low_left), top, max(right, low_right), bottom)
        if box:
            rows, columns = box
            down = (self.y[rows] - top) * (1 / max(bottom - top, 1e-3))
            x = self.x[:, columns]
            inside = x >= left + (low_left - left) * down
            inside &= x <= right + (low_right - right) * down
            self.map[box][inside] = surface

    def triangle(self, surface: int, x: float, top: float, bottom: float, left: float, right: float) -> None:
        """Draw a triangle with its apex at (x, top) and a level base."""
        self.trapezoid(surface, top, x, x, bottom, left, right)

    def shadow(self, x: float, y: float, rx: float, ry: float) -> None:
        """Darken an ellipse of whatever lies at (x, y), and nothing else. Labels and surface colour stay."""
        column, row = int(x * self.scale), int(y * self.scale)
        box = self.window(x - rx, y - ry, x + rx, y + ry)
        if box is not None and 0 <= column < self.size and 0 <= row < self.size:
            self._lay_shadow((row, column), box, self._in_ellipse(box, x, y, rx, ry))

    def _lay_shadow(self, foot: tuple[int, int], box: tuple[slice, slice], inside: NDArray[np.bool_]) -> None:
        ground = int(self.map[foot])
        below = self.surfaces[ground]
        if below.light != 1.0:
            return
        if ground not in self.shadows:
            self.shadows[ground] = len(self.surfaces)
            self.surfaces.append(below._replace(light=SHADE))
        region = self.map[box]
        region[inside & (region == ground)] = self.shadows[ground]


Painter: TypeAlias = Callable[[Canvas, float, float, float], None]
