"""Pictures that excite units and classes most, by gradient ascent of all of them at once.

Simonyan, Vedaldi and Zisserman, "Deep inside convolutional networks" (ICLR workshop 2014), section 2; Mahendran and
Vedaldi (CVPR 2015); Nguyen et al., "Synthesizing the preferred inputs for neurons" (NeurIPS 2016); Fel et al., "MACO"
(NeurIPS 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from kernels.visualization import augment, priors
from kernels.visualization.ascent import Ascent, ascend
from kernels.visualization.priors import Gaussian, Spectrum
from kernels.visualization.spectrum import image_of
from pipeline.config.networks import Network
from pipeline.networks.experts import Likelihood
from pipeline.networks.forward import normalise
from pipeline.networks.generators import Maker, drawn, generator_of, pixels_of
from pipeline.networks.gradients import Target, gradients, scores
from pipeline.networks.graph.call_sites import frozen
from pipeline.stages.visualize.settings import Maximise
from pipeline.stages.visualize.subject import Space

NOISE = 0.15
"""Deviation of the noise that an ascent starts from, as a share of the range from black to white."""
STARTS = 8
"""Starts of an ascent, of which it takes the one with the highest score."""
RIDGE = 0.05
"""Share of the mean variance that is added to the covariance of the data set's Gaussian."""


@dataclass(frozen=True)
class Pictures:
    """What an ascent of some rows gave; a row is a restart of a unit or class.

    Attributes
    ----------
    pixels : (row, channel, y, x) float32 from 0 to 1. rounded : the same as uint8.
    reached, started : (row,) the score of the rounded picture, and of the start.
    found : (row,) the step after which it was found. trajectory : (row, term, step).
    latent : (row, value) what a generator made it of; without values for other ways.
    finite : (row,) bool, whether every score, prior and gradient on the way was.
    """

    pixels: np.ndarray
    rounded: np.ndarray
    reached: np.ndarray
    started: np.ndarray
    found: np.ndarray
    trajectory: np.ndarray
    latent: np.ndarray
    finite: np.ndarray


