"""The composition of scenes: the rule of each class, and how a scene is built from it.

The objects and their arrangement define the class. Everything that colours a picture as a whole - the ground, the
season, the hour, the sky, a strip of road or water, mountains and trees at the horizon - is drawn from lists that
overlap between classes, so a mean colour, a histogram or a blurred thumbnail reveals little. Only its row in `RULES` is
unique to a class.
"""

from typing import NamedTuple

from pipeline.data.scenes import objects
from pipeline.data.scenes.canvas import UNITS, Canvas, Colour, Draw, Painter
from pipeline.data.scenes.vocabulary import CLASSES


class Cast(NamedTuple):
    """Objects of one kind in a scene."""

    painter: Painter
    counts: tuple[int, ...]  # one of them is drawn
    low: float  # height in scene units at the lower edge; farther objects are smaller
    high: float
    place: str = "land"  # land · water · road · horizon


class Rule(NamedTuple):
    """The composition of a class. Repeated entries are weights."""

    grounds: tuple[str, ...]
    strips: tuple[str, ...]  # a band across the land: road, path, field, or "" for none
    water: tuple[float, float, float]  # probability, and the range of the share of the ground that it covers
    cast: tuple[Cast, ...]
    tilt: float = 0.12  # of the horizon, at most
    mountains: float = 0.35  # probability


GROUNDS = ("snow", "snow", "grass", "grass", "autumn", "sand", "soil", "pavement")
OPEN_GROUNDS = GROUNDS[:-1]
STRIPS = ("", "road", "road", "path", "field")
POND = (0.3, 0.15, 0.4)

RULES: dict[str, Rule] = {
    "ski slope": Rule(
        ("snow",), ("", "", "path", "road"), (0.15, 0.15, 0.3),
        (Cast(objects.skier, (2, 3, 3, 4), 18, 25), Cast(objects.tree, (0, 1, 2, 3), 14, 26)),
        tilt=0.3, mountains=0.5,
    ),
    "snowy village": Rule(
        ("snow",), STRIPS, POND,
        (
            Cast(objects.house, (3, 4, 4, 5), 18, 25), Cast(objects.tree, (0, 1, 2), 14, 26),
            Cast(objects.person, (0, 0, 1), 12, 17), Cast(objects.lamp, (0, 0, 1), 18, 26),
        ),
    ),
    "forest": Rule(
        OPEN_GROUNDS, STRIPS, POND,
        (
            Cast(objects.tree, (7, 8, 9, 11), 20, 34), Cast(objects.bush, (0, 1, 2), 5, 8),
            Cast(objects.rock, (0, 0, 1), 4, 7), Cast(objects.person, (0, 0, 1), 12, 17),
        ),
    ),
    "farm": Rule(
        OPEN_GROUNDS, (*STRIPS, "field"), POND,
        (
            Cast(objects.cow, (3, 3, 4), 13, 18), Cast(objects.fence, (0, 1, 1), 7, 10),
            Cast(objects.house, (0, 1, 1), 15, 23), Cast(objects.tree, (0, 1, 2), 14, 26),
        ),
    ),
    "park": Rule(
        GROUNDS, (*STRIPS, "path"), POND,
        (
            Cast(objects.bench, (3, 3, 4), 11, 14), Cast(objects.person, (0, 1, 2), 12, 18),
            Cast(objects.tree, (0, 1, 2, 3), 16, 28), Cast(objects.lamp, (0, 1), 20, 28),
            Cast(objects.swan, (0, 0, 0, 1), 6, 9, "water"),
        ),
    ),
    "beach": Rule(
        ("sand", "sand", "sand", "sand", "grass", "pavement"), ("", "path", "road", "road"), (0.8, 0.2, 0.45),
        (
            Cast(objects.parasol, (3, 3, 4), 18, 25), Cast(objects.person, (0, 1, 2), 12, 18),
            Cast(objects.boat, (0, 0, 0, 1), 9, 14, "water"), Cast(objects.rock, (0, 0, 1), 4, 8),
        ),
    ),
    "desert": Rule(
        ("sand", "sand", "sand", "soil", "autumn", "grass"), STRIPS, POND,
        (
            Cast(objects.cactus, (3, 3, 4), 20, 29), Cast(objects.rock, (0, 1, 2), 4, 9),
            Cast(objects.bush, (0, 0, 1), 4, 6), Cast(objects.person, (0, 0, 1), 12, 17),
        ),
    ),
    "harbour": Rule(
        GROUNDS, ("", "path", "road", "road"), (1.0, 0.4, 0.8),
        (
            Cast(objects.boat, (3, 3, 4), 19, 28, "water"), Cast(objects.pier, (0, 1, 1), 5, 7, "water"),
            Cast(objects.house, (0, 1, 2), 14, 20, "horizon"), Cast(objects.person, (0, 0, 1), 12, 17),
        ),
    ),
    "lake": Rule(
        GROUNDS, ("", "path", "road", "road"), (1.0, 0.4, 0.8),
        (
            Cast(objects.swan, (3, 3, 4), 13, 18, "water"), Cast(objects.tree, (0, 1, 2), 14, 24),
            Cast(objects.bush, (0, 1, 2), 4, 7), Cast(objects.bench, (0, 0, 0, 1), 6, 8),
            Cast(objects.boat, (0, 0, 0, 1), 10, 15, "water"),
        ),
        mountains=0.5,
    ),
    "city street": Rule(
        ("pavement", "pavement", "snow", "snow", "grass", "sand"), ("", "road", "road", "path"), POND,
        (
            Cast(objects.building, (3, 4, 4), 21, 34, "horizon"), Cast(objects.lamp, (1, 2, 2), 22, 30),
            Cast(objects.car, (0, 0, 1, 2), 10, 14, "road"), Cast(objects.person, (0, 1, 2), 13, 19),
            Cast(objects.tree, (0, 0, 1), 14, 24),
        ),
    ),
    "road": Rule(
        GROUNDS, ("road",), POND,
        (
            Cast(objects.car, (3, 3, 4), 12, 17, "road"), Cast(objects.sign, (0, 1, 2), 14, 20),
            Cast(objects.tree, (0, 1, 2), 14, 26), Cast(objects.house, (0, 0, 0, 1), 14, 20),
        ),
    ),
    "airport": Rule(
        GROUNDS, ("road", "road", "", "path"), POND,
        (
            Cast(objects.plane, (3, 3, 4), 16, 21), Cast(objects.car, (0, 0, 1), 7, 11),
            Cast(objects.building, (0, 0, 1), 9, 16, "horizon"), Cast(objects.person, (0, 0, 1), 12, 17),
            Cast(objects.lamp, (0, 0, 1), 18, 26),
        ),
    ),
}  # fmt: skip
assert tuple(RULES) == CLASSES

