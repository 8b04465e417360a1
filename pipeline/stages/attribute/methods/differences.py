"""Contributions to the difference between a score and that of a reference: DeepLIFT, Deep SHAP, linear SHAP."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from pipeline.errors import MicrotomeError
from pipeline.networks.contributions import contributions
from pipeline.networks.gradients import Logit, relative, scores
from pipeline.networks.graph.rescale import Differences, Rescale
from pipeline.networks.graph.reveal_cancel import RevealCancel
from pipeline.stages.attribute.methods.plain import summed, total
from pipeline.stages.attribute.options import DeepLift, DeepShap, LinearShap
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def deeplift(subject: Subject, options: DeepLift, known: Known) -> Attribution:
    """Return the contributions of the inputs to S(x) - S(x0), which they add up to.

    Shrikumar et al., "Learning important features through propagating activation differences" (ICML 2017): the rules
    rescale and RevealCancel.
    """
    reference = subject.reference[:1] if subject.one_baseline else subject.reference
    rules: Callable[[int], Differences] = partial(Rescale, subject.network, max_rule=options.max)
    if options.rule == "reveal_cancel":
        rules = partial(RevealCancel, subject.network, reference=reference)
    values = contributions(subject.network, subject.inputs, reference, subject.chosen, rules).values
    difference = subject.score.double() - subject.baseline_score.double()
    residual = relative(total(values) - difference, difference, subject.score)
    return Attribution(values, summed(values), residual)


def deep_shap(subject: Subject, options: DeepShap, known: Known) -> Attribution:
    """Return the mean of DeepLIFT over references; it adds up to S(x) less `phi0`, the mean score of the references.

    Lundberg and Lee, "A unified approach to interpreting model predictions" (NeurIPS 2017), section 4.2.
    """
    references = _background(subject, known)
    values = torch.zeros_like(subject.inputs, dtype=torch.float64)
    phi0 = torch.zeros_like(subject.score, dtype=torch.float64)
    rules = partial(Rescale, subject.network, max_rule=options.max)
    for reference in references.split(1):
        values += contributions(subject.network, subject.inputs, reference, subject.chosen, rules).values
        phi0 += scores(subject.network, reference, subject.chosen, len(subject.inputs))
    values, phi0 = (values / len(references)).to(subject.inputs.dtype), phi0 / len(references)
    difference = subject.score.double() - phi0
    residual = relative(total(values) - difference, difference, subject.score)
    return Attribution(values, summed(values), residual, {"phi0": phi0})


def linear_shap(subject: Subject, options: LinearShap, known: Known) -> Attribution:
    """Return w (x - E[x]), the Shapley values of a linear score w x + b of independent features.

    They add up to S(x) less `phi0` = w E[x] + b. Lundberg and Lee, "A unified approach to interpreting model
    predictions" (NeurIPS 2017), corollary 1, which prints b for it: true where w E[x] = 0 alone.
    """
    if isinstance(subject.chosen, Logit) and subject.chosen.link != "logit":
        raise MicrotomeError("linear SHAP explains logits: a probability is not linear in the input")
    expected = _background(subject, known).double().mean(0, keepdim=True)
    values = (subject.gradient.double() * (subject.inputs.double() - expected)).to(subject.inputs.dtype)
    rows = len(subject.inputs)
    phi0 = scores(subject.network, expected.to(subject.inputs.dtype), subject.chosen, rows).double()
    difference = subject.score.double() - phi0
    residual = relative(total(values) - difference, difference, subject.score)
    return Attribution(values, summed(values), residual, {"phi0": phi0})


def _background(subject: Subject, known: Known) -> torch.Tensor:
    if known.background is None or known.background.shape[1:] != subject.inputs.shape[1:]:
        shape = None if known.background is None else tuple(known.background.shape)
        raise MicrotomeError(
            f"this method compares with other inputs: give a `background` of inputs like "
            f"{tuple(subject.inputs.shape)}, not {shape}"
        )
    return known.background.to(subject.inputs.device, subject.inputs.dtype)
