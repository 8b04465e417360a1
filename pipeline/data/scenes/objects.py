"""Things in a scene. Each function draws one of them standing at (x, y), its foot, and `h` scene units high.

Colours are drawn from palettes that classes share, so that no class owns a colour.
"""

from pipeline.data.scenes.canvas import Canvas, Colour

PAINTS: tuple[Colour, ...] = (
    (0.78, 0.14, 0.12), (0.88, 0.48, 0.12), (0.90, 0.80, 0.20), (0.20, 0.52, 0.22), (0.15, 0.32, 0.72),
    (0.45, 0.20, 0.52), (0.92, 0.55, 0.66), (0.92, 0.92, 0.90), (0.55, 0.55, 0.56), (0.16, 0.16, 0.18),
    (0.46, 0.28, 0.15), (0.35, 0.66, 0.80),
)  # fmt: skip
SKINS: tuple[Colour, ...] = ((0.92, 0.74, 0.62), (0.75, 0.55, 0.42), (0.45, 0.30, 0.22))
WALLS: tuple[tuple[Colour, str], ...] = (
    ((0.62, 0.32, 0.24), "brick"), ((0.78, 0.68, 0.50), "plaster"), ((0.90, 0.88, 0.82), "plaster"),
    ((0.48, 0.32, 0.20), "wood"), ((0.68, 0.16, 0.13), "wood"), ((0.55, 0.62, 0.68), "wood"),
)  # fmt: skip
ROOFS: tuple[Colour, ...] = ((0.52, 0.20, 0.15), (0.30, 0.30, 0.33), (0.40, 0.25, 0.15), (0.25, 0.30, 0.42))
FACADES: tuple[tuple[Colour, str], ...] = (
    ((0.62, 0.62, 0.64), "concrete"), ((0.72, 0.62, 0.50), "plaster"), ((0.52, 0.34, 0.28), "brick"),
    ((0.40, 0.46, 0.54), "concrete"), ((0.84, 0.82, 0.76), "plaster"), ((0.60, 0.24, 0.20), "brick"),
)  # fmt: skip
GREENS: tuple[Colour, ...] = ((0.12, 0.36, 0.16), (0.22, 0.48, 0.16), (0.32, 0.46, 0.14), (0.10, 0.30, 0.24))
AUTUMN: tuple[Colour, ...] = ((0.80, 0.42, 0.10), (0.72, 0.22, 0.12), (0.82, 0.66, 0.18), (0.45, 0.26, 0.12))
ROCKS: tuple[Colour, ...] = ((0.42, 0.41, 0.41), (0.46, 0.36, 0.29), (0.35, 0.39, 0.45), (0.54, 0.46, 0.36))
WOODS: tuple[Colour, ...] = ((0.50, 0.33, 0.20), (0.85, 0.83, 0.80), (0.36, 0.25, 0.16), (0.70, 0.52, 0.34))
BARK: Colour = (0.36, 0.25, 0.17)
SNOW: Colour = (0.92, 0.93, 0.97)
PANE: Colour = (0.36, 0.50, 0.62)
LAMPLIGHT: Colour = (0.98, 0.86, 0.48)


def _pane(canvas: Canvas, object_: str, part: str) -> int:
    """Return the surface of window glass, lit from within on some nights."""
    draw = canvas.draw
    if canvas.night and draw.chance(0.6):
        return canvas.surface(object_, part, "glass", draw.near(LAMPLIGHT, 0.04), glow=1.0)
    return canvas.surface(object_, part, "glass", draw.near(PANE, 0.1))


