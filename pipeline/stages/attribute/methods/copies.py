"""Scores of masked copies: what a network says of an image of which only some segments are shown.

Segments that the baseline has the same way take no part: to cover them changes nothing. The copies of an image depend
on its seed, its segments and the number of samples alone, so that methods share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from kernels.attribution import shapley
from pipeline.errors import MicrotomeError
from pipeline.networks.gradients import Logit, Target, in_chunks, padded, scores
from pipeline.stages.attribute.options import Options, Segmented, link_of
from pipeline.stages.attribute.subject import Subject


@dataclass(frozen=True)
class Copies:
    """Masked copies of one image, and their scores. The first shows no player, the last all.

    Attributes
    ----------
    masks : which players are shown, bool (copy, player). weight : of each copy among all masks, mean 1.
    drawn : the coalitions between the first and the last; None where the copies are all 2^M there are, in the order of
        `shapley.all_coalitions`.
    scores : float64 (copy, target), of `targets_of`.
    """

    masks: np.ndarray
    weight: np.ndarray
    drawn: shapley.Coalitions | None
    scores: np.ndarray


@dataclass(frozen=True)
class _Several:
    """Several targets of one output: (image, target)."""

    targets: tuple[Target, ...]

    @property
    def layer(self) -> str | None:
        return self.targets[0].layer

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return torch.stack([target(output) for target in self.targets], 1)

    def at(self, rows: torch.Tensor) -> _Several:
        return _Several(tuple(target.at(rows) for target in self.targets))


def targets_of(subject: Subject) -> _Several:
    """Return the target, and after it the probability of the class where the target is its logit."""
    target, output = subject.chosen, subject.shared.output
    several = output is None or output.ndim != 2 or output.shape[1] > 1  # the softmax of one logit is always 1
    if isinstance(target, Logit) and target.link == "logit" and several:
        return _Several((target, replace(target, link="probability")))
    return _Several((target,))


def target_of(subject: Subject, options: Options) -> int:
    """Return which of these targets a method explains."""
    target, output = subject.chosen, subject.shared.output
    one = output is not None and output.ndim == 2 and output.shape[1] == 1
    if one and isinstance(target, Logit) and link_of(options, target.link) != target.link:
        raise MicrotomeError(f"{options.kind}: the softmax of one logit is always 1: give `softmax: false`")
    return int(isinstance(target, Logit) and link_of(options, target.link) != target.link)


@dataclass(frozen=True)
class Game:
    """The images of a subject as games whose players are segments.

    Attributes
    ----------
    index : the segment of each position, int64 (image, position). shape : of the positions, for example (y, x).
    segments : how many each image has, (image,).
    differ : which the baseline has otherwise, bool (image, segment).
    """

    subject: Subject
    index: torch.Tensor
    shape: tuple[int, ...]
    segments: np.ndarray
    differ: np.ndarray

    def players(self, image: int) -> np.ndarray:
        """Return the segments of an image that take part."""
        return np.flatnonzero(self.differ[image])

    def spread(self, values: np.ndarray, image: int) -> torch.Tensor:
        """Return each segment's value (segment,) at each of its positions, float64 of their shape."""
        return torch.from_numpy(values)[self.index[image].cpu()].reshape(self.shape)

    def scores(self, images: Sequence[int], masks: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the scores of masked copies of each of some images, float64 (copy, target), of `targets_of`.

        `masks` says of each image which players its copies show, bool (copy, player).
        """
        inputs, reference, targets = self.subject.inputs, self.subject.reference, targets_of(self.subject)
        batch, device = self.subject.batch, inputs.device
        rows = torch.from_numpy(np.repeat(np.array(images, np.int64), [len(each) for each in masks]))
        shown = torch.from_numpy(np.concatenate([self._shown(*each) for each in zip(images, masks, strict=True)]))
        found = []
        for start, stop in in_chunks(len(rows), batch):
            own = padded(rows[start:stop], batch)
            here = own.to(device)
            segments = padded(shown[start:stop], batch).to(device)
            at = segments.gather(1, self.index[here]).reshape(len(own), *self.shape)
            values = torch.where(_beside(at, inputs.ndim), inputs[here], reference[here])
            found.append(scores(self.subject.network, values, targets.at(own))[: stop - start].double())
        return np.split(torch.cat(found).cpu().numpy(), np.cumsum([len(each) for each in masks])[:-1])

    def _shown(self, image: int, masks: np.ndarray) -> np.ndarray:
        """Return which segments copies show, bool (copy, segment): those that do not differ always are."""
        differ = self.differ[image]
        found = np.broadcast_to(~differ, (len(masks), len(differ))).copy()
        found[:, differ] = masks
        return found


def _beside(values: torch.Tensor, ndim: int) -> torch.Tensor:
    """Return values at positions (image, ...) so that they meet inputs of so many dimensions: images have channels
    before their positions, matrices columns behind theirs."""
    return values[:, None] if ndim == 4 else values[..., None] if values.ndim < ndim else values


def game_of(subject: Subject, options: Segmented) -> Game:
    """Return the images as games: of their segments, of the values of a vector, or of the rows of a matrix."""
    key = "game", options.segments.key
    if key not in subject._kept:
        inputs, given = subject.inputs, subject.segments.get(options.segments.key)
        if given is None:
            given = torch.arange(inputs.shape[1]).expand(len(inputs), -1)
        index = given.flatten(1)
        own = index.amax(1).numpy() + 1
        index = index.to(inputs.device)
        apart = inputs != subject.reference
        apart = apart.any(1) if apart.ndim == 4 else apart.any(2) if apart.ndim == 3 else apart
        found = torch.zeros((len(inputs), int(own.max())), dtype=torch.int64, device=inputs.device)
        found.scatter_add_(1, index, apart.flatten(1).to(torch.int64))
        subject._kept[key] = Game(subject, index, tuple(given.shape[1:]), own, found.cpu().numpy() > 0)
    return subject._kept[key]


def seed_of(subject: Subject, image: int) -> int:
    return int(subject.seeds[image]) if len(subject.seeds) else image


def plays_all(options: Segmented, players: int) -> bool:
    """Return whether all coalitions of so many players are played; refuse samples that are too few, or too many."""
    if why := options.why_not(players):
        raise MicrotomeError(why)
    return options.plays_all(players)


def copies_of(subject: Subject, options: Segmented) -> list[Copies]:
    """Return the masked copies of each image that counts: all there are, or a sample of coalitions.

    Raises
    ------
    MicrotomeError
        For fewer samples than an image's segments need.
    """
    key = "copies", options.segments.key, options.samples
    if key not in subject._kept:
        game, images = game_of(subject, options), subject.counted.tolist()
        draws = [_drawn(options, len(game.players(image)), seed_of(subject, image)) for image in images]
        masks = [masks_of(drawn, len(game.players(image))) for drawn, image in zip(draws, images, strict=True)]
        values = game.scores(images, masks)
        subject._kept[key] = [Copies(m, _weight(m, d), d, v) for m, d, v in zip(masks, draws, values, strict=True)]
    return subject._kept[key]


def _drawn(options: Segmented, players: int, seed: int) -> shapley.Coalitions | None:
    if plays_all(options, players):
        return None
    assert options.samples != "exact"
    return shapley.sample(players, options.samples, seed)


def masks_of(drawn: shapley.Coalitions | None, players: int) -> np.ndarray:
    """Return all coalitions, or those that are drawn between nobody and all."""
    return shapley.all_coalitions(players) if drawn is None else with_ends(drawn.masks)


def with_ends(masks: np.ndarray) -> np.ndarray:
    """Return masks (copy, player) with one that shows nothing before, and one that shows all behind."""
    return np.pad(masks, ((1, 1), (0, 0)), constant_values=((False, True), (False, False)))


def _weight(masks: np.ndarray, drawn: shapley.Coalitions | None) -> np.ndarray:
    """Return the weight of each copy, so that sizes count as in the Shapley kernel, drawn or all there are.

    The ends count like the mean copy.
    """
    found = np.ones(len(masks))
    if drawn is not None:
        found[1:-1] = drawn.weight * len(drawn.weight)
    elif len(masks) > 2:
        inner = (size := masks.sum(1)) % masks.shape[1] > 0
        own = shapley.kernel_weights(masks.shape[1])[size[inner] - 1]
        found[inner] = own / own.mean()
    return found
