"""What attacks minimise or maximise: functions of logits (row, class), each of shape (row,).

`sources` and `targets` are int64 (row,): the class that is left, and the one that is wanted; None: any other.
"""

from __future__ import annotations

import torch

LEAST_CLASSES = {"untargeted": 3, "targeted": 4}
"""Logits that the difference of logits ratio needs."""
TINY = 1e-12


def margin(logits: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Return how far a row is from success: below 0, the prediction is the target, or no longer the source.

    Carlini and Wagner, "Towards evaluating the robustness of neural networks" (S&P 2017), section V, f_6 without its
    bound; of an untargeted attack, the source's logit less the largest other.
    """
    if targets is None:
        return picked(logits, sources) - others(logits, sources).amax(1)
    return others(logits, targets).amax(1) - picked(logits, targets)


def cross_entropy(logits: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Return the surprise of the source, or the negative surprise of the target: to be maximised."""
    likely = logits.log_softmax(1)
    return -picked(likely, sources) if targets is None else picked(likely, targets)


def dlr(logits: torch.Tensor, sources: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Return the difference of logits ratio, to be maximised; no shift or scale of the logits changes it.

    Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free attacks"
    (ICML 2020), equations 6 and 7. Where the logits in its denominator are equal, it is bounded by `TINY`.
    """
    ranked = logits.sort(1, descending=True).values
    if targets is None:
        scale = ranked[:, 0] - ranked[:, 2]
        return -margin(logits, sources) / scale.clamp_min(TINY)
    scale = ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2
    return -(picked(logits, sources) - picked(logits, targets)) / scale.clamp_min(TINY)


def picked(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the logit of a class of each row."""
    return logits.gather(1, classes[:, None])[:, 0]


def others(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the logits with minus infinity at a class of each row."""
    return logits.scatter(1, classes[:, None], -torch.inf)
