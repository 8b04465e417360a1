"""Integrated gradients."""

from __future__ import annotations

import torch

from kernels.attribution.paths import Rule, nodes
from pipeline.networks.gradients import relative
from pipeline.stages.attribute.methods.plain import summed, total
from pipeline.stages.attribute.options import IntegratedGradients
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def integrated_gradients(subject: Subject, options: IntegratedGradients, known: Known) -> Attribution:
    """Return (x - x0) times the mean gradient on the line from x0 to x; it adds up to S(x) - S(x0).

    The steps of an image are doubled until that holds up to the tolerance, or until `max_steps`; `steps` of each image
    are among the facts. Sundararajan et al., "Axiomatic attribution for deep networks" (ICML 2017), eq. 1.
    """
    inputs, reference = subject.inputs, subject.reference
    difference = subject.score.double() - subject.baseline_score.double()
    values = torch.zeros_like(inputs)
    residual = subject.no_residual
    used = torch.zeros(len(inputs), dtype=torch.int64)
    left, steps = subject.counted, options.steps
    while len(left):
        found = _integral(subject, left, steps, options.rule) * (inputs[left] - reference[left])
        values[left], used[left] = found.to(values.dtype), steps
        lacking = total(found) - difference[left]
        residual[left] = relative(lacking, difference[left], subject.score[left]).cpu()
        left = left[residual[left] > options.tolerance]
        if steps >= options.max_steps:
            break
        steps = min(2 * steps, options.max_steps)
    return Attribution(values, summed(values), residual, {"steps": used})


def _integral(subject: Subject, images: torch.Tensor, steps: int, rule: Rule) -> torch.Tensor:
    """Return the mean gradient on the line of some images, float64, added in the order of the steps."""
    positions, weights = nodes(steps, rule)
    inputs, reference = subject.inputs, subject.reference

    def point(image: int, step: int) -> torch.Tensor:
        return reference[image] + float(positions[step]) * (inputs[image] - reference[image])

    sums = torch.zeros((len(images), *inputs.shape[1:]), dtype=torch.float64, device=inputs.device)
    for at, step, gradient in subject.points(images, steps, point):
        sums[at] += float(weights[step]) * gradient.double()
    return sums
