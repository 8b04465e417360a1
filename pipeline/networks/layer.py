"""The properties of a layer that no image determines, as tasks carry them: imported without torch."""

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
    special : number of class and register tokens, which come before the tokens of the grid.
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
