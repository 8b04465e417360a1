"""What is explained, images and a scalar of each, and the passes through the network that methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Gradients, Target, gradients, in_chunks, of_tensors, padded, scores
from pipeline.networks.graph.attended import Attended
from pipeline.networks.graph.rectified import Rectified, Rule
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import to_maps


@dataclass(frozen=True)
class Attribution:
    """What a method says of each image.

    Attributes
    ----------
    values : like the inputs; None for a method whose map lies on a layer's positions.
    map : (image, y, x), of the inputs' size or the layer's; None for inputs that are no images.
    residual : of the method's law, float64 (image,), NaN where it has none: |left - right| over the larger of the
        score's magnitude and that of its difference to the baseline's.
    facts : further numbers of each image by name, (image,).
    """

    values: torch.Tensor | None
    map: torch.Tensor | None
    residual: torch.Tensor
    facts: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Subject:
    """Images, as a network takes them, and the scalar of each that is explained.

    Attributes
    ----------
    inputs : (image, ...) floating-point.
    target : the scalar. baseline : like the inputs, the input without information; None where no method wants one.
    batch : images per pass; more points of an image go through the network in several passes, fewer are padded.
    layers : the names of layers whose output and gradient methods need.
    of_inputs : whether a method needs the shared pass's gradient of the inputs.
    spans : the range of each image, to which noise is relative. seeds : of each image's noise.
    first : the shared pass; None: it is made when it is needed.
    """

    network: nn.Module
    inputs: torch.Tensor
    target: Target
    baseline: torch.Tensor | None = None
    batch: int = 32
    layers: Sequence[str] = ()
    of_inputs: bool = True
    spans: torch.Tensor | None = None
    seeds: Sequence[int] = ()
    first: Gradients | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    @property
    def shared(self) -> Gradients:
        """One forward and one backward of all images."""
        if self.first is None:
            self.first = gradients(self.network, self.inputs, self.target, self.layers, self.of_inputs)
        return self.first

    @property
    def score(self) -> torch.Tensor:
        return self.shared.score

    @property
    def gradient(self) -> torch.Tensor:
        assert self.shared.inputs is not None
        return self.shared.inputs

    @cached_property
    def baseline_score(self) -> torch.Tensor:
        """The score of each image's baseline, (image,)."""
        return self.scores_at(self.reference, torch.arange(len(self.inputs)))

    @property
    def reference(self) -> torch.Tensor:
        if self.baseline is None:
            raise MicrotomeError("this method compares with a baseline: give one")
        return self.baseline

    @property
    def none(self) -> torch.Tensor:
        """The residual of a method without a law."""
        return torch.full((len(self.inputs),), math.nan, dtype=torch.float64)

    def layer(self, info: LayerInfo) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's maps and the gradient with respect to them, both (image, unit, y, x)."""
        output, gradient = self.shared.layers[info.name]
        return to_maps(output, info)[0], to_maps(gradient, info)[0]

    def scores_at(self, points: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the score at points (point, ...), each for the target of the image `rows[point]`."""
        found = []
        for start, stop in in_chunks(len(points), self.batch):
            own = padded(rows[start:stop], self.batch)
            values = scores(self.network, padded(points[start:stop], self.batch), self.target.at(own))
            found.append(values[: stop - start])
        return torch.cat(found)

    def gradients_at(self, points: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the gradient at no more points than a pass takes, each for the target of the image `rows[point]`."""
        own = padded(rows, self.batch)
        made = gradients(self.network, padded(points, self.batch), self.target.at(own))
        assert made.inputs is not None
        return made.inputs[: len(points)]

    def rectified(self, rule: Rule) -> torch.Tensor:
        """Return what the rules of deconvnet or guided backpropagation send back to the inputs."""
        if rule not in self._kept:
            sites = Rectified(self.network, rule)
            made = gradients(self.network, self.inputs, self.target, sites=sites)
            self._kept[rule] = made.inputs
        return self._kept[rule]

    def attention(self, by_class: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the attention weights of all blocks, and their gradients if `by_class`."""
        sites = Attended(self.network, len(self.inputs))
        return of_tensors(self.network, self.inputs, self.target, sites, sites.checked, by_class)

    def noisy(self, noise: float, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the variance of the gradient over noisy copies of each image, like the inputs.

        `noise` is the standard deviation as a share of the image's range. Each draw of an image has a seed of its own,
        so other images change nothing.
        """
        key = ("noisy", noise, draws)
        if key in self._kept:
            return self._kept[key]
        if self.spans is None:
            spans = self.inputs.flatten(1)
            spread = spans.amax(1) - spans.amin(1)
        else:
            spread = self.spans
        mean = torch.zeros_like(self.inputs, dtype=torch.float64)
        square = torch.zeros_like(mean)
        every = torch.arange(len(self.inputs))
        chunks = list(in_chunks(len(self.inputs), self.batch))
        for draw in range(draws):
            points = torch.stack(
                [
                    image + noise * width * _normal(image, self.seeds[at] if self.seeds else at, draw)
                    for at, (image, width) in enumerate(zip(self.inputs, spread, strict=True))
                ]
            )
            parts = [self.gradients_at(points[start:stop], every[start:stop]) for start, stop in chunks]
            gradient = torch.cat(parts).double()
            step = gradient - mean  # Welford: no difference of large sums
            mean += step / (draw + 1)
            square += step * (gradient - mean)
        self._kept[key] = mean.to(self.inputs.dtype), (square / (draws - 1)).to(self.inputs.dtype)
        return self._kept[key]


def _normal(image: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """Return standard normal noise like an image: from its seed and the draw alone, the same on any device."""
    drawn = np.random.default_rng([seed, draw]).standard_normal(tuple(image.shape), dtype=np.float32)
    return torch.from_numpy(drawn).to(image.device, image.dtype)