DEFINING = {name: rule.cast[0].painter.__name__ for name, rule in RULES.items()}
"""By class, the kind of object that no other class has as many of."""

STRAYS = (
    Cast(objects.tree, (1,), 14, 24), Cast(objects.bush, (1,), 4, 8), Cast(objects.rock, (1,), 4, 8),
    Cast(objects.cactus, (1,), 14, 20), Cast(objects.house, (1,), 14, 20), Cast(objects.person, (1,), 12, 18),
    Cast(objects.skier, (1,), 14, 18), Cast(objects.boat, (1,), 12, 18), Cast(objects.car, (1,), 8, 12),
    Cast(objects.plane, (1,), 11, 16), Cast(objects.parasol, (1,), 14, 20), Cast(objects.fence, (1,), 6, 9),
    Cast(objects.cow, (1,), 9, 13), Cast(objects.swan, (1,), 8, 12), Cast(objects.bench, (1,), 7, 10),
    Cast(objects.lamp, (1,), 18, 26), Cast(objects.sign, (1,), 13, 18),
)  # fmt: skip
"""Things that stand in the wrong scene: one in STRAY of the pictures, never as many as their own class has."""
STRAY = 0.3
KINDS = tuple(
    dict.fromkeys(
        each.__name__
        for each in (
            objects.sun,
            objects.cloud,
            objects.mountain,
            *(cast.painter for rule in RULES.values() for cast in rule.cast),
            *(stray.painter for stray in STRAYS),
        )
    )
)
"""The kinds of objects. A skier is one kind, and a person another."""

GROUND_LOOKS: dict[str, tuple[tuple[str, str], tuple[Colour, ...]]] = {
    "snow": (("snow", "snow"), ((0.92, 0.93, 0.97), (0.82, 0.86, 0.94))),
    "grass": (("grass", "grass"), ((0.34, 0.54, 0.22), (0.46, 0.54, 0.22), (0.24, 0.42, 0.20))),
    "autumn": (("grass", "leaves"), ((0.62, 0.44, 0.20), (0.70, 0.58, 0.28), (0.50, 0.34, 0.18))),
    "sand": (("sand", "sand"), ((0.86, 0.76, 0.55), (0.78, 0.64, 0.42), (0.90, 0.85, 0.72), (0.80, 0.50, 0.32))),
    "soil": (("field", "soil"), ((0.50, 0.36, 0.22), (0.40, 0.30, 0.20), (0.62, 0.36, 0.24))),
    "pavement": (("pavement", "concrete"), ((0.64, 0.62, 0.60), (0.50, 0.50, 0.52), (0.76, 0.73, 0.68))),
}
WATERS: tuple[Colour, ...] = ((0.20, 0.42, 0.64), (0.18, 0.50, 0.54), (0.32, 0.44, 0.52), (0.14, 0.26, 0.42))
ASPHALTS: tuple[Colour, ...] = ((0.36, 0.36, 0.38), (0.27, 0.27, 0.30), (0.46, 0.45, 0.46))
PATHS: tuple[Colour, ...] = ((0.72, 0.64, 0.50), (0.60, 0.56, 0.52), (0.54, 0.40, 0.28))

