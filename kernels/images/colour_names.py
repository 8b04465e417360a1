"""Name the colour of each pixel with one of eleven basic colour terms.

The eleven terms are those of Berlin & Kay, *Basic Color Terms* (1969). A handwritten rule partitions the colour cube;
it was not learned from anybody's naming data. Hue comes from HSV, because HSV hue separates blue from purple cleanly;
lightness and chroma come from CIELAB (D65), because CIELAB lightness makes dark orange *brown* and light red *pink*.
Borderline colours (teal, beige, maroon) have no right answer, so the rule is only required to be stable.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

COLOURS = ("black", "grey", "white", "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")

BITS = 5  # per channel; 32,768 table entries, each named after the colour at its bin's centre
BLOCK = 1 << 16  # pixels at a time, so that the index array stays in cache


def colour_names(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Name every pixel.

    Parameters
    ----------
    rgb : uint8 array, shape (..., 3)
        sRGB, channel last. A view of a channel-first array (`np.moveaxis(image, -3, -1)`) is the fast case.

    Returns
    -------
    uint8 array, shape (...)
        Index into `COLOURS`.
    """
    if rgb.dtype != np.uint8 or rgb.ndim == 0 or rgb.shape[-1] != 3:
        raise ValueError(f"colour_names expects uint8 of shape (..., 3), found {rgb.dtype} of shape {rgb.shape}")
    table = colour_table()
    names = np.empty(rgb.shape[:-1], np.uint8)
    if rgb.ndim == 1:
        return table[_index(rgb)]
    # Split along the first axis, so that a channel-first view is never copied as a whole.
    rows = max(1, BLOCK * len(rgb) // max(1, names.size))
    for start in range(0, len(rgb), rows):
        np.take(table, _index(rgb[start : start + rows]), out=names[start : start + rows], mode="clip")
    return names


def _index(rgb: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Return each pixel's index into the table: the high bits of red, green and blue side by side."""
    drop = 8 - BITS
    index = (rgb[..., 0] >> drop).astype(np.intp)
    for channel in (1, 2):
        index <<= BITS
        index |= rgb[..., channel] >> drop
    return index


@lru_cache(maxsize=1)
def colour_table() -> NDArray[np.uint8]:
    """Return the colour name of every bin, shape (2 ** (3 * BITS),), with red in the highest bits."""
    level = (np.arange(1 << BITS) + 0.5) / (1 << BITS)
    red, green, blue = np.meshgrid(level, level, level, indexing="ij")
    table = _partition(np.stack([red, green, blue], axis=-1)).reshape(-1)
    table.setflags(write=False)
    return table


def _partition(rgb: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Name colours of sRGB in [0, 1]. Later lines override earlier ones."""
    hue, value = _hue_value(rgb)
    lightness, chroma = _lightness_chroma(rgb)
    name = np.full(hue.shape, COLOURS.index("red"), np.uint8)

    def call(colour: str, where: NDArray[np.bool_]) -> None:
        name[where] = COLOURS.index(colour)

    call("orange", (hue >= 14) & (hue < 43))
    call("yellow", (hue >= 43) & (hue < 66))
    call("green", (hue >= 66) & (hue < 170))
    call("blue", (hue >= 170) & (hue < 255))
    call("purple", (hue >= 255) & (hue < 340))
    reddish = (hue >= 330) | (hue < 14)
    # Light reds and light purples are pink; so is anything vivid between purple and red.
    call("pink", (hue >= 285) & (hue < 345) & (lightness > 55))
    call("pink", (hue >= 315) & (hue < 345) & (lightness > 45) & (chroma > 40))
    call("pink", reddish & (lightness > 62))
    # Dark or dull oranges, dull dark reds and dark yellows are brown; dark greenish yellow (olive) is green.
    orange = (hue >= 14) & (hue < 48)
    call("brown", orange & ((lightness < 60) | ((chroma < 30) & (lightness < 80))))
    call("brown", ((hue < 14) | (hue >= 345)) & (lightness < 50) & (chroma < 60))
    call("brown", (hue >= 48) & (hue < 55) & (lightness < 55))
    call("green", (hue >= 55) & (hue < 66) & (lightness < 62))
    grey = chroma < 11
    call("grey", grey)
    call("white", (grey & (lightness >= 84)) | ((chroma < 16) & (lightness >= 92)))
    call("black", (value < 0.2) | ((lightness < 20) & (chroma < 14)))
    return name


def _hue_value(rgb: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return HSV hue in degrees [0, 360), 0 for greys, and HSV value in [0, 1]."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value = rgb.max(-1)
    spread = value - rgb.min(-1)
    step = np.where(spread > 0, spread, 1.0)
    hue = np.where(
        value == red,
        (green - blue) / step % 6,
        np.where(value == green, (blue - red) / step + 2, (red - green) / step + 4),
    )
    return 60 * hue % 360, value


def _lightness_chroma(rgb: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return CIELAB L* in [0, 100] and C*ab of sRGB (IEC 61966-2-1, white point D65)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(1)
    delta = 6 / 29
    f = np.where(xyz > delta**3, np.cbrt(xyz), xyz / (3 * delta**2) + 4 / 29)
    return 116 * f[..., 1] - 16, np.hypot(500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2]))
