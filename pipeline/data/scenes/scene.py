"""One scene with its objects, which can be drawn without some of them."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scenes.canvas import Draw
from pipeline.data.scenes.composition import paint_scene
from pipeline.data.scenes.layers import Layer, Recorder
from pipeline.data.scenes.render import Film, check, film, key
from pipeline.data.scenes.vocabulary import CLASSES


class Thing(NamedTuple):
    """An object of a scene."""

    kind: str  # for example "tree"; a skier is a person with skis
    body: NDArray[np.bool_]  # (size, size) the object's pixels, also those that a nearer one hides
    painted: NDArray[np.bool_]  # (size, size) the same with its shadow: outside, nothing changes without the object


class Scene(NamedTuple):
    """A scene and what it is made of.

    Attributes
    ----------
    image : (3, size, size) uint8, the same bytes as `generate` gives.
    instance_map : (size, size) uint8, k + 1 where object k is seen, 0 elsewhere.
    things : the objects in the order of painting, far ones first.
    """

    image: NDArray[np.uint8]
    instance_map: NDArray[np.uint8]
    things: tuple[Thing, ...]
    canvas: Recorder
    film: Film

    def pictures(self, shown: NDArray[np.bool_]) -> NDArray[np.uint8]:
        """Draw the scene with some of its objects alone, (scene, 3, size, size), from `shown` (scene, object).

        Light, textures and noise are those of the whole scene, and so is every pixel that no hidden object or its
        shadow covered.
        """
        if shown.ndim != 2 or shown.shape[1] != len(self.things):
            raise ValueError(f"shown has shape {shown.shape}, expected (scene, {len(self.things)}), one per object")
        every = np.ones((1, len(self.things)), bool)
        *maps, whole = self.canvas.maps(np.concatenate([shown, every]))
        found = np.repeat(self.image.reshape(1, 3, -1), len(shown), 0)
        scene, at = np.nonzero(np.reshape(maps, (len(shown), -1)) != whole)
        if len(at):
            found[scene, :, at] = self.film.exposed(np.stack(maps)[scene, at], at).T
        return found.reshape(-1, *self.image.shape)


def draw_scene(seed: int, split: str, index: int, size: int) -> Scene:
    """Draw scene (seed, split, index) so that objects can be left out.

    The parameters are those of `generate`.
    """
    check(split, size)
    draw = Draw(key(seed, split, index))
    canvas = Recorder(size, draw)
    light = paint_scene(canvas, CLASSES[index % len(CLASSES)])
    look = film(canvas.shaded(), size, light, draw)
    image = look.exposed(canvas.map.reshape(-1)).reshape(3, size, size)
    return Scene(image, canvas.instances(), tuple(_thing(each, size) for each in canvas.things), canvas, look)


def _thing(layer: Layer, size: int) -> Thing:
    body = np.zeros(size * size, bool)
    body[layer.at] = True
    painted = body.copy()
    for shadow in layer.shadows:
        painted[shadow.inside[shadow.fell]] = True
    return Thing(layer.kind, body.reshape(size, size), painted.reshape(size, size))
