"""What each object of a scene painted, so that it can be left out afterwards.

Nothing is painted anew: every random draw of a scene was made, and a map of surface numbers without some of the objects
is laid together from what the others painted.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scenes.canvas import SHADE, Canvas, Draw, Painter, Surface


class Shadow(NamedTuple):
    """A shadow: it falls on the surface at its foot, and on nothing else."""

    foot: int  # pixel, row * size + column
    inside: NDArray[np.intp]  # pixels of its ellipse
    fell: NDArray[np.bool_]  # of these: where it fell in the whole scene


class Layer(NamedTuple):
    """What one object painted, or the scenery that lies between two of them.

    An object's shadows lie below it.
    """

    kind: str  # the object's; "" for scenery
    shadows: tuple[Shadow, ...]
    at: NDArray[np.intp]  # pixels
    surface: NDArray[np.uint16]  # of each


class Recorder(Canvas):
    """A canvas that knows what each object painted."""

    def __init__(self, size: int, draw: Draw):
        super().__init__(size, draw)
        self.layers: list[Layer] = []
        self._recorded = self.map.copy()  # the map that the layers so far give
        self._shadows_of_one: list[Shadow] = []

    def put(self, painter: Painter, x: float, y: float, h: float) -> None:
        self._record("")
        painter(self, x, y, h)
        self._record(painter.__name__)

    def _lay_shadow(self, foot: tuple[int, int], box: tuple[slice, slice], inside: NDArray[np.bool_]) -> None:
        before = self.map.copy()
        super()._lay_shadow(foot, box, inside)
        pixels = np.arange(self.map.size).reshape(self.map.shape)[box][inside]
        fell = (self.map != before)[box][inside]
        self._shadows_of_one.append(Shadow(foot[0] * self.size + foot[1], pixels, fell))

    def _record(self, kind: str) -> None:
        """Keep what was painted since the last time. Every object has surfaces of its own, so all of it differs."""
        light = np.array([surface.light for surface in self.surfaces])
        at = np.flatnonzero((self.map != self._recorded) & (light[self.map] != SHADE))
        if kind or len(at):
            self.layers.append(Layer(kind, tuple(self._shadows_of_one), at, self.map.reshape(-1)[at].astype(np.uint16)))
        self._shadows_of_one = []
        self._recorded = self.map.copy()

    @property
    def things(self) -> list[Layer]:
        """The layers of objects, far ones first."""
        return [layer for layer in self.layers if layer.kind]

    def instances(self) -> NDArray[np.uint8]:
        """Return which object each pixel shows, (size, size): k + 1 where it is object k, 0 elsewhere."""
        found = np.zeros(self.map.size, np.uint8)
        number = 0
        for layer in self.layers:
            number += bool(layer.kind)
            found[layer.at] = number if layer.kind else 0
        return found.reshape(self.map.shape)

    def shaded(self) -> list[Surface]:
        """Return every surface, and after them the same in a shadow: what `maps` number."""
        return [*self.surfaces, *(surface._replace(light=SHADE) for surface in self.surfaces)]

    def maps(self, shown: NDArray[np.bool_]) -> NDArray[np.uint16]:
        """Return which surface of `shaded` each pixel shows, (scene, pixel), where only these objects are shown.

        `shown` is (scene, object). A pixel that an object uncovers shows what lies below, in the shadow of a later
        object if that falls there. Other pixels stay, shadows on them too.
        """
        lit = len(self.surfaces)
        whole = np.ones((1, shown.shape[1]), bool)
        rows_of = iter(np.concatenate([shown, whole]).T)
        maps = np.zeros((len(shown) + 1, self.map.size), np.uint16)
        for layer in self.layers:
            if not layer.kind:
                maps[:, layer.at] = layer.surface
                continue
            rows = np.flatnonzero(next(rows_of))[:, None]
            for shadow in layer.shadows:
                own, ground = maps[rows, shadow.inside], maps[rows, shadow.foot]
                falls = np.where(own == own[-1], shadow.fell, (own == ground) & (ground < lit))
                maps[rows, shadow.inside] = np.where(falls, own + lit, own)
            maps[rows, layer.at] = layer.surface
        return maps[:-1]
