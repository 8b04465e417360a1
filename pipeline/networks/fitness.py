"""What is known of a network's fitness for explanations: imported without torch."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.networks.layer import LayerInfo

DEPTH = re.compile(r"depth (\d+)(-(\d*))?")
"""Names linear layers by their number in the forward, from 1 on: `depth 3`, `depth 1-4`, `depth 5-`."""
INPUT_RULES = ("z_b", "w_squared")
"""Rules of LRP for the linear map that reads the input itself."""
Pooling = Literal["mean", "sum"]
Link = Literal["logit", "probability", "log_probability"]
Normalised = Literal["", "softmax", "log_softmax"]


@dataclass(frozen=True)
class Head:
    """Global pooling and one linear map, which end a network after a layer: the map's module, and the pooling."""

    module: str
    pooling: Pooling


@dataclass(frozen=True)
class Attention:
    """Attention over tokens: a layer that says where they lie, and those that the logits are read from."""

    layer: LayerInfo
    read: tuple[int, ...]

    @property
    def note(self) -> str:
        """Which tokens' attention is shown, where it is not that of the class token alone."""
        if self.read == (0,) and self.layer.first:
            return ""
        return f"the mean over the {len(self.read)} tokens that the logits are read from"


@dataclass(frozen=True)
class Explainable:
    """What was found.

    Attributes
    ----------
    refused : why a need is not met, a sentence, by need. Keys `layer:NAME` and `cam:NAME` refuse one layer; an empty
        NAME is the default layer. The key "" refuses all.
    layers : the layer of each name that was asked for; that of "" is the default.
    heads : of a layer after which pooling and one linear map end the network. linear : the layers after which the
        logits are linear in its output.
    homogeneous : whether a doubled input doubles the logits: piecewise linear, without biases.
    normalised : whether the network ends in a softmax or its logarithm.
    attention : if there is attention over the whole image.
    classes : logits of an image. values : of all outputs of layers, for an image.
    units : layers by name, for the relevance of their units. modules : names of all modules.
    linear_maps : the modules that call convolutions and linear maps, in order, and whether each reads the input itself.
    rectified : whether the network calls ReLU.
    """

    refused: dict[str, str] = field(default_factory=dict)
    layers: dict[str, LayerInfo] = field(default_factory=dict)
    heads: dict[str, Head] = field(default_factory=dict)
    linear: list[str] = field(default_factory=list)
    homogeneous: bool = False
    normalised: Normalised = ""
    attention: Attention | None = None
    classes: int = 0
    values: int = 0
    units: dict[str, LayerInfo] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)
    linear_maps: list[tuple[str, bool]] = field(default_factory=list)
    rectified: bool = False

    @property
    def patches(self) -> tuple[int, int] | None:
        """The rows and columns of the network's patches; None where no attention reaches over the image."""
        return None if self.attention is None else (self.attention.layer.shape[1], self.attention.layer.shape[2])

    def why_not(self, needs: Sequence[str], layer: str | None) -> str:
        """Return why a method with these needs, and a layer of this name, does not apply; empty if it does."""
        keys = ["", *needs, *(f"{need}:{layer or ''}" for need in needs)]
        return next((self.refused[key] for key in keys if key in self.refused), "")

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(answer: Mapping[str, Any]) -> Explainable:
        """Return what `json` gave; nothing was asked, or could be, where the answer is empty."""
        if not answer:
            return Explainable()
        layers, units = ({name: _layer(each) for name, each in answer[key].items()} for key in ("layers", "units"))
        heads = {name: Head(**each) for name, each in answer["heads"].items()}
        attention = answer["attention"]
        if attention is not None:
            attention = Attention(_layer(attention["layer"]), tuple(attention["read"]))
        read = {"layers": layers, "units": units, "heads": heads, "attention": attention}
        read["linear_maps"] = [(module, bool(raw)) for module, raw in answer["linear_maps"]]
        return Explainable(**{**answer, **read})


def _layer(told: Mapping[str, Any]) -> LayerInfo:
    return LayerInfo(**{**told, "shape": tuple(told["shape"])})


def matches(pattern: str, module: str, depth: int) -> bool:
    """Return whether a pattern names a linear map: by its module, or by its number in the forward, from 1 on."""
    if (found := DEPTH.fullmatch(pattern)) is None:
        return fnmatch.fnmatchcase(module, pattern)
    first, several, last = found.groups()
    return int(first) <= depth and (depth <= int(last) if last else bool(several) or depth == int(first))
