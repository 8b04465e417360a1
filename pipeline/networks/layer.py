"""The properties of a network and its layers that no image determines: imported without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

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
    special : number of class and register tokens beside the tokens of the grid.
    dtype : of the output, as torch names it without `torch.`.
    kind : the module's class.
    last : how many of the special tokens come after the tokens of the grid; the others come before.
    """

    name: str
    shape: tuple[int, int, int]
    layout: Layout
    special: int
    dtype: str
    kind: str
    last: int = 0

    @property
    def first(self) -> int:
        """The number of special tokens before those of the grid."""
        return self.special - self.last

    @property
    def spatial(self) -> bool:
        return self.shape[1] * self.shape[2] > 1


@dataclass(frozen=True)
class Misplaced:
    """A layer that keeps its likeliest reading although its positions do not lie where that says.

    Attributes
    ----------
    reason : why, after "layer ... of ...".
    out_of_order : there are positions, in another order; else there are none.
    """

    layer: LayerInfo
    reason: str
    out_of_order: bool

    def keeps(self, features: str) -> bool:
        """Return whether features of the output, as `networks.features` names them, do not depend on the reading."""
        tokens_alone = self.layer.layout == "tokens" and not self.layer.special
        return features == "whole" or (features == "pooled" and tokens_alone)


@dataclass(frozen=True)
class Inspection:
    """The properties of a network that do not depend on its weights.

    Attributes
    ----------
    layers : the wanted ones, in execution order.
    activation_bytes : per layer, of its float16 activations for all images, before compression.
    parameters : number of trainable values.
    largest : values of the largest output of any module, for one image.
    ablation : per layer whose units are to be removed, the floating-point operations per pair of a unit and an image;
        None if the network cannot be cut there and all of it runs.
    output : shape of the network's output for one image; (classes,) for a classifier.
    classes : number of logits, or None if the network has no head.
    compared : names of the layers that are compared, if these are others.
    misplaced : those among the layers that are compared whose positions are not where they seem.
    notices : what a person should know before the run, a sentence each.
    alone : what goes wrong with a batch of one image; empty if nothing does.
    explainable : what `pipeline.networks.explainable` found, if it was asked.
    """

    architecture: str
    layers: list[LayerInfo]
    activation_bytes: dict[str, int]
    parameters: int
    largest: int
    output: tuple[int, ...]
    classes: int | None
    ablation: dict[str, float | None] = field(default_factory=dict)
    compared: list[str] = field(default_factory=list)
    misplaced: list[Misplaced] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    alone: str = ""
    explainable: dict[str, Any] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def read(answer: Mapping[str, Any]) -> Inspection:
        """Return the inspection that `json` gave."""
        layers = list(map(_layer, answer["layers"]))
        misplaced = [Misplaced(**{**each, "layer": _layer(each["layer"])}) for each in answer["misplaced"]]
        return Inspection(**{**answer, "layers": layers, "misplaced": misplaced, "output": tuple(answer["output"])})


def _layer(answer: Mapping[str, Any]) -> LayerInfo:
    return LayerInfo(**{**answer, "shape": tuple(answer["shape"])})
