"""Methods that follow the attention of a transformer through its blocks."""

from __future__ import annotations

import torch

from kernels.attribution import rollout as kernels
from pipeline.networks.layer import LayerInfo
from pipeline.stages.attribute.options import AttentionRelevance, Rollout
from pipeline.stages.attribute.subject import Attribution, Subject


def rollout(subject: Subject, options: Rollout, tokens: LayerInfo) -> Attribution:
    """Return attention rollout: how much of each patch is in the class token, or in the tokens on average.

    The law: the attention of a token, over all of them, adds up to 1. Abnar and Zuidema, "Quantifying attention flow in
    transformers" (ACL 2020).
    """
    weights, _ = subject.attention(by_class=False)
    found = kernels.rollout(weights)
    lacking = (found.double().sum(2) - 1).abs().amax(1)
    return Attribution(None, of_patches(found, tokens), lacking)


def attention_relevance(subject: Subject, options: AttentionRelevance, tokens: LayerInfo) -> Attribution:
    """Return the attention of all blocks weighed by its gradient: Chefer et al. (ICCV 2021), for self-attention."""
    weights, gradients = subject.attention(by_class=True)
    return Attribution(None, of_patches(kernels.relevance(weights, gradients), tokens), subject.none)


def of_patches(flow: torch.Tensor, tokens: LayerInfo) -> torch.Tensor:
    """Return the row of the class token, or the mean over all tokens where there is none, as (image, y, x)."""
    row = flow[:, 0] if tokens.first else flow.mean(1)
    _, height, width = tokens.shape
    return row[:, tokens.first : tokens.first + height * width].unflatten(1, (height, width))
