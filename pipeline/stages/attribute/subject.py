"""What is explained, images and a scalar of each, and the passes through the network that methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.fitness import Attention, Head
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
    facts : further numbers by name, of each image, (image,), or of its segments, (image, segment), NaN where an image
        has fewer segments; or maps (image, y, x).
    units : by layer, the relevance of its units, (image, unit).
    """

    values: torch.Tensor | None
    map: torch.Tensor | None
    residual: torch.Tensor
    facts: dict[str, torch.Tensor] = field(default_factory=dict)
    units: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """What was found of the network for one method: its layer, the head after it, its attention, and two properties.

    `background` are inputs that those of the subject are compared with, (reference, ...), or their mean. `units` are
    the layers whose units' relevance is wanted.
    """

    layer: LayerInfo | None = None
    head: Head | None = None
    linear: bool = False
    homogeneous: bool = False
    attention: Attention | None = None
    background: torch.Tensor | None = None
    units: tuple[LayerInfo, ...] = ()


@dataclass
class Subject:
    """Images, as a network takes them, and the scalar of each that is explained.

    Attributes
    ----------
    inputs : (image, ...) floating-point.
    target : the scalar, or a function that chooses it from the network's output.
    baseline : like the inputs, the input without information; None where no method wants one.
    batch : images per pass; more points of an image go through the network in several passes, fewer are padded.
    count : the first so many images count, the others pad the batch; None: all.
    layers : the names of layers whose output and gradient methods need.
    of_inputs : whether a method needs the shared pass's gradient of the inputs.
    seeds : of each image's noise; default: its place.
    one_baseline : whether the baseline of all images is the same.
    segments : of images that are parted into segments, by the key of the setting, int64 (image, y, x) on the CPU.
    bounds : the least and the greatest input, like the input of one image; None: unknown.
    """

    network: nn.Module
    inputs: torch.Tensor
    target: Target | Callable[[torch.Tensor], Target]
    baseline: torch.Tensor | None = None
    batch: int = 32
    count: int | None = None
    layers: Sequence[str] = ()
    of_inputs: bool = True
    seeds: Sequence[int] = ()
    one_baseline: bool = False
    segments: Mapping[str, torch.Tensor] = field(default_factory=dict)
    bounds: tuple[torch.Tensor, torch.Tensor] | None = None
    _kept: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def shared(self) -> Gradients:
        """One forward and one backward of all images."""
        return gradients(self.network, self.inputs, self.target, self.layers, self.of_inputs)

    @property
    def chosen(self) -> Target:
        return self.shared.target

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
        if self.one_baseline:
            return scores(self.network, self.reference[:1], self.chosen, len(self.inputs))
        return self.scores_at(self.reference, torch.arange(len(self.inputs)))

    @property
    def reference(self) -> torch.Tensor:
        if self.baseline is None:
            raise MicrotomeError("this method compares with a baseline: give one")
        return self.baseline

    @property
    def counted(self) -> torch.Tensor:
        """The places of the images that count."""
        return torch.arange(len(self.inputs) if self.count is None else self.count)

    @property
    def no_residual(self) -> torch.Tensor:
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
            values = scores(self.network, padded(points[start:stop], self.batch), self.chosen.at(own))
            found.append(values[: stop - start])
        return torch.cat(found)

    def points(
        self, images: torch.Tensor, each: int, point: Callable[[int, int], torch.Tensor]
    ) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (place in `images`, number, gradient) of `each` points of every image, in their order.

        `point(image, number)` makes a point from the place of an image among the inputs. Points of several images share
        a pass.
        """
        pairs = [(at, number) for at in range(len(images)) for number in range(each)]
        for start, stop in in_chunks(len(pairs), self.batch):
            own = pairs[start:stop]
            rows = images[[at for at, _ in own]]
            values = torch.stack([point(int(row), number) for row, (_, number) in zip(rows, own, strict=True)])
            target = self.chosen.at(padded(rows, self.batch))
            made = gradients(self.network, padded(values, self.batch), target).inputs
            assert made is not None
            for (at, number), gradient in zip(own, made, strict=False):
                yield at, number, gradient

    def rectified(self, rule: Rule) -> torch.Tensor:
        """Return what the rules of deconvnet or guided backpropagation send back to the inputs."""
        if rule not in self._kept:
            sites = Rectified(self.network, rule)
            self._kept[rule] = gradients(self.network, self.inputs, self.chosen, sites=sites).inputs
        return self._kept[rule]

    def attention(self, by_class: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the attention weights of all blocks, and their gradients if `by_class`."""
        sites = Attended(self.network, len(self.inputs))
        return of_tensors(self.network, self.inputs, self.chosen, sites, sites.checked, by_class)

    def noisy(self, noise: float, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean and the variance of the gradient over noisy copies of each image, like the inputs.

        `noise` is the standard deviation as a share of the image's range. Each draw of an image has a seed of its own,
        so other images change nothing.
        """
        key = ("noisy", noise, draws)
        if key in self._kept:
            return self._kept[key]
        flat = self.inputs.flatten(1)
        spread = flat.amax(1) - flat.amin(1)
        mean = torch.zeros_like(self.inputs, dtype=torch.float64)
        square = torch.zeros_like(mean)

        def point(image: int, draw: int) -> torch.Tensor:
            seed = self.seeds[image] if self.seeds else image
            return self.inputs[image] + noise * spread[image] * _normal(self.inputs[image], seed, draw)

        for at, draw, gradient in self.points(self.counted, draws, point):
            step = gradient.double() - mean[at]  # Welford: no difference of large sums
            mean[at] += step / (draw + 1)
            square[at] += step * (gradient.double() - mean[at])
        self._kept[key] = mean.to(self.inputs.dtype), (square / (draws - 1)).to(self.inputs.dtype)
        return self._kept[key]


def _normal(image: torch.Tensor, seed: int, draw: int) -> torch.Tensor:
    """Return standard normal noise like an image: from its seed and the draw alone, the same on any device."""
    drawn = np.random.default_rng([seed, draw]).standard_normal(tuple(image.shape), dtype=np.float32)
    return torch.from_numpy(drawn).to(image.device, image.dtype)