@dataclass
class Climb:
    """The ascent of some rows.

    Attributes
    ----------
    target : what each row maximises. scale : (row,) what its score is divided by. seeds : of each row.
    size : (channel, y, x) of the pictures. spectrum : statistics of the data set, for the priors that need them.
    maker : the generator whose latents are sought, if one is. judges : networks that know what likely pixels are.
    """

    network: nn.Module
    spec: Network
    target: Target
    scale: torch.Tensor
    seeds: Sequence[Sequence[int]]
    size: tuple[int, int, int]
    options: Maximise
    spectrum: Spectrum | None = None
    maker: Maker | None = None
    judges: Sequence[Likelihood] = ()

    def __post_init__(self) -> None:
        self.space = Space(self.spec)
        self.scale = self.scale.to(self.space.centre.device)
        self._terms: list[torch.Tensor] = []

    def run(self, way: str) -> Pictures:
        """Make the pictures of one way: `pixels`, `maco`, or that of a generator."""
        climb = self._of_latents if self.maker is not None else self._of_phases if way == "maco" else self._of_pixels
        made, pictures = climb()
        with torch.no_grad():
            pixels, started = pictures(made.best).clamp(0, 1), pictures(self._start)
        rounded = (255 * pixels).round().to(torch.uint8)
        trajectory = torch.stack(self._terms, 2).float()
        return Pictures(
            pixels.float().cpu().numpy(),
            rounded.cpu().numpy(),
            self._scores(rounded),
            self._scores((255 * started.clamp(0, 1)).round().to(torch.uint8)),
            made.step.cpu().numpy(),
            trajectory.cpu().numpy(),
            made.best.flatten(1).float().cpu().numpy() if self.maker is not None else np.zeros((len(pixels), 0)),
            (made.finite & trajectory.isfinite().flatten(1).all(1)).cpu().numpy(),
        )

    def _scores(self, rounded: torch.Tensor) -> np.ndarray:
        """Return the scores of pictures as any image of them would get."""
        return scores(self.network, normalise(rounded, self.spec), self.target).float().cpu().numpy()

    # Pixels -----------------------------------------------------------------------------------------------------------

    def _of_pixels(self) -> tuple[Ascent, Callable[[torch.Tensor], torch.Tensor]]:
        options, (_, height, width) = self.options, self.size
        self._start = self._lively(lambda number: self._bounded(self.space.centre + self._noise(number)))
        drawn = augment.draws([(*seed, 2) for seed in self.seeds], options.steps, 4)
        shift = options.shift * min(height, width)
        moves = bool(shift or options.turn or options.zoom > 1)
        weighted = self._priors()

        def gradient(place: torch.Tensor, step: int) -> torch.Tensor:
            given = place.detach().requires_grad_()
            maps = augment.moves(drawn[step], (height, width), shift, options.turn, options.zoom) if moves else None
            with torch.enable_grad():
                inputs = self.space.inputs(given if maps is None else augment.moved(given, maps))
            score, climbed = self._climbed(inputs, given)
            terms = [score]
            for judge, weight in weighted:
                value, pull = judge(place)
                terms.append(value)
                climbed = climbed.add_(pull, alpha=weight)
            self._terms.append(torch.stack(terms, 1))
            return climbed

        def value(place: torch.Tensor) -> torch.Tensor:
            total = scores(self.network, self.space.inputs(place), self.target) / self.scale
            for judge, weight in weighted:
                total = total + weight * judge(place)[0]
            return total

        made = ascend(self._start, gradient, value, options.steps, options.rate, self._bounded)
        return made, lambda place: place

    def _noise(self, number: int) -> torch.Tensor:
        """Return noise of each row with the amplitudes of natural images, which fall as one over the frequency."""
        _, height, width = self.size
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        amplitude = torch.from_numpy(1 / np.maximum(frequency, 1 / max(height, width))).float()
        made = [np.random.default_rng([*seed, 1, number]).standard_normal(self.size, np.float32) for seed in self.seeds]
        shaped = torch.fft.irfft2(torch.fft.rfft2(torch.from_numpy(np.stack(made))) * amplitude, s=(height, width))
        deviation = shaped.flatten(1).std(1).view(-1, 1, 1, 1)
        return (NOISE * shaped / deviation).to(self.space.centre.device)

    def _lively(
        self,
        start: Callable[[int], torch.Tensor],
        pictures: Callable[[torch.Tensor], torch.Tensor] = lambda place: place,
    ) -> torch.Tensor:
        """Return the best of some starts of each row: a unit that no start excites has no gradient to follow."""
        best = start(0)
        highest = scores(self.network, self.space.inputs(pictures(best)), self.target)
        for number in range(1, STARTS):
            other = start(number)
            score = scores(self.network, self.space.inputs(pictures(other)), self.target)
            higher = score > highest
            best[higher], highest[higher] = other[higher], score[higher]
        return best

    def _bounded(self, place: torch.Tensor) -> torch.Tensor:
        return place.clamp(0, 1) if self.options.bounded else place

    def _priors(self) -> list[tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], float]]:
        """Return each prior of pixels, with its gradient, and its weight in what is maximised."""
        values = math.prod(self.size)
        found: list[tuple[Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]], float]] = []
        penalties: Mapping[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
            "l2": priors.l2,
            "tv": priors.total_variation,
        }
        for name, weight in self.options.priors.items():
            if name == "gaussian":
                assert self.spectrum is not None
                own = Gaussian(self.spectrum.mean, self.spectrum.covariance(RIDGE), self._start)
                found.append((own, weight / values))
                continue

            def judge(
                place: torch.Tensor, of: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] = penalties[name]
            ) -> tuple[torch.Tensor, torch.Tensor]:
                value, pull = of(self.space.relative(place))
                return value, pull / self.space.spread

            found.append((judge, -weight / values))
        return [*found, *((each, each.expert.weight / values) for each in self.judges)]

    # Phases -----------------------------------------------------------------------------------------------------------

    def _of_phases(self) -> tuple[Ascent, Callable[[torch.Tensor], torch.Tensor]]:
        options, (channels, height, width) = self.options, self.size
        assert self.spectrum is not None
        where = self.space.centre.device
        magnitude = torch.from_numpy(self.spectrum.mean_magnitude.astype(np.float32)).to(where)
        shape = channels, height, width // 2 + 1
        phases = [np.random.default_rng([*seed, 3]).uniform(-np.pi, np.pi, shape) for seed in self.seeds]
        self._start = torch.from_numpy(np.stack(phases).astype(np.float32)).to(where)
        drawn = augment.draws([(*seed, 4) for seed in self.seeds], options.steps, 3)

        def pictures(phase: torch.Tensor) -> torch.Tensor:
            return image_of(phase, magnitude, width)

        def gradient(place: torch.Tensor, step: int) -> torch.Tensor:
            given = place.detach().requires_grad_()
            noise = np.random.default_rng([options.seed, step]).standard_normal(self.size, np.float32)
            with torch.enable_grad():
                seen = augment.moved(pictures(given), augment.crops(drawn[step], options.crop))
                inputs = self.space.inputs(seen + options.noise * torch.from_numpy(noise).to(where))
            score, climbed = self._climbed(inputs, given)
            self._terms.append(score[:, None])
            return climbed

        def value(place: torch.Tensor) -> torch.Tensor:
            return scores(self.network, self.space.inputs(pictures(place).clamp(0, 1)), self.target) / self.scale

        return ascend(self._start, gradient, value, options.steps, options.phase_rate), pictures

    # Latents ----------------------------------------------------------------------------------------------------------

    def _of_latents(self) -> tuple[Ascent, Callable[[torch.Tensor], torch.Tensor]]:
        """Seek latents z with a high score of g(z), less their squared norm."""
        options, maker = self.options, self.maker
        assert maker is not None
        generator, network, where = maker.generator, generator_of(maker), self.space.centre.device
        weight = -options.latent / math.prod(generator.latent.shape)

        def pictures(place: torch.Tensor) -> torch.Tensor:
            with frozen(network):
                return pixels_of(network, generator, place, self.size[0])

        def start(number: int) -> torch.Tensor:
            made = [drawn(generator, [*seed, 5, number]) for seed in self.seeds]
            return torch.from_numpy(np.stack(made)).to(where)

        def gradient(place: torch.Tensor, step: int) -> torch.Tensor:
            given = place.detach().requires_grad_()
            with torch.enable_grad():
                inputs = self.space.inputs(pictures(given))
            score, climbed = self._climbed(inputs, given)
            value, pull = priors.l2(place)
            self._terms.append(torch.stack([score, value], 1))
            return climbed.add_(pull, alpha=weight)

        def value(place: torch.Tensor) -> torch.Tensor:
            score = scores(self.network, self.space.inputs(pictures(place).clamp(0, 1)), self.target)
            return score / self.scale + weight * priors.l2(place)[0]

        with torch.no_grad():
            self._start = self._lively(start, pictures)
            return ascend(self._start, gradient, value, options.steps, options.latent_rate), pictures

    def _climbed(self, inputs: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scores of inputs, and the gradient of score over scale with respect to what they are made of."""
        made = gradients(self.network, inputs.detach(), self.target)
        assert made.inputs is not None
        (back,) = torch.autograd.grad(inputs, given, made.inputs / self.scale.view(-1, 1, 1, 1))
        return made.score, back
