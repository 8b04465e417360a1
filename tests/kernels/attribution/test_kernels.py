"""Numerics of attribution, against closed forms and brute force."""

import numpy as np
import pytest
import scipy.stats
import torch

from kernels.attribution import agreement, baselines, cam, paths, rollout


@pytest.mark.parametrize("steps", [1, 2, 7, 32])
def test_gauss_legendre_is_exact_for_polynomials(steps):
    t, w = paths.nodes(steps)
    for degree in range(2 * steps):
        assert (w * t**degree).sum() == pytest.approx(1 / (degree + 1), rel=1e-12)


def test_the_right_riemann_sum_is_that_of_the_paper():
    t, w = paths.nodes(50, "right")
    assert t[0] == 1 / 50 and t[-1] == 1
    # x0 * x1 at (3, 4) from 0: 12 t dt twice; the sum is 12 (m + 1) / (2 m), where 6 is exact.
    assert (w * 12 * t).sum() == pytest.approx(6.12, abs=1e-12)


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="0 steps, expected at least 1"):
        paths.nodes(0)


def test_cam_and_grad_cam_of_a_pooled_linear_head():
    A = torch.tensor([[[[1.0, 2], [3, 4]], [[0, 1], [-1, 2]]]])
    w = torch.tensor([[1.0, -1], [2, 0.5]])  # (class, unit)
    assert torch.equal(cam.cam(A, w[:1]), torch.tensor([[[1.0, 1], [4, 2]]]))
    assert torch.equal(cam.cam(A, w[1:]), torch.tensor([[[2.0, 4.5], [5.5, 9]]]))
    gradient = (w[0] / 4)[None, :, None, None].expand_as(A)
    assert torch.equal(cam.grad_cam(A, gradient), torch.tensor([[[0.25, 0.25], [1, 0.5]]]))


@pytest.mark.parametrize("seed", range(3))
def test_maps_are_those_of_loops(seed):
    generator = torch.Generator().manual_seed(seed)
    a, g = (torch.randn((2, 3, 4, 5), generator=generator, dtype=torch.float64) for _ in range(2))
    wanted = {"grad_cam": torch.zeros(2, 4, 5), "hires_cam": torch.zeros(2, 4, 5), "layer_cam": torch.zeros(2, 4, 5)}
    plus = torch.zeros(2, 4, 5, dtype=torch.float64)
    for image in range(2):
        for unit in range(3):
            own, slope = a[image, unit], g[image, unit]
            alpha = slope**2 / (2 * slope**2 + slope**3 * own.sum())
            plus[image] += (alpha * slope.clamp(min=0)).sum() * own
            wanted["grad_cam"][image] += slope.mean() * own
            wanted["hires_cam"][image] += slope * own
            wanted["layer_cam"][image] += slope.clamp(min=0) * own
    for name, each in wanted.items():
        torch.testing.assert_close(getattr(cam, name)(a, g), each.double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(cam.grad_cam_pp(a, g), plus, atol=1e-12, rtol=1e-12)


def test_grad_cam_pp_without_a_gradient_is_zero():
    a = torch.rand(1, 2, 3, 3)
    assert torch.equal(cam.grad_cam_pp(a, torch.zeros_like(a)), torch.zeros(1, 3, 3))


def test_grad_cam_pp_does_not_vanish_where_powers_of_the_gradient_do():
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn((2, 3, 4, 5), generator=generator) for _ in range(2))
    small = cam.grad_cam_pp(a, 1e-23 * g) / 1e-23  # squared, below the smallest float32
    wanted = cam.cam(a, g.relu().sum((2, 3))) / 2  # alpha -> 1/2
    torch.testing.assert_close(small, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("function", ["grad_cam", "hires_cam", "layer_cam", "grad_cam_pp"])
def test_an_image_has_the_same_bits_at_every_place_of_its_batch(function, dtype):
    """Also where maps have odd sizes, so that those of most images begin between two cache lines."""
    drawn = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=drawn)
    for units, size in ((1, (1, 1)), (16, (5, 5)), (33, (7, 7)), (64, (3, 4)), (130, (13, 13))):
        a, g = (torch.randn((16, units, *size), generator=drawn).to(dtype) for _ in range(2))
        whole = getattr(cam, function)(a, g)
        assert torch.equal(getattr(cam, function)(a[order], g[order]), whole[order]), (units, size)
        assert torch.equal(getattr(cam, function)(a[5:6], g[5:6])[0], whole[5]), (units, size)