def tree(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    season = draw.random()
    if canvas.winter and season < 0.45:
        colour, material = SNOW, "snow"
    elif season < 0.65:
        colour, material = draw.pick(GREENS), "foliage"
    else:
        colour, material = draw.pick(AUTUMN), "foliage"
    trunk = canvas.surface("tree", "tree trunk", "wood", draw.near(BARK))
    crown = canvas.surface("tree", "tree crown", material, draw.near(colour))
    half = h * draw.between(0.28, 0.42)
    canvas.shadow(x, y, half, h * 0.07)
    canvas.rectangle(trunk, x - h * 0.05, y - h * 0.38, x + h * 0.05, y)
    if draw.chance(0.5):
        canvas.triangle(crown, x, y - h, y - h * 0.6, x - half * 0.65, x + half * 0.65)
        canvas.triangle(crown, x, y - h * 0.8, y - h * 0.2, x - half, x + half)
    else:
        canvas.ellipse(crown, x, y - h * 0.68, half * 0.85, h * 0.32)
        canvas.ellipse(crown, x + draw.pick((-0.4, 0.4)) * half, y - h * 0.52, half * 0.7, h * 0.2)


def bush(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    leaves = canvas.surface("bush", "", "foliage", draw.near(draw.pick(GREENS if draw.chance(0.6) else AUTUMN)))
    canvas.dome(leaves, x, y, h * 0.7, h)
    canvas.dome(leaves, x + h * 0.6, y, h * 0.5, h * 0.7)


def cactus(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    flesh = canvas.surface("cactus", "", "foliage", draw.near(draw.pick(GREENS)))
    half = h * 0.1
    canvas.shadow(x, y, half * 3, h * 0.06)
    canvas.rectangle(flesh, x - half, y - h + half, x + half, y)
    canvas.dome(flesh, x, y - h + half, half, half)
    sides = draw.pick(((-1,), (1,), (-1, 1), (-1, 1), (-1, 1)))
    for side in sides:
        elbow, tip = y - h * draw.between(0.32, 0.5), h * draw.between(0.22, 0.34)
        arm = x + side * h * 0.32
        canvas.rectangle(flesh, min(x, arm), elbow - half * 0.8, max(x, arm), elbow + half * 0.8)
        canvas.rectangle(flesh, arm - half * 0.8, elbow - tip, arm + half * 0.8, elbow + half * 0.8)


def rock(canvas: Canvas, x: float, y: float, h: float) -> None:
    stone = canvas.surface("rock", "", "rock", canvas.draw.near(canvas.draw.pick(ROCKS)))
    canvas.shadow(x, y, h * 1.2, h * 0.15)
    canvas.dome(stone, x, y, h * 0.75, h)
    canvas.dome(stone, x + h * 0.6, y, h * 0.55, h * 0.6)


def house(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    width = h * draw.between(0.95, 1.35)
    colour, material = draw.pick(WALLS)
    wall = canvas.surface("house", "house wall", material, draw.near(colour))
    if canvas.winter and draw.chance(0.5):
        roof = canvas.surface("house", "house roof", "snow", draw.near(SNOW, 0.03))
    else:
        roof = canvas.surface("house", "house roof", "brick", draw.near(draw.pick(ROOFS)))
    canvas.shadow(x, y, width * 0.62, h * 0.08)
    canvas.rectangle(wall, x - width / 2, y - h * 0.58, x + width / 2, y)
    if draw.chance(0.3):
        canvas.rectangle(wall, x + width * 0.2, y - h * 0.98, x + width * 0.3, y - h * 0.6)
    if draw.chance(0.6):
        canvas.triangle(roof, x, y - h, y - h * 0.54, x - width * 0.62, x + width * 0.62)
    else:
        canvas.trapezoid(
            roof, y - h * 0.9, x - width * 0.4, x + width * 0.4, y - h * 0.54, x - width * 0.62, x + width * 0.62
        )
    door = canvas.surface("house", "house door", "wood", draw.near(draw.pick(PAINTS)))
    entrance = draw.pick((-0.3, 0.0, 0.3)) * width
    canvas.rectangle(door, x + entrance - width * 0.08, y - h * 0.34, x + entrance + width * 0.08, y)
    pane = _pane(canvas, "house", "house window")
    for place in (-0.3, 0.0, 0.3):
        if abs(place * width - entrance) > width * 0.1:
            middle = x + place * width
            canvas.rectangle(pane, middle - width * 0.09, y - h * 0.46, middle + width * 0.09, y - h * 0.24)


def building(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw a house of several floors with a flat roof."""
    draw = canvas.draw
    width = draw.between(9, 16) * min(1.0, h / 18)
    colour, material = draw.pick(FACADES)
    wall = canvas.surface("building", "building wall", material, draw.near(colour))
    pane = _pane(canvas, "building", "building window")
    canvas.rectangle(wall, x - width / 2, y - h, x + width / 2, y)
    columns, floors = max(2, int(width / 4)), max(2, int(h / 5.5))
    step, storey = width / columns, h / floors
    for floor in range(floors):
        top = y - h + (floor + 0.25) * storey
        for column in range(columns):
            left = x - width / 2 + (column + 0.25) * step
            canvas.rectangle(pane, left, top, left + step * 0.5, top + storey * 0.5)


def person(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    head = canvas.surface("person", "person head", "skin", draw.near(draw.pick(SKINS), 0.04))
    torso = canvas.surface("person", "person torso", "fabric", draw.near(draw.pick(PAINTS)))
    legs = canvas.surface("person", "person legs", "fabric", draw.near(draw.pick(PAINTS)))
    canvas.shadow(x, y, h * 0.3, h * 0.07)
    canvas.rectangle(legs, x - h * 0.14, y - h * 0.42, x - h * 0.02, y)
    canvas.rectangle(legs, x + h * 0.03, y - h * 0.42, x + h * 0.15, y)
    canvas.trapezoid(torso, y - h * 0.78, x - h * 0.2, x + h * 0.2, y - h * 0.38, x - h * 0.15, x + h * 0.15)
    canvas.ellipse(head, x, y - h * 0.87, h * 0.12, h * 0.14)


def skier(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw a person on skis, with poles."""
    draw = canvas.draw
    side = draw.pick((-1, 1))
    skis = canvas.surface("skis", "", "wood", draw.near(draw.pick(PAINTS)))
    person(canvas, x, y - h * 0.06, h * 0.94)
    canvas.rectangle(skis, x - h * 0.5, y - h * 0.08, x + h * 0.5, y + h * 0.03)
    canvas.rectangle(skis, x + side * h * 0.44, y - h * 0.16, x + side * h * 0.54, y - h * 0.05)
    for hand in (-0.32, 0.32):
        canvas.rectangle(skis, x + hand * h - h * 0.03, y - h * 0.6, x + hand * h + h * 0.03, y)


def boat(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    width = h * draw.between(0.85, 1.1)
    hull = canvas.surface("boat", "boat hull", draw.pick(("wood", "metal")), draw.near(draw.pick(PAINTS)))
    mast = canvas.surface("boat", "boat mast", "wood", draw.near(draw.pick(WOODS)))
    sail = canvas.surface("boat", "boat sail", "fabric", draw.near(draw.pick(PAINTS)))
    canvas.shadow(x, y, width * 0.6, h * 0.08)
    canvas.rectangle(mast, x - h * 0.03, y - h, x + h * 0.03, y - h * 0.2)
    canvas.triangle(sail, x + h * 0.05, y - h * 0.96, y - h * 0.3, x + h * 0.05, x + width * 0.5)
    if draw.chance(0.7):
        canvas.triangle(sail, x - h * 0.05, y - h * 0.85, y - h * 0.3, x - width * 0.4, x - h * 0.05)
    canvas.trapezoid(hull, y - h * 0.24, x - width * 0.58, x + width * 0.58, y, x - width * 0.38, x + width * 0.38)


def pier(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw a deck on posts that comes in from a side of the picture."""
    draw = canvas.draw
    wood = canvas.surface("pier", "", "wood", draw.near(draw.pick(WOODS)))
    length = draw.between(22, 34)
    left, right = (-2.0, length) if draw.chance(0.5) else (64 - length, 66.0)
    post = left + 3
    while post < right:
        canvas.rectangle(wood, post, y - h * 0.6, post + h * 0.22, y)
        post += h * 1.1
    canvas.rectangle(wood, left, y - h, right, y - h * 0.45)


def car(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    width = h * draw.between(1.9, 2.3)
    body = canvas.surface("car", "car body", "metal", draw.near(draw.pick(PAINTS)))
    pane = canvas.surface("car", "car window", "glass", draw.near(PANE, 0.08))
    wheel = canvas.surface("car", "car wheel", "rubber", draw.near((0.08, 0.08, 0.09), 0.03))
    canvas.shadow(x, y, width * 0.55, h * 0.12)
    canvas.trapezoid(body, y - h, x - width * 0.25, x + width * 0.22, y - h * 0.5, x - width * 0.4, x + width * 0.36)
    canvas.trapezoid(
        pane, y - h * 0.9, x - width * 0.2, x + width * 0.17, y - h * 0.56, x - width * 0.3, x + width * 0.27
    )
    canvas.rectangle(body, x - width * 0.03, y - h * 0.9, x + width * 0.03, y - h * 0.5)
    canvas.rectangle(body, x - width / 2, y - h * 0.56, x + width / 2, y - h * 0.16)
    canvas.ellipse(wheel, x - width * 0.29, y - h * 0.22, h * 0.23, h * 0.23)
    canvas.ellipse(wheel, x + width * 0.29, y - h * 0.22, h * 0.23, h * 0.23)


def plane(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    side = draw.pick((-1, 1))
    length = h * 1.25
    body = canvas.surface("plane", "plane body", "metal", draw.near(draw.pick(PAINTS)))
    tail = canvas.surface("plane", "plane tail", "metal", draw.near(draw.pick(PAINTS)))
    wing = canvas.surface(
        "plane", "plane wing", "metal", draw.near(draw.pick(((0.62, 0.64, 0.68), (0.35, 0.37, 0.42))))
    )
    pane = canvas.surface("plane", "plane window", "glass", draw.near((0.2, 0.27, 0.36)))
    canvas.shadow(x, y, length * 0.9, h * 0.1)
    end = x - side * length
    canvas.trapezoid(tail, y - h, end - h * 0.16, end + h * 0.1, y - h * 0.36, end - h * 0.2, end + h * 0.2)
    canvas.ellipse(body, x, y - h * 0.36, length, h * 0.22)
    for window in (-0.55, -0.3, -0.05, 0.2, 0.45, 0.7):
        middle = x + side * window * length
        canvas.rectangle(pane, middle - h * 0.05, y - h * 0.48, middle + h * 0.05, y - h * 0.38)
    sweep = x - side * h * 0.5
    canvas.trapezoid(wing, y - h * 0.36, x - h * 0.22, x + h * 0.26, y, sweep - h * 0.2, sweep + h * 0.06)


def parasol(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    half = h * draw.between(0.48, 0.6)
    pole = canvas.surface("parasol", "parasol pole", "wood", draw.near(draw.pick(WOODS)))
    cloth = canvas.surface("parasol", "parasol canopy", "fabric", draw.near(draw.pick(PAINTS)))
    stripe = canvas.surface("parasol", "parasol canopy", "fabric", draw.near(draw.pick(PAINTS)))
    canvas.shadow(x + h * 0.1, y, half, h * 0.08)
    canvas.rectangle(pole, x - h * 0.03, y - h * 0.7, x + h * 0.03, y)
    canvas.dome(cloth, x, y - h * 0.5, half, h * 0.5)
    canvas.dome(stripe, x, y - h * 0.5, half * 0.62, h * 0.5)
    canvas.dome(cloth, x, y - h * 0.5, half * 0.24, h * 0.5)


def fence(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    wood = canvas.surface("fence", "", "wood", draw.near(draw.pick(WOODS)))
    length = draw.between(26, 50)
    left, right = x - length / 2, x + length / 2
    canvas.rectangle(wood, left, y - h * 0.85, right, y - h * 0.62)
    canvas.rectangle(wood, left, y - h * 0.42, right, y - h * 0.2)
    post = left
    while post < right:
        canvas.rectangle(wood, post, y - h, post + h * 0.22, y)
        post += h * 0.75


def cow(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    side = draw.pick((-1, 1))
    coat = draw.near(draw.pick(((0.88, 0.86, 0.82), (0.52, 0.32, 0.20), (0.26, 0.22, 0.20), (0.72, 0.52, 0.34))))
    patch = draw.near(draw.pick(((0.88, 0.86, 0.82), (0.20, 0.17, 0.16), (0.45, 0.27, 0.17))))
    body = canvas.surface("cow", "cow body", "hide", coat)
    spot = canvas.surface("cow", "cow body", "hide", patch)
    head = canvas.surface("cow", "cow head", "hide", patch)
    legs = canvas.surface("cow", "cow legs", "hide", draw.near(coat, 0.04))
    canvas.shadow(x, y, h * 0.7, h * 0.08)
    for place in (-0.5, -0.3, 0.3, 0.5):
        canvas.rectangle(legs, x + (place - 0.07) * h, y - h * 0.45, x + (place + 0.07) * h, y)
    canvas.ellipse(body, x, y - h * 0.62, h * 0.66, h * 0.29)
    canvas.ellipse(spot, x + h * draw.between(-0.35, 0.35), y - h * 0.66, h * 0.22, h * 0.17)
    canvas.ellipse(head, x + side * h * 0.76, y - h * 0.8, h * 0.22, h * 0.18)


def swan(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw a swan or a duck: a low body, a neck, a head with a beak."""
    draw = canvas.draw
    side = draw.pick((-1, 1))
    plumage = draw.near(draw.pick(((0.94, 0.94, 0.92), (0.42, 0.32, 0.24), (0.16, 0.16, 0.18), (0.62, 0.60, 0.58))))
    body = canvas.surface("swan", "swan body", "feathers", plumage)
    head = canvas.surface("swan", "swan head", "feathers", draw.near(plumage, 0.04))
    neck = x + side * h * 0.5
    canvas.shadow(x, y, h * 0.8, h * 0.1)
    canvas.ellipse(body, x, y - h * 0.27, h * 0.7, h * 0.29)
    canvas.triangle(body, x - side * h * 0.8, y - h * 0.62, y - h * 0.2, x - h * 0.8, x + h * 0.8)
    canvas.rectangle(head, neck - h * 0.09, y - h * 0.9, neck + h * 0.09, y - h * 0.3)
    canvas.ellipse(head, neck + side * h * 0.12, y - h * 0.86, h * 0.23, h * 0.15)


def bench(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    wood = canvas.surface("bench", "", "wood", draw.near(draw.pick(WOODS + PAINTS[:5])))
    canvas.shadow(x, y, h * 1.1, h * 0.12)
    canvas.rectangle(wood, x - h, y - h, x + h, y - h * 0.7)
    canvas.rectangle(wood, x - h, y - h * 0.5, x + h, y - h * 0.3)
    for leg in (-0.85, 0.65):
        canvas.rectangle(wood, x + leg * h, y - h * 0.7, x + (leg + 0.2) * h, y)


def lamp(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    post = canvas.surface("lamp", "lamp post", "metal", draw.near(draw.pick(((0.24, 0.25, 0.27), (0.66, 0.66, 0.66)))))
    light = canvas.surface("lamp", "lamp light", "glass", draw.near(LAMPLIGHT, 0.05), glow=1.0 if canvas.night else 0.0)
    canvas.rectangle(post, x - h * 0.03, y - h * 0.85, x + h * 0.03, y)
    canvas.rectangle(post, x - h * 0.14, y - h * 0.9, x + h * 0.14, y - h * 0.84)
    canvas.ellipse(light, x - h * 0.13, y - h * 0.9, h * 0.08, h * 0.09)
    canvas.ellipse(light, x + h * 0.13, y - h * 0.9, h * 0.08, h * 0.09)


def sign(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw a board on a post: a triangle, a disc or a direction sign."""
    draw = canvas.draw
    post = canvas.surface("sign", "sign post", "metal", draw.near((0.6, 0.6, 0.6)))
    rim = canvas.surface("sign", "sign board", "metal", draw.near(draw.pick(PAINTS)))
    face = canvas.surface("sign", "sign board", "metal", draw.near(draw.pick(PAINTS)))
    canvas.rectangle(post, x - h * 0.035, y - h * 0.7, x + h * 0.035, y)
    shape = draw.pick(("triangle", "disc", "board"))
    if shape == "triangle":
        canvas.triangle(rim, x, y - h, y - h * 0.5, x - h * 0.3, x + h * 0.3)
        canvas.triangle(face, x, y - h * 0.85, y - h * 0.57, x - h * 0.16, x + h * 0.16)
    elif shape == "disc":
        canvas.ellipse(rim, x, y - h * 0.75, h * 0.25, h * 0.25)
        canvas.ellipse(face, x, y - h * 0.75, h * 0.14, h * 0.14)
    else:
        canvas.rectangle(rim, x - h * 0.38, y - h, x + h * 0.38, y - h * 0.55)
        canvas.rectangle(face, x - h * 0.25, y - h * 0.87, x + h * 0.25, y - h * 0.7)


def mountain(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    half = h * draw.between(0.8, 1.5)
    peak = x + half * draw.between(-0.3, 0.3)
    side = canvas.surface("mountain", "mountain side", "rock", draw.near(draw.pick(ROCKS)))
    canvas.triangle(side, peak, y - h, y, x - half, x + half)
    if draw.chance(0.5):
        shoulder = x + half * draw.pick((-0.5, 0.5))
        canvas.triangle(
            side, shoulder, y - h * draw.between(0.55, 0.75), y, shoulder - half * 0.7, shoulder + half * 0.7
        )
    if draw.chance(0.6):
        cap = canvas.surface("mountain", "mountain cap", "snow", draw.near(SNOW, 0.04))
        share = draw.between(0.22, 0.42)
        left, right = peak + (x - half - peak) * share, peak + (x + half - peak) * share
        edge = y - h * (1 - share)
        canvas.triangle(cap, peak, y - h, edge, left, right)
        for place in (0.2, 0.5, 0.8):  # tongues of snow below the edge
            tongue = left + (right - left) * place
            canvas.trapezoid(cap, edge, tongue - h * 0.05, tongue + h * 0.05, edge + h * 0.09, tongue, tongue)


def cloud(canvas: Canvas, x: float, y: float, h: float) -> None:
    draw = canvas.draw
    vapour = canvas.surface("cloud", "", "vapour", draw.near((0.93, 0.93, 0.95), 0.05))
    canvas.ellipse(vapour, x, y - h * 0.5, h * 1.2, h * 0.5)
    canvas.ellipse(vapour, x - h * 1.1, y - h * 0.35, h * 0.9, h * 0.35)
    canvas.ellipse(vapour, x + h * 1.0, y - h * 0.3, h * 0.8, h * 0.3)


def sun(canvas: Canvas, x: float, y: float, h: float) -> None:
    """Draw the sun, or the moon at night."""
    colour = (0.96, 0.96, 0.90) if canvas.night else (0.99, 0.90, 0.50)
    disc = canvas.surface("sun", "", "", canvas.draw.near(colour, 0.04), glow=1.0)
    canvas.ellipse(disc, x, y - h / 2, h / 2, h / 2)