LAND_HAZE = 0.1
CROWDED = 9.0  # horizontal distance in scene units that two objects of a scene keep if there is room


class Hour(NamedTuple):
    """Light at a time of day: colour of the sky, colour of the light."""

    skies: tuple[Colour, ...]
    light: Colour


HOURS = {
    "day": Hour(((0.42, 0.64, 0.93), (0.60, 0.77, 0.92)), (1.02, 1.00, 0.97)),
    "overcast": Hour(((0.72, 0.75, 0.80), (0.84, 0.86, 0.88)), (0.86, 0.88, 0.92)),
    "dusk": Hour(((0.94, 0.66, 0.44), (0.90, 0.58, 0.58)), (1.00, 0.84, 0.70)),
    "dawn": Hour(((0.72, 0.62, 0.80), (0.93, 0.78, 0.66)), (0.90, 0.82, 0.86)),
    "night": Hour(((0.10, 0.13, 0.27), (0.16, 0.14, 0.30)), (0.50, 0.54, 0.72)),
}
HOUR_WEIGHTS = ("day",) * 8 + ("overcast",) * 3 + ("dusk",) * 4 + ("dawn",) * 2 + ("night",) * 3


def paint_scene(canvas: Canvas, class_name: str) -> Colour:
    """Draw one scene of a class on an empty canvas; return the colour of its light."""
    draw, rule = canvas.draw, RULES[class_name]
    hour = draw.pick(HOUR_WEIGHTS)
    canvas.night = hour == "night"
    ground = draw.pick(rule.grounds)
    canvas.winter = ground == "snow"
    horizon = draw.between(19, 33)
    _paint_sky(canvas, HOURS[hour].skies, horizon)
    _paint_horizon(canvas, rule, horizon)
    land = _Land(canvas, rule, ground, horizon)
    _place(canvas, land, rule)
    return HOURS[hour].light


def _paint_sky(canvas: Canvas, skies: tuple[Colour, ...], horizon: float) -> None:
    draw = canvas.draw
    canvas.surface("sky", "", "air", draw.near(draw.pick(skies), 0.05))
    if draw.chance(0.4):
        canvas.put(objects.sun, draw.between(4, 60), draw.between(9, max(horizon - 4, 10)), draw.between(6, 11))
    for _ in range(draw.pick((0, 0, 1, 2, 3))):
        canvas.put(objects.cloud, draw.between(0, 64), draw.between(6, horizon * 0.7), draw.between(3.5, 6.5))


def _paint_horizon(canvas: Canvas, rule: Rule, horizon: float) -> None:
    """Draw mountains and, in any class, a row of distant trees or roofs."""
    draw = canvas.draw
    canvas.stand_at(0.1)
    if draw.chance(rule.mountains):
        for _ in range(draw.pick((1, 2, 2))):
            canvas.put(objects.mountain, draw.between(4, 60), horizon + 3, draw.between(10, horizon - 3))
    backdrop = draw.random()
    if backdrop < 0.2:
        for _ in range(draw.pick((2, 3, 4))):
            canvas.put(objects.tree, draw.between(2, 62), horizon + 2, draw.between(7, 11))
    elif backdrop < 0.32:
        for _ in range(draw.pick((1, 2, 3))):
            canvas.put(objects.building, draw.between(2, 62), horizon + 2, draw.between(8, 15))


