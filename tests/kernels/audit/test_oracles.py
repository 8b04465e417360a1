"""Measures of faithfulness against captum's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels.audit import faithfulness

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("scaled", [False, True])
def test_infidelity_is_captums(scaled: bool) -> None:
    """Captum multiplies perturbation and attribution: with contributions over inputs, both are sums over the square."""
    from captum.metrics import infidelity

    draw, images, sets = np.random.default_rng(4), 3, 9
    inputs = torch.from_numpy(draw.random((images, 3, 6, 7)) + 0.1)
    contributions = torch.from_numpy(draw.standard_normal((images, 3, 6, 7)))
    weight = torch.from_numpy(draw.standard_normal(3 * 6 * 7))

    def score(x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ weight)

    masks = torch.from_numpy(np.stack([faithfulness.squares((6, 7), 3, sets, [at]) for at in range(images)]))
    masks = masks.reshape(images * sets, 1, 6, 7)

    def perturbed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gone = x * masks  # against black: what the square holds
        return gone, x - gone

    theirs = infidelity(
        score, perturbed, inputs, contributions / inputs, n_perturb_samples=sets, normalize=scaled
    ).numpy()
    rows = np.repeat(np.arange(images), sets)
    moved = inputs[rows] * ~masks
    drop = (score(inputs)[rows] - score(moved)).reshape(images, sets).numpy()
    said = faithfulness.sums(contributions.sum(1).numpy(), masks.reshape(images, sets, -1).numpy())
    own = faithfulness.infidelity(said, drop, scaled)
    np.testing.assert_allclose(own * (drop**2).mean(1) if scaled else own, theirs, rtol=1e-5)
