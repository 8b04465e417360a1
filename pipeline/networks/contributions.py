"""Contributions of inputs to the difference between a score and that of a reference: two forwards and a backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.networks.gradients import Target, gradients, scores_through
from pipeline.networks.graph.rescale import Differences, UnclearError


@dataclass(frozen=True)
class Contributions:
    """What inputs contribute to a score.

    Attributes
    ----------
    values : like the inputs; those of an image add up to score - reference_score.
    score, reference_score : (image,), with the calls taken apart for which there are no rules.
    """

    values: torch.Tensor
    score: torch.Tensor
    reference_score: torch.Tensor


def contributions(
    network: nn.Module,
    inputs: torch.Tensor,
    reference: torch.Tensor,
    target: Target,
    rules: Callable[[int], Differences],
) -> Contributions:
    """Compute multipliers times differences.

    Parameters
    ----------
    inputs : (image, ...), as the network takes them.
    reference : one for all images, (1, ...), or one for each. The forward of one for all is that of one image, unless
        the calls do not tell where the images of a batch are in what they get.
    rules : makes the call sites for a number of images.

    Raises
    ------
    MicrotomeError
        As `gradients`, and where calls depend on values.
    """
    sites = rules(len(inputs))
    sites.shared = len(reference) < len(inputs)
    try:
        base = scores_through(network, reference, target, sites, len(inputs))
        sites.turn()
        found = gradients(network, inputs, target, sites=sites)
    except UnclearError:
        return contributions(network, inputs, reference.expand_as(inputs).contiguous(), target, rules)
    assert found.inputs is not None
    return Contributions((inputs - reference) * found.inputs, found.score, base)
