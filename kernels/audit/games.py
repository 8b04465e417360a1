"""What each object of an image is worth: the score that it loses alone, and its Shapley value among all objects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kernels.attribution import shapley


@dataclass(frozen=True)
class Game:
    """Which objects are shown in the pictures that the truths are computed from.

    Attributes
    ----------
    shown : bool (picture, object): coalitions of objects, nobody's and everybody's among them, and behind them the
        whole without each object in turn.
    drawn : the coalitions that a regression reads; None: all there are, in the order of `shapley.all_coalitions`.
    """

    shown: np.ndarray
    drawn: shapley.Coalitions | None

    @staticmethod
    def of(objects: int, exact: int, coalitions: int, seed: int) -> Game:
        """Return the game of so many objects: every coalition up to `exact` objects, else so many of them in pairs."""
        alone = ~np.eye(objects, dtype=bool)
        if objects <= exact:
            return Game(np.concatenate([shapley.all_coalitions(objects), alone]), None)
        drawn = shapley.sample(objects, coalitions, seed)
        ends = np.zeros((1, objects), bool), np.ones((1, objects), bool)
        return Game(np.concatenate([ends[0], drawn.masks, ends[1], alone]), drawn)

    @property
    def objects(self) -> int:
        return self.shown.shape[1]

    @property
    def coalitions(self) -> int:
        """The number of pictures that the Shapley values are computed from: those before the whole without each."""
        return len(self.shown) - self.objects

    def drops(self, values: np.ndarray) -> np.ndarray:
        """Return what the score loses without each object alone, (object, ...), from the pictures' (picture, ...)."""
        return values[self.coalitions - 1] - values[self.coalitions :]

    def shares(self, values: np.ndarray) -> shapley.Estimate:
        """Compute the Shapley values of objects from the scores of the pictures, float64 (picture,)."""
        own = values[: self.coalitions]
        return shapley.Estimate.exact(own) if self.drawn is None else shapley.regression(self.drawn, own)
