"""One attack on a batch of images: from pixels to stored pixels, judged as any image is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from kernels.attacks import losses, rounding
from kernels.attacks.ascent import Best, Look, apgd, pgd
from kernels.attacks.balls import Ball
from kernels.attacks.carlini_wagner import smallest
from kernels.attacks.square import square
from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks.fitness import Normalised
from pipeline.networks.forward import normalise
from pipeline.networks.gradients import Scalar, gradients, in_chunks, padded, scores
from pipeline.networks.pixels import inputs_of
from pipeline.stages.attack.settings import Attack
from pipeline.workers.devices import device

LOSSES = {"pgd": losses.cross_entropy, "apgd_ce": losses.cross_entropy, "apgd_dlr": losses.dlr}
EXACT = 1e-9
TINY = 1e-30


@dataclass(frozen=True)
class Effort:
    """How much an attack tries. `seed` is that of the experiment."""

    steps: int
    restarts: int
    searches: int
    queries: int
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What an attack gave for each row.

    Attributes
    ----------
    image : uint8 (row, channel, y, x). predicted : its class. succeeded : bool.
    linf, l2, excess : float64, the distance to the original, and by how much it is above the bound (NaN without one).
    margin, first : of the attack before rounding: its lowest margin, and the step that first had one below 0; -1: none.
    starts : bool (row, start), whether each start succeeded.
    """

    image: torch.Tensor
    predicted: torch.Tensor
    succeeded: torch.Tensor
    linf: torch.Tensor
    l2: torch.Tensor
    excess: torch.Tensor
    margin: torch.Tensor
    first: torch.Tensor
    starts: torch.Tensor


