"""Texture of each material and sensor noise: tables computed once, looked up at every pixel."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipeline.data.scenes.vocabulary import MATERIAL_NUMBER, MATERIALS

PERIOD = 128  # pixels after which a texture repeats
NOISE_PERIOD = 256
STEPS = 1024  # values are multiples of 1 / STEPS: unlike the last bits of sine and FFT, they agree between machines


@lru_cache(maxsize=1)
def textures() -> NDArray[np.float32]:
    """Return relative changes of brightness, shape (material number, PERIOD, PERIOD); material 0 has none."""
    source = np.random.default_rng(7)
    y, x = np.mgrid[0:PERIOD, 0:PERIOD].astype(np.float64)
    turn = 2 * np.pi / PERIOD

    def noise(down: float, across: float | None = None) -> NDArray[np.float64]:
        """Return periodic Gaussian noise of variance 1, smoothed over that many pixels."""
        spectrum = np.fft.rfft2(source.standard_normal((PERIOD, PERIOD)))
        fy, fx = np.fft.fftfreq(PERIOD)[:, None], np.fft.rfftfreq(PERIOD)[None]
        spectrum *= np.exp(-((3 * fy * down) ** 2) - (3 * fx * (down if across is None else across)) ** 2)
        field = np.fft.irfft2(spectrum, s=(PERIOD, PERIOD))
        return field / field.std()

    mortar = (y % 4 < 1) | ((x + 4 * (y // 4 % 2)) % 8 < 1)
    patterns: dict[str, tuple[NDArray[np.float64], float]] = {
        "air": (noise(6), 0.02),
        "vapour": (noise(3), 0.05),
        "snow": (noise(2.5), 0.05),
        "grass": (noise(2, 0.3), 0.15),
        "leaves": (noise(0.8), 0.18),
        "sand": (noise(0.4) + 0.5 * np.sin(turn * 16 * y + noise(4)), 0.07),
        "water": (np.sin(turn * 24 * y + 1.5 * noise(4)), 0.12),
        "soil": (np.sin(turn * 22 * x + 0.4 * noise(3)), 0.16),
        "asphalt": (noise(0.3), 0.07),
        "concrete": (noise(0.5), 0.04),
        "rock": (noise(1.5), 0.14),
        "foliage": (noise(0.8), 0.2),
        "wood": (np.sin(turn * 32 * x + 0.6 * noise(3)), 0.1),
        "brick": (0.4 - 1.4 * mortar, 0.18),
        "plaster": (noise(1), 0.03),
        "metal": (noise(4), 0.03),
        "glass": (np.sin(turn * 16 * (x + y)), 0.1),
        "rubber": (noise(0.5), 0.05),
        "skin": (noise(2), 0.03),
        "fabric": (np.sin(turn * 32 * y), 0.07),
        "hide": (noise(1), 0.06),
        "feathers": (noise(0.6), 0.05),
    }
    table = np.zeros((1 + len(MATERIALS), PERIOD, PERIOD), np.float32)
    for material, (pattern, strength) in patterns.items():
        table[MATERIAL_NUMBER[material]] = np.round(np.clip(pattern, -2, 2) * strength * STEPS) / STEPS
    table.setflags(write=False)
    return table


@lru_cache(maxsize=2)
def noise_table(size: int) -> NDArray[np.float32]:
    """Return Gaussian noise of variance 1 for three channels, shape (3, side, side) with side = NOISE_PERIOD + size.

    Every window of a picture's size at an offset below the period is one slice.
    """
    tile = np.random.default_rng(8).standard_normal((3, NOISE_PERIOD, NOISE_PERIOD))
    place = np.arange(NOISE_PERIOD + size) % NOISE_PERIOD
    table = (np.round(tile * STEPS) / STEPS).astype(np.float32)[:, place[:, None], place]
    table.setflags(write=False)
    return table