class _Land:
    """The ground of a scene: where water, land and road are. Depths run from 0 (horizon) to 1 (lower edge)."""

    def __init__(self, canvas: Canvas, rule: Rule, ground: str, horizon: float):
        draw = canvas.draw
        self.horizon = horizon
        self.tilt = draw.between(-rule.tilt, rule.tilt)
        self.road: tuple[float, float] | None = None
        canvas.haze = LAND_HAZE
        self._paint_band(canvas, ground, 0.0, 1.5)
        chance, least, most = rule.water
        self.shore = draw.between(least, most) if draw.chance(chance) else 0.0
        if self.shore:
            water = canvas.surface("water", "", "water", draw.near(draw.pick(WATERS), 0.05))
            self._band(canvas, water, 0.0, self.shore)
        self._paint_strip(canvas, draw.pick(rule.strips))

    def y(self, x: float, depth: float) -> float:
        """Return the height in the picture of the ground at a depth. The horizon's tilt fades towards the viewer."""
        return self.horizon + depth * (UNITS - self.horizon) + self.tilt * (x - UNITS / 2) * max(1 - depth, 0.0)

    def _paint_band(self, canvas: Canvas, ground: str, near: float, far: float) -> None:
        (object_, material), colours = GROUND_LOOKS[ground]
        surface = canvas.surface(object_, "", material, canvas.draw.near(canvas.draw.pick(colours), 0.05))
        self._band(canvas, surface, near, far)

    def _band(self, canvas: Canvas, surface: int, far: float, near: float) -> None:
        """Fill the ground between two depths."""
        top_left, top_right = self.y(0, far), self.y(UNITS, far)
        if far == 0.0 and near > 1:  # the whole ground: everything below the tilted horizon
            edge = top_left + (top_right - top_left) * (canvas.x * (1 / UNITS))
            canvas.map[canvas.y >= edge] = surface
            return
        box = canvas.window(0, min(top_left, top_right), UNITS, max(self.y(0, near), self.y(UNITS, near)))
        if box:
            rows, columns = box
            along = canvas.x[:, columns] * (1 / UNITS)
            y = canvas.y[rows]
            inside = y >= top_left + (top_right - top_left) * along
            inside &= y < self.y(0, near) + (self.y(UNITS, near) - self.y(0, near)) * along
            canvas.map[box][inside] = surface

    def _paint_strip(self, canvas: Canvas, strip: str) -> None:
        """Draw a band of road, path or field across the land."""
        draw = canvas.draw
        if not strip:
            return
        width = draw.between(0.24, 0.4) if strip != "path" else draw.between(0.08, 0.2)
        far = draw.between(self.shore + 0.05, max(self.shore + 0.06, 0.95 - width))
        near = far + width
        if strip == "field":
            self._paint_band(canvas, draw.pick(("soil", "grass", "autumn")), far, near)
            return
        if strip == "path":
            self._band(canvas, canvas.surface("pavement", "", "soil", draw.near(draw.pick(PATHS))), far, near)
            return
        self.road = far, near
        self._band(canvas, canvas.surface("road", "", "asphalt", draw.near(draw.pick(ASPHALTS), 0.04)), far, near)
        paint = canvas.surface(
            "road", "road marking", "asphalt", draw.near(draw.pick(((0.92, 0.90, 0.84), (0.90, 0.75, 0.2))), 0.04)
        )
        middle = (far + near) / 2
        x, gap = draw.between(-6, 0), draw.between(9, 12)
        while x < UNITS:
            y = self.y(x, middle)
            canvas.rectangle(paint, x, y - 0.5, x + gap * 0.55, y + 0.7)
            x += gap

    def depth(self, draw: Draw, place: str) -> float:
        """Return a depth at which an object of a place may stand."""
        if place == "horizon":
            return draw.between(0.02, 0.1)
        if place == "water" and self.shore:
            return draw.between(0.3, 0.95) * self.shore
        if place == "road" and self.road:
            far, near = self.road
            return draw.between(far + 0.35 * (near - far), near)
        return draw.between(max(0.08, self.shore + 0.1), 0.98)


def _place(canvas: Canvas, land: _Land, rule: Rule) -> None:
    """Draw the cast and the strays, far ones first."""
    draw = canvas.draw
    cast = rule.cast
    if draw.chance(STRAY):
        cast = (*cast, draw.pick(STRAYS))
    placed: list[tuple[float, float, float, Painter]] = []
    for member in cast:
        for _ in range(draw.pick(member.counts)):
            depth = land.depth(draw, member.place)
            x = _free_spot(draw, [x for other, x, _, _ in placed if abs(other - depth) < 0.3])
            placed.append((depth, x, draw.between(member.low, member.high), member.painter))
    for depth, x, height, painter in sorted(placed, key=lambda one: one[0]):
        canvas.stand_at(depth)
        canvas.put(painter, x, land.y(x, depth), height * (0.72 + 0.28 * depth))


def _free_spot(draw: Draw, taken: list[float]) -> float:
    """Return a horizontal position away from those taken; after a few tries, accept any (objects may overlap)."""
    x = draw.between(4, 60)
    for _ in range(3):
        if all(abs(x - other) >= CROWDED for other in taken):
            break
        x = draw.between(4, 60)
    return x
