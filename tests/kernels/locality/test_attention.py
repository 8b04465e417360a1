"""Attention weights against torch's own products, and distances against plain loops."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from kernels.locality.attention import attention_weights, distances, mean_distance


@pytest.mark.parametrize("how", ["plain", "scale", "boolean", "added", "causal", "grouped"])
def test_weights_are_those_of_torch(how):
    """With the identity for values, scaled_dot_product_attention gives out its weights."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 2 if how == "grouped" else 4, 6, 8)
    mask = {"boolean": torch.rand(2, 1, 6, 6) > 0.4, "added": torch.randn(1, 4, 6, 6)}.get(how)
    if how == "boolean":
        mask |= torch.eye(6, dtype=torch.bool)
    scale = 0.7 if how == "scale" else None
    value = torch.eye(6).expand(2, key.shape[1], 6, 6)
    expected = functional.scaled_dot_product_attention(
        query, key, value, mask, is_causal=how == "causal", scale=scale, enable_gqa=how == "grouped"
    )
    found = attention_weights(query, key, mask, how == "causal", scale)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_uniform_attention_on_the_grid_of_vit_base():
    distance = distances((14, 14), (16.0, 16.0))
    weights = torch.full((1, 3, 197, 197), 1 / 197, dtype=torch.float64)
    found = mean_distance(weights, distance, special=1)
    assert found.shape == (1, 3, 2)
    np.testing.assert_allclose(found[..., 1], 116.49222709177168, rtol=1e-13)
    np.testing.assert_allclose(found[..., 0], 116.49222709177168 * 196 / 197, rtol=1e-13)


@pytest.mark.parametrize("special", [0, 1, 3])
def test_plain_loops(special):
    torch.manual_seed(special)
    grid, patch = (3, 2), (4.0, 10.0)
    tokens = special + 6
    weights = torch.randn(2, 2, tokens, tokens).softmax(-1)
    found = mean_distance(weights, distances(grid, patch), special)
    for image in range(2):
        for head in range(2):
            kept = renormalised = 0.0
            for i in range(6):
                far = total = 0.0
                for j in range(6):
                    weight = float(weights[image, head, special + i, special + j])
                    far += weight * math.hypot((i // 2 - j // 2) * 4, (i % 2 - j % 2) * 10)
                    total += weight
                kept, renormalised = kept + far / 6, renormalised + far / total / 6
            assert found[image, head].tolist() == pytest.approx([kept, renormalised], rel=1e-6)


def test_a_patch_that_attends_to_the_class_token_alone():
    weights = torch.zeros(1, 1, 5, 5)
    weights[..., 0] = 1
    found = mean_distance(weights, distances((2, 2), (1.0, 1.0)), 1)
    assert float(found[0, 0, 0]) == 0 and math.isnan(found[0, 0, 1])
