"""Methods that follow the attention of a transformer through its blocks."""

from __future__ import annotations

import torch

from kernels.attribution import rollout as kernels
from pipeline.networks.fitness import Attention
from pipeline.stages.attribute.options import AttentionRelevance, Rollout
from pipeline.stages.attribute.subject import Attribution, Known, Subject


def rollout(subject: Subject, options: Rollout, known: Known) -> Attribution:
    """Return attention rollout: how much of each patch is in the tokens that the logits are read from.

    The law: the attention of a token, over all of them, adds up to 1. Abnar and Zuidema, "Quantifying attention flow in
    transformers" (ACL 2020).
    """
    assert known.attention is not None
    weights, _ = subject.attention(by_class=False)
    found = kernels.rollout(weights)
    lacking = (found.double().sum(2) - 1).abs().amax(1)
    return Attribution(None, of_patches(found, known.attention), lacking)


def attention_relevance(subject: Subject, options: AttentionRelevance, known: Known) -> Attribution:
    """Return the attention of all blocks weighed by its gradient: Chefer et al. (ICCV 2021), for self-attention."""
    assert known.attention is not None
    weights, gradients = subject.attention(by_class=True)
    flow = kernels.relevance(weights, gradients)
    return Attribution(None, of_patches(flow, known.attention), subject.no_residual)


def of_patches(flow: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Return the mean row of the tokens that the logits are read from, of the patches, as (image, y, x)."""
    row, info = flow[:, list(attention.read)].mean(1), attention.layer
    _, height, width = info.shape
    return row[:, info.first : info.first + height * width].unflatten(1, (height, width))
