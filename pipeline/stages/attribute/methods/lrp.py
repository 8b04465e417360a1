"""Layer-wise relevance propagation."""

from __future__ import annotations

import torch

from kernels.attribution.relevance import Rule
from pipeline.networks.gradients import relative
from pipeline.networks.graph.propagated import Plan
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import to_maps
from pipeline.networks.relevance import relevance
from pipeline.stages.attribute.methods.plain import summed, total
from pipeline.stages.attribute.options import Lrp, OwnRule
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def lrp(subject: Subject, options: Lrp, known: Known) -> Attribution:
    """Share the score among the pixels, layer by layer; biases and constants keep a part, and a part is lost.

    The law: the map, `bias` and `leak` add up to the score; the residual is relative to the larger of |score| and the
    sum of magnitudes, which is stored as `magnitude`. Bach et al. (PLoS ONE 2015); `docs/attribution.md` has the rules.
    """
    found = relevance(
        subject.network,
        subject.inputs,
        subject.chosen,
        plan_of(options, subject.bounds),
        [each.name for each in known.units],
    )
    score, magnitude = subject.score.double(), found.values.double().flatten(1).abs().sum(1)
    lacking = total(found.values) + found.bias + found.leak - score
    facts = {"bias": found.bias, "leak": found.leak, "magnitude": magnitude}
    if found.positive is not None and found.positive.ndim == 4:
        facts |= {"relevance": found.positive.sum(1), "counter_relevance": (found.values - found.positive).sum(1)}
    units = {each.name: of_units(found.layers[each.name], each) for each in known.units}
    return Attribution(found.values, summed(found.values), relative(lacking, score, magnitude), facts, units)


def plan_of(options: Lrp, bounds: tuple[torch.Tensor, torch.Tensor] | None) -> Plan:
    """Return the rules that options ask for."""
    low, high = (None, None) if bounds is None else bounds
    rules = tuple((pattern, _rule(each)) for pattern, each in options.rules.items())
    return Plan(_rule(options), rules, options.preset, low, high, "signs" in options.keep)


def _rule(options: Lrp | OwnRule) -> Rule:
    if options.rule == "z_plus":
        return Rule()
    return Rule(options.rule, options.alpha, options.epsilon, options.gamma)


def of_units(values: torch.Tensor, info: LayerInfo) -> torch.Tensor:
    """Return the sum of a layer's relevance over positions and special tokens, float64 (image, unit)."""
    maps, special = to_maps(values.double(), info)
    found = maps.flatten(2).sum(2)
    return found if special is None else found + special.sum(1)