@pytest.mark.parametrize("tokens", [5, 17, 50])
def test_attention_that_is_followed_has_the_same_bits_at_every_place(tokens):
    drawn = torch.Generator().manual_seed(0)
    a = [torch.rand((16, 3, tokens, tokens), generator=drawn).softmax(-1) for _ in range(3)]
    g = [torch.randn((16, 3, tokens, tokens), generator=drawn) for _ in range(3)]
    a_turned, g_turned = ([each.flip(0) for each in them] for them in (a, g))
    assert torch.equal(rollout.rollout(a_turned).flip(0), rollout.rollout(a))
    assert torch.equal(rollout.relevance(a_turned, g_turned).flip(0), rollout.relevance(a, g))


def test_rollout_follows_attention_through_blocks():
    generator = torch.Generator().manual_seed(0)
    blocks = [torch.rand((2, 3, 5, 5), generator=generator, dtype=torch.float64).softmax(-1) for _ in range(3)]
    found = rollout.rollout(blocks)
    wanted = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    for block in blocks:
        wanted = torch.stack([(block[i].mean(0) + torch.eye(5)) / 2 @ wanted[i] for i in range(2)])
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 5, dtype=torch.float64), atol=1e-14, rtol=0)


def test_relevance_begins_with_the_identity_and_adds():
    generator = torch.Generator().manual_seed(1)
    blocks = [torch.rand((2, 3, 5, 5), generator=generator, dtype=torch.float64) for _ in range(2)]
    slopes = [torch.randn((2, 3, 5, 5), generator=generator, dtype=torch.float64) for _ in range(2)]
    relevance = torch.eye(5, dtype=torch.float64).repeat(2, 1, 1)
    for a, g in zip(blocks, slopes, strict=True):
        relevance = relevance + (a * g).clamp(min=0).mean(1) @ relevance
    torch.testing.assert_close(rollout.relevance(blocks, slopes), relevance, atol=1e-12, rtol=0)


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_spearmans(ties):
    random = np.random.default_rng(0)
    a, b = random.normal(size=(2, 6, 40))
    if ties:
        a, b = a.round(0), b.round(0)
    wanted = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(agreement.rank_correlation(a, b), wanted, atol=1e-12)


def test_a_constant_map_has_no_rank_correlation():
    a = np.array([[1.0, 1, 1], [1, 2, 3], [1, np.nan, 2]])
    b = np.array([[1.0, 2, 3], [1, 2, 3], [1, 2, 3]])
    np.testing.assert_allclose(agreement.rank_correlation(a, b), [np.nan, 1, np.nan], rtol=1e-15)


def test_a_blurred_image_keeps_its_mean_and_a_constant_one_its_pixels():
    plain = torch.full((1, 3, 20, 24), 77, dtype=torch.uint8)
    assert torch.equal(baselines.blurred(plain), plain)
    noise = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    blurred = baselines.blurred(noise)
    assert blurred.double().std() < 0.25 * noise.double().std()
    torch.testing.assert_close(blurred.double().mean((2, 3)), noise.double().mean((2, 3)), atol=6, rtol=0)


def test_uniform_noise_depends_on_its_seed_alone():
    assert torch.equal(baselines.uniform((3, 8, 8), 5), baselines.uniform((3, 8, 8), 5))
    assert not torch.equal(baselines.uniform((3, 8, 8), 5), baselines.uniform((3, 8, 8), 6))
