"""What is known of a layer before any image, as tasks carry it: imported without torch."""

import fnmatch
from dataclasses import dataclass
from typing import Literal

Layout = Literal["map", "channels_last", "tokens", "vector"]


@dataclass(frozen=True)
class LayerInfo:
    """One layer, without the batch.

    Attributes
    ----------
    name : the module's name in the network.
    shape : (units, y, x); a vector has one position.
    layout : how the output is laid out: `map` (unit, y, x), `channels_last` (y, x, unit), `tokens` (token, unit),
        `vector` (unit).
    special : class and register tokens, which come before the tokens of the grid.
    dtype : of the output, as torch names it without `torch.`.
    kind : the module's class.
    """

    name: str
    shape: tuple[int, int, int]
    layout: Layout
    special: int
    dtype: str
    kind: str

    @property
    def spatial(self) -> bool:
        return self.shape[1] * self.shape[2] > 1


def fits(name: str, pattern: str) -> bool:
    """Whether a layer's name is this one, or fits a pattern: `*`, `?` and `[...]` stand for characters of one part."""
    names, parts = name.split("."), pattern.split(".")
    return name == pattern or (
        len(names) == len(parts) and all(fnmatch.fnmatchcase(*pair) for pair in zip(names, parts, strict=True))
    )
