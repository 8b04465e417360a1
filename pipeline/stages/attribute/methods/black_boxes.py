"""Methods that see a network's scores alone, of copies of an image that show some of its segments."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from kernels.attribution import lime as surrogate
from kernels.attribution import masks, shapley
from pipeline.networks.gradients import relative
from pipeline.stages.attribute.methods.copies import (
    Game,
    copies_of,
    game_of,
    plays_all,
    seed_of,
    target_of,
    with_ends,
)
from pipeline.stages.attribute.options import KernelShap, Lime, Options, Rise
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def lime(subject: Subject, options: Lime, known: Known) -> Attribution:
    """Return the weights of a local surrogate model of the score, by segment.

    Ribeiro et al., "Why should I trust you?" (KDD 2016). It promises no sum: `r2` of the fit and `stability`, the rank
    correlation of the weights that two halves of the copies give, are among the facts.
    """
    game, copies = game_of(subject, options), copies_of(subject, options)
    of = target_of(subject, options)
    found = _Found(game, options)
    for image, own in zip(subject.counted.tolist(), copies, strict=True):
        weight = own.weight * surrogate.proximity(_distance(game, options, image, own.masks), options.sigma)
        values = own.scores[:, of]
        whole = _surrogate(own.masks, values, weight, options)
        order = np.random.default_rng([seed_of(subject, image), 1]).permutation(len(values))
        stable = math.nan
        if all(weight[rows].any() for rows in (order[::2], order[1::2])):
            one, other = (
                _surrogate(own.masks[rows], values[rows], weight[rows], options).weights
                for rows in (order[::2], order[1::2])
            )
            stable = surrogate.stability(one, other)
        found.take(image, own.scores, len(own.masks), {"value": whole.weights})
        found.note(image, intercept=whole.intercept, r2=whole.fit, stability=stable)
        if whole.split is not None and whole.mean is not None:
            found.grow(image, whole.split, whole.mean)
    return found.attribution(subject.no_residual)


def _surrogate(shown: np.ndarray, values: np.ndarray, weight: np.ndarray, options: Lime) -> surrogate.Local:
    if options.model == "tree":
        return surrogate.tree(shown, values, weight, options.depth)
    return surrogate.linear(shown, values, weight, options.ridge, options.features, options.selection)


def _distance(game: Game, options: Lime, image: int, shown: np.ndarray) -> np.ndarray:
    """Return the distance of each copy from the image, (copy,)."""
    distance: surrogate.Distance = "cosine" if options.kernel.endswith("cosine") else "l2"
    if options.kernel.startswith("masks"):
        return surrogate.mask_distance(shown, distance)
    players = game.players(image)
    place = np.full(game.differ.shape[1], len(players))
    place[players] = np.arange(len(players))
    segment = place[game.index[image].cpu().numpy()]
    x, x0 = (each[image].double().cpu().numpy() for each in (game.subject.inputs, game.subject.reference))
    sums = []
    for product in (x * x, x * x0, x0 * x0):
        at = product.sum(0) if x.ndim == 3 else product.sum(1) if len(segment) == len(x) and x.ndim == 2 else product
        sums.append(np.bincount(segment, at.ravel(), minlength=len(players) + 1))
    return surrogate.input_distance(shown, np.stack(sums), distance)


def kernel_shap(subject: Subject, options: KernelShap, known: Known) -> Attribution:
    """Return the Shapley value of each segment; they add up to S(x) - S(x0).

    Exact where all coalitions are played. Otherwise the estimate of a weighted regression over sampled coalitions, or
    of a mean over orders of the segments, with the standard error of each value; with `tolerance`, as many samples are
    added until the mean error is below it. Lundberg and Lee, "A unified approach to interpreting model predictions"
    (NeurIPS 2017).
    """
    game, of = game_of(subject, options), target_of(subject, options)
    found, residual = _Found(game, options), subject.no_residual
    left, turn = subject.counted.tolist(), 0
    estimates: dict[int, list[shapley.Estimate]] = {image: [] for image in left}
    used = dict.fromkeys(left, 0)
    scores = subject.score.double().cpu()
    differences = scores - subject.baseline_score.double().cpu()
    while left:
        goes_on = []
        for image, (estimate, values) in zip(left, _estimates(game, options, left, turn, of), strict=True):
            estimates[image].append(estimate)
            used[image] += len(values)
            mean = _mean(estimates[image])
            found.take(image, values, used[image], {"value": mean.values, "standard_error": mean.error})
            score, total = scores[image : image + 1], differences[image : image + 1]
            residual[image] = relative(mean.values.sum() - total, total, score)[0]
            if _is_rough(options, mean) and used[image] + len(values) <= options.max_samples:
                goes_on.append(image)
        left, turn = goes_on, turn + 1
    return found.attribution(residual)


def _estimates(
    game: Game, options: KernelShap, images: Sequence[int], turn: int, of: int
) -> list[tuple[shapley.Estimate, np.ndarray]]:
    """Return an estimate of each image, independent of those of other turns, and the scores that it comes from."""
    subject = game.subject
    counts = [len(game.players(image)) for image in images]
    seeds = [[seed_of(subject, image), turn] if turn else seed_of(subject, image) for image in images]
    if options.estimator == "regression" and not turn:
        copies = copies_of(subject, options)
        draws = [each.drawn for each in copies]
        values = [each.scores for each in copies]
    elif options.estimator == "regression":
        assert options.samples != "exact"
        more = [shapley.sample(count, options.samples, seed) for count, seed in zip(counts, seeds, strict=True)]
        draws, values = [*more], game.scores(images, [with_ends(each.masks) for each in more])
    else:
        return _by_orders(game, options, images, seeds, of)
    return [
        (shapley.Estimate.exact(own[:, of]) if drawn is None else shapley.regression(drawn, own[:, of]), own)
        for drawn, own in zip(draws, values, strict=True)
    ]


def _by_orders(
    game: Game, options: KernelShap, images: Sequence[int], seeds: Sequence[int | list[int]], of: int
) -> list[tuple[shapley.Estimate, np.ndarray]]:
    orders: list[np.ndarray | None] = []
    for image, seed in zip(images, seeds, strict=True):
        count = len(game.players(image))
        if plays_all(options, count):
            orders.append(None)
        else:
            assert options.samples != "exact"
            orders.append(shapley.orders(count, options.samples, seed))
    masks = [
        shapley.all_coalitions(len(game.players(image))) if each is None else with_ends(shapley.beginnings(each))
        for image, each in zip(images, orders, strict=True)
    ]
    return [
        (shapley.Estimate.exact(own[:, of]) if each is None else shapley.by_orders(each, own[:, of]), own)
        for each, own in zip(orders, game.scores(images, masks), strict=True)
    ]


def _mean(estimates: Sequence[shapley.Estimate]) -> shapley.Estimate:
    """Return the mean of independent estimates, and its standard error."""
    values = np.mean([each.values for each in estimates], 0)
    error = np.sqrt(np.sum([each.error**2 for each in estimates], 0)) / len(estimates)
    return shapley.Estimate(values, error)


def _is_rough(options: KernelShap, estimate: shapley.Estimate) -> bool:
    """Return whether the mean standard error, as a share of the largest value, is beyond the tolerance."""
    if options.tolerance is None or not estimate.error.any():
        return False
    return float(estimate.error.mean()) > options.tolerance * float(np.abs(estimate.values).max())


def rise(subject: Subject, options: Rise, known: Known) -> Attribution:
    """Return the mean score of the copies that show a segment, less that of all copies, which is `intercept`.

    Petsiuk et al., "RISE: randomized input sampling for explanation" (BMVC 2018), with segments in place of a grid that
    is shifted and enlarged smoothly.
    """
    game, copies = game_of(subject, options), copies_of(subject, options)
    of, found = target_of(subject, options), _Found(game, options)
    for image, own in zip(subject.counted.tolist(), copies, strict=True):
        values, mean = masks.shown(own.masks, own.scores[:, of], own.weight)
        found.take(image, own.scores, len(own.masks), {"value": values})
        found.note(image, intercept=mean)
    return found.attribution(subject.no_residual)


class _Found:
    """What a method finds of each image, as its attribution wants it."""

    def __init__(self, game: Game, options: Options) -> None:
        self.game, self.of = game, target_of(game.subject, options)
        self.by_segment: dict[str, np.ndarray] = {}
        self.by_node: dict[str, np.ndarray] = {}
        self.by_image: dict[str, np.ndarray] = {}

    def take(self, image: int, scores: np.ndarray, samples: int, by_segment: Mapping[str, np.ndarray]) -> None:
        """Keep numbers of the players of an image; of its other segments, they are 0. `scores` are of its copies."""
        game = self.game
        for name, values in by_segment.items():
            if name not in self.by_segment:
                self.by_segment[name] = np.full(game.differ.shape, np.nan)
            row = self.by_segment[name][image]
            row[: game.segments[image]] = 0.0
            row[game.differ[image]] = values
        players = int(game.differ[image].sum())
        self.note(image, players=players, samples=samples, score=scores[-1, self.of], baseline_score=scores[0, self.of])

    def note(self, image: int, **numbers: float) -> None:
        for name, value in numbers.items():
            self.by_image.setdefault(name, np.full(len(self.game.differ), math.nan))[image] = value

    def grow(self, image: int, split: np.ndarray, mean: np.ndarray) -> None:
        """Keep the nodes of a tree: the segment that parts each, NaN in a leaf, and its mean."""
        segments = np.append(self.game.players(image), np.nan)  # -1 is the last
        for name, values in (("node_segment", segments[split]), ("node_mean", mean)):
            self.by_node.setdefault(name, np.full((len(self.game.differ), len(split)), np.nan))[image] = values

    def attribution(self, residual: torch.Tensor) -> Attribution:
        game, inputs, value = self.game, self.game.subject.inputs, self.by_segment["value"]
        at = torch.stack([game.spread(each, image) for image, each in enumerate(value)]).to(inputs.dtype)
        facts = {
            name: torch.from_numpy(each) for name, each in (self.by_segment | self.by_node | self.by_image).items()
        }
        if inputs.ndim == 4:
            return Attribution(None, at, residual, facts)
        return Attribution(at if at.shape == inputs.shape else None, None, residual, facts)
