"""Shapley values of a game: exact, by weighted regression over sampled coalitions, or by permutations.

A game gives a value v(z) to each coalition z, a row of bools over the players. The Shapley value of player i is

    phi_i = sum over S without i of |S|! (M - |S| - 1)! / M! (v(S + i) - v(S)),

and the values of all players add up to v(all) - v(none). All functions take and return float64 of numpy, of one game:
games of other images change no bit.

Lundberg and Lee, "A unified approach to interpreting model predictions" (NeurIPS 2017), theorem 2, give phi as the
solution of a weighted least squares; Covert and Lee, "Improving KernelSHAP" (AISTATS 2021), its paired sampling.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

SHARE = 0.25
"""Exponent of a size's weight in the number of its samples: 1 is Lundberg and Lee's, 0 the same number for each size.

Musco and Witter, "Provably accurate Shapley value estimation via leverage score sampling" (ICLR 2025), derive 0. On
games of 42 players, 0.25 gives the smallest squared error, 0.72 to 0.84 of that of 1.
"""


def kernel_weights(players: int) -> np.ndarray:
    """Compute the weight of one coalition of each size 1 to M - 1: (M - 1) / (C(M, s) s (M - s)).

    Lundberg and Lee, theorem 2. The empty and the whole coalition have infinite weight: they are constraints.
    """
    return np.array([(players - 1) / (math.comb(players, s) * s * (players - s)) for s in range(1, players)])


def all_coalitions(players: int) -> np.ndarray:
    """Return all coalitions, bool (2^M, M): player i is in coalition k if bit i of k is set."""
    return (np.arange(2**players)[:, None] >> np.arange(players)) & 1 == 1


@dataclass(frozen=True)
class Coalitions:
    """Coalitions in complementary pairs: rows 2k and 2k + 1 are a pair, the smaller one first.

    Attributes
    ----------
    masks : bool (coalition, player).
    weight : of each coalition in the regression, (coalition,); adds up to 1.
    whole : the first so many coalitions are all there are of their sizes; the others are a sample, by size.
    """

    masks: np.ndarray
    weight: np.ndarray
    whole: int


def sample(players: int, samples: int, seed: int | list[int]) -> Coalitions:
    """Draw at most so many coalitions for a regression, without repetition, in complementary pairs.

    The share of a size is its share of the kernel's weight to the power `SHARE`, and what is drawn of it is weighed
    accordingly. Sizes whose share reaches all their coalitions are played whole; the others are sampled
    systematically. Within a size, coalitions are parts of random orders of the players, so that
    each player takes part equally often.

    Raises
    ------
    ValueError
        With fewer than two players, or fewer samples than twice the players.
    """
    if players < 2 or samples < 2 * players:
        raise ValueError(f"{samples} samples of {players} players, expected two players and twice as many samples")
    random = np.random.default_rng(seed)
    left = samples // 2
    sizes = np.arange(1, players // 2 + 1)
    many = 8 * samples  # no size is played whole, or listed, beyond it
    pairs = np.array([min(math.comb(players, int(s)) // (2 if 2 * s == players else 1), many) for s in sizes])
    mass = 1 / (sizes * (players - sizes))
    mass[sizes * 2 == players] /= 2
    smaller: list[np.ndarray] = []
    weight: list[np.ndarray] = []
    rest = np.arange(len(sizes))
    while len(rest):
        share = mass[rest] ** SHARE / (mass[rest] ** SHARE).sum()
        full = left * share >= pairs[rest]
        if not full.any():
            break
        for size in rest[full]:
            smaller.append(np.stack([*_every(players, int(sizes[size]))]))
            weight.append(np.full(len(smaller[-1]), mass[size] / pairs[size]))
            left -= len(smaller[-1])
        rest = rest[~full]
    whole = sum(map(len, smaller))
    if len(rest) and left:
        at = (random.random() + np.arange(left)) / left
        counts = np.bincount(np.searchsorted(np.cumsum(share)[:-1], at, side="right"), minlength=len(share))
        for size, count, part in zip(rest, counts.tolist(), share, strict=True):
            if count:
                smaller.append(_some(players, int(sizes[size]), count, int(pairs[size]), random))
                weight.append(np.full(count, mass[size] / (left * part)))
    masks, weights = np.concatenate(smaller), np.concatenate(weight)
    both = np.stack([masks, ~masks], 1).reshape(-1, players)
    return Coalitions(both, np.repeat(weights / (2 * weights.sum()), 2), 2 * whole)


def _every(players: int, size: int) -> Iterator[np.ndarray]:
    """Yield one coalition of every pair of a size."""
    for chosen in combinations(range(players), size):
        if 2 * size == players and chosen[0] != 0:
            return
        mask = np.zeros(players, bool)
        mask[list(chosen)] = True
        yield mask


def _some(players: int, size: int, count: int, pairs: int, random: np.random.Generator) -> np.ndarray:
    """Draw one coalition each of `count` different pairs of a size."""
    if pairs <= 4 * count:
        every = np.stack([*_every(players, size)])
        return every[np.sort(random.choice(len(every), count, replace=False))]
    found: list[np.ndarray] = []
    seen: set[bytes] = set()
    while len(found) < count:
        order = random.permutation(players)
        for start in range(0, players - size + 1, size):
            mask = np.zeros(players, bool)
            mask[order[start : start + size]] = True
            if 2 * size == players and not mask[0]:
                mask = ~mask
            if mask.tobytes() not in seen and len(found) < count:
                seen.add(mask.tobytes())
                found.append(mask)
    return np.stack(found)


@dataclass(frozen=True)
class Estimate:
    """Shapley values (player,) and the standard error of each."""

    values: np.ndarray
    error: np.ndarray

    @staticmethod
    def exact(values: np.ndarray) -> Estimate:
        """Compute Shapley values from the values of `all_coalitions`, (2^M,)."""
        players = len(values).bit_length() - 1
        numbers = np.arange(len(values))
        sizes = all_coalitions(players).sum(1)
        weight = np.array([1 / (players * math.comb(players - 1, s)) for s in range(players)])
        found = np.empty(players)
        for i in range(players):
            without = numbers[(numbers >> i) & 1 == 0]
            found[i] = (weight[sizes[without]] * (values[without | (1 << i)] - values[without])).sum()
        return Estimate(found, np.zeros(players))


def regression(coalitions: Coalitions, values: np.ndarray) -> Estimate:
    """Estimate Shapley values from the values of coalitions: they add up to v(all) - v(none) exactly.

    With pairs, the least squares of Lundberg and Lee see the differences d = v(z) - v(1 - z) alone, of which phi
    predicts (2z - 1) phi. The standard error is that of a weighted regression with any variance (residuals over 1 -
    leverage), from successive differences of the sampled pairs in the order of their sizes, since sizes are sampled
    systematically; sizes that are played whole have none.

    Parameters
    ----------
    values : (coalition,) of nobody, of `coalitions.masks`, and of all.
    """
    none, *_, every = values.tolist()
    values = values[1:-1]
    signs = 2.0 * coalitions.masks[::2] - 1
    weight = coalitions.weight[::2]
    difference = values[::2] - values[1::2]
    total, players = every - none, signs.shape[1]
    centred = signs - signs.mean(1, keepdims=True)  # of changes that keep the sum
    within = np.linalg.pinv((centred * weight[:, None]).T @ centred, rcond=1e-12, hermitian=True)
    found = total / players + within @ (centred.T @ (weight * (difference - signs.mean(1) * total)))
    found += (total - found.sum()) / players
    remaining = difference - signs @ found
    leverage = weight * ((centred @ within) * centred).sum(1)
    moved = (weight * remaining / np.maximum(1 - leverage, 1e-9))[:, None] * centred @ within
    return Estimate(found, _spread(moved[coalitions.whole // 2 :]))


def _spread(moved: np.ndarray) -> np.ndarray:
    """Return the standard error of a sum over pairs in order, (player,), from successive differences."""
    count = len(moved)
    if count < 2:
        return np.zeros(moved.shape[1]) if not count else np.abs(moved[0])
    return np.sqrt((np.diff(moved, axis=0) ** 2).sum(0) * count / (2 * (count - 1)))


def orders(players: int, samples: int, seed: int | list[int]) -> np.ndarray:
    """Draw orders of the players, (order, player) int64, each followed by its reverse: at least four.

    An order costs M - 1 coalitions. Mitchell et al., "Sampling permutations for Shapley value estimation" (JMLR 2022),
    on antithetic orders.

    Raises
    ------
    ValueError
        With fewer than two players, or fewer samples than four orders cost.
    """
    if players < 2 or samples < 4 * (players - 1):
        raise ValueError(f"{samples} samples of {players} players, expected two players and 4 (players - 1) samples")
    random = np.random.default_rng(seed)
    pairs = samples // (2 * (players - 1))
    found = np.stack([random.permutation(players) for _ in range(pairs)])
    return np.stack([found, found[:, ::-1]], 1).reshape(-1, players)


def beginnings(orders: np.ndarray) -> np.ndarray:
    """Return the coalitions of the first 1 to M - 1 players of each order, bool (order * (M - 1), player)."""
    place = np.argsort(orders, 1)
    found = place[:, None, :] < np.arange(1, orders.shape[1])[:, None]
    return found.reshape(-1, orders.shape[1])


def by_orders(orders: np.ndarray, values: np.ndarray) -> Estimate:
    """Estimate Shapley values as the mean change when a player joins those before it.

    The values of each order add up to v(all) - v(none) exactly. The standard error is that of the mean over pairs of
    orders.

    Parameters
    ----------
    values : (coalition,) of nobody, of `beginnings(orders)`, and of all.
    """
    count, players = orders.shape
    none, *_, every = values.tolist()
    chain = np.concatenate(
        [np.full((count, 1), none), values[1:-1].reshape(count, players - 1), np.full((count, 1), every)], 1
    )
    change = np.empty((count, players))
    np.put_along_axis(change, orders, np.diff(chain, axis=1), 1)
    pairs = change.reshape(-1, 2, players).mean(1)
    found = pairs.mean(0)
    found += (every - none - found.sum()) / players
    return Estimate(found, pairs.std(0, ddof=1) / math.sqrt(len(pairs)))
