"""Norm ratios of residual additions."""

import math

import pytest
import torch

from kernels.locality.skips import norm_ratio


@pytest.mark.parametrize("dim", [1, -1])
def test_plain_loops(dim):
    torch.manual_seed(0)
    z, branch = torch.randn(2, 3, 4, 5), 1e-20 * torch.randn(2, 3, 4, 5)
    found = norm_ratio(z, branch, dim).flatten(1)
    moved = [each.movedim(dim, -1).flatten(1, -2).double() for each in (z, branch)]
    for image in range(2):
        for position in range(found.shape[1]):
            lengths = [math.sqrt(sum(float(v) ** 2 for v in each[image, position])) for each in moved]
            assert float(found[image, position]) == pytest.approx(lengths[0] / lengths[1], rel=1e-9)


def test_a_branch_that_adds_nothing():
    found = norm_ratio(torch.ones(1, 2, 3), torch.tensor([[[0.0, 1, 0], [0, 1, 0]]]), 1)
    assert found.isnan().tolist() == [[True, False, True]] and float(found[0, 1]) == 1