@dataclass
class Attempt:
    """A batch of images under attack.

    Attributes
    ----------
    pixels : uint8 (row, 3, y, x). sources, targets : classes int64 (row,); no targets: any other class.
    seeds : of each row's image. normalised : whether the network ends in a softmax.
    """

    network: nn.Module
    spec: Network
    normalised: Normalised
    pixels: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor | None
    seeds: Sequence[int]

    def __post_init__(self) -> None:
        where = device()
        self.pixels, self.sources = self.pixels.to(where), self.sources.to(where)
        self.images = self.pixels.float()
        self.targets = None if self.targets is None else self.targets.to(where)

    def run(self, attack: Attack, effort: Effort) -> Outcome:
        """Attack all rows; of several starts, the first that succeeds counts, or the nearest to success."""
        restarts = effort.restarts if attack.method in LOSSES else 1
        found = [self._judged(attack, *self._moved(attack, effort, start)) for start in range(restarts)]
        return joined(found)

    def _moved(self, attack: Attack, effort: Effort, start: int) -> tuple[list[torch.Tensor], Best]:
        """Return roundings of the attack's points, the preferred first, and the points."""
        if attack.method == "cw_l2":
            made = smallest(self.images, self._margins, effort.steps, effort.searches)
            best = Best(made.points, made.margin)
            best.first = made.first
            return rounding.candidates(self.images, made.points), best
        ball = Ball(self.images, attack.norm, attack.radius)
        seeds = [[effort.seed, seed, start] for seed in self.seeds]
        if attack.method == "square":
            best = square(ball, self._judge, effort.queries, seeds)
        elif attack.method == "pgd":
            best = pgd(ball.random(seeds), ball, self._look(attack), self._judge, effort.steps)
        else:
            best = apgd(ball.random(seeds), ball, self._look(attack), effort.steps)
        return [rounding.towards(self.images, best.points), rounding.spending(ball, best.points)], best

    def _judged(self, attack: Attack, candidates: Sequence[torch.Tensor], best: Best) -> Outcome:
        """Round, and ask the network what it says of each stored image: of those that succeed, the nearest counts."""
        chosen: tuple[torch.Tensor, ...] | None = None
        for candidate in candidates:
            image = candidate.to(torch.uint8)
            predicted = self._logits(normalise(image, self.spec)).argmax(1)
            good = predicted == self.targets if self.targets is not None else predicted != self.sources
            linf, l2 = rounding.distances(self.pixels, image)
            new = image, predicted, good, linf, l2
            if chosen is None:
                chosen = new
                continue
            better = good & (~chosen[2] | (l2 < chosen[4]))
            chosen = tuple(torch.where(_wide(better, own), own, old) for own, old in zip(new, chosen, strict=True))
        assert chosen is not None
        image, predicted, good, linf, l2 = chosen
        excess = torch.full_like(l2, torch.nan)
        if attack.epsilon is not None:
            excess = ((linf if attack.norm == "linf" else l2) - attack.epsilon).clamp_min(0)
            if bool((excess > EXACT).any()):
                raise MicrotomeError(f"{attack.name}: a distance of {float(excess.max()):.3g} above its bound")
        return Outcome(image, predicted, good, linf, l2, excess, best.margin, best.first, good[:, None])

    # The network ------------------------------------------------------------------------------------------------------

    def _look(self, attack: Attack) -> Callable[[torch.Tensor], Look]:
        loss = LOSSES[attack.method]

        def look(points: torch.Tensor) -> Look:
            value, gradient, output = self._gradients(
                points, lambda output: loss(self._logits_of(output), self.sources, self.targets)
            )
            return Look(value, gradient, self._margin(output))

        return look

    def _margins(self, points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value, gradient, _ = self._gradients(points, self._margin)
        return value, gradient

    def _judge(self, points: torch.Tensor) -> torch.Tensor:
        return self._margin(self._logits(inputs_of(points, self.spec)))

    def _margin(self, output: torch.Tensor) -> torch.Tensor:
        return losses.margin(self._logits_of(output), self.sources, self.targets)

    def _gradients(
        self, points: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a scalar of each row's output, its gradient with respect to the pixels, and the output."""
        given = points.detach().requires_grad_()
        with torch.enable_grad():
            inputs = inputs_of(given, self.spec)
        made = gradients(self.network, inputs.detach(), Scalar(function))
        assert made.inputs is not None and made.output is not None
        (back,) = torch.autograd.grad(inputs, given, made.inputs)
        return made.score, back, made.output

    def _logits(self, inputs: torch.Tensor) -> torch.Tensor:
        return scores(self.network, inputs, Scalar(lambda output: output))

    def _logits_of(self, output: torch.Tensor) -> torch.Tensor:
        return output.clamp_min(TINY).log() if self.normalised == "softmax" else output


def predictions(network: nn.Module, spec: Network, pixels: torch.Tensor) -> torch.Tensor:
    """Return the class that a network predicts for images uint8 (image, 3, y, x), int64 (image,) on the CPU."""
    size, found = spec.numerics.micro_batch, []
    for start, stop in in_chunks(len(pixels), size):
        inputs = normalise(padded(pixels[start:stop], size), spec)
        output = scores(network, inputs, Scalar(lambda output: output))
        if output.ndim != 2:
            raise MicrotomeError(f"the network gives {tuple(output.shape)}, expected logits (image, class)")
        if not bool(output.isfinite().all()):
            raise MicrotomeError("the network gives logits that are not finite (NaN or infinity)")
        found.append(output.argmax(1)[: stop - start].cpu())
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def joined(found: Sequence[Outcome]) -> Outcome:
    """Return the best of several starts of each row: the first that succeeds, or the one nearest to success."""
    best, *others = found
    for other in others:
        better = ~best.succeeded & (other.succeeded | (other.margin < best.margin))
        own = {
            name: torch.where(_wide(better, getattr(other, name)), getattr(other, name), getattr(best, name))
            for name in ("image", "predicted", "succeeded", "linf", "l2", "excess", "margin", "first")
        }
        best = Outcome(**own, starts=torch.cat([best.starts, other.starts], 1))
    return best


def _wide(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return rows.view(-1, *[1] * (like.ndim - 1))
