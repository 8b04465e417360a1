"""Methods that take the gradient as it is: saliency, gradient x input, SmoothGrad, VarGrad."""

from __future__ import annotations

import torch

from pipeline.networks.gradients import Logit, relative
from pipeline.stages.attribute.options import GradientXInput, Noisy, Saliency
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def saliency(subject: Subject, options: Saliency, known: Known) -> Attribution:
    """Return the gradient w, and as map the largest |w| over the channels.

    `intercept` is b of the linear view S(I) = w I + b. Simonyan et al., "Deep inside convolutional networks" (ICLR
    workshop 2014), section 3.
    """
    gradient = subject.gradient
    product = (gradient.double() * subject.inputs.double()).flatten(1).sum(1)
    facts = {"intercept": subject.score.double() - product}
    return Attribution(gradient, magnitude(gradient), subject.no_residual, facts)


def gradient_x_input(subject: Subject, options: GradientXInput, known: Known) -> Attribution:
    """Return gradient times input. Shrikumar et al., "Not just a black box" (2016).

    It adds up to the score if the score is a logit and the network homogeneous: piecewise linear, without biases.
    """
    values = subject.gradient * subject.inputs
    residual = subject.no_residual
    target = subject.chosen
    if known.homogeneous and isinstance(target, Logit) and target.link == "logit":
        residual = relative(total(values) - subject.score.double(), subject.score)
    return Attribution(values, summed(values), residual)


def smooth_grad(subject: Subject, options: Noisy, known: Known) -> Attribution:
    """Return the mean gradient of noisy copies, and its largest magnitude over the channels as map.

    Smilkov et al., "SmoothGrad" (2017).
    """
    mean, _ = subject.noisy(options.noise, options.draws)
    return Attribution(mean, magnitude(mean), subject.no_residual)


def var_grad(subject: Subject, options: Noisy, known: Known) -> Attribution:
    """Return the variance of the gradient over noisy copies. Adebayo et al., "Local explanation methods" (2018)."""
    _, variance = subject.noisy(options.noise, options.draws)
    return Attribution(variance, summed(variance), subject.no_residual)


def magnitude(values: torch.Tensor) -> torch.Tensor | None:
    """Return the largest magnitude over channels, (image, y, x); None for inputs that are no images."""
    return values.abs().amax(1) if values.ndim == 4 else None


def summed(values: torch.Tensor) -> torch.Tensor | None:
    """Return the sum over channels, (image, y, x); None for inputs that are no images."""
    return values.sum(1) if values.ndim == 4 else None


def total(values: torch.Tensor) -> torch.Tensor:
    """Return the sum of all values of each image, float64 (image,)."""
    return values.double().flatten(1).sum(1)
