"""Ascent against closed forms, in float64: linear and quadratic scores, with each prior."""

import numpy as np
import pytest
import torch

from kernels.visualization.ascent import ascend
from kernels.visualization.priors import Gaussian, Spectrum, l2, total_variation
from kernels.visualization.spectrum import image_of

SHAPE = (3, 2, 5, 6)
SIZE = 2 * 5 * 6


def climbed(start, objective, steps=1200, rate=0.1, bounded=None):
    """Climb an objective that returns its value and its gradient."""
    return ascend(start, lambda place, _: objective(place)[1], lambda place: objective(place)[0], steps, rate, bounded)


def drawn(seed, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(weight):
    return lambda x: ((weight * x).flatten(1).sum(1), weight)


def plus(first, second, factor):
    """The sum of an objective and a multiple of another."""

    def both(x):
        (value, gradient), (other, pull) = first(x), second(x)
        return value + factor * other, gradient + factor * pull

    return both


def test_linear_score_less_squared_norm():
    """w x - lambda |x|^2 is highest at w / (2 lambda)."""
    weight = drawn(0, *SHAPE)
    found = climbed(drawn(1, *SHAPE), plus(linear(weight), l2, -0.3))
    torch.testing.assert_close(found.best, weight / 0.6, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.value, weight.square().flatten(1).sum(1) / 1.2, rtol=0, atol=1e-8)


def test_quadratic_score_less_squared_norm():
    """w x - x A x - lambda |x|^2 is highest where 2 (A + lambda) x = w."""
    weight, root = drawn(0, *SHAPE), drawn(2, SIZE, SIZE) / SIZE**0.5
    curved = root @ root.T

    def quadratic(x):
        flat = x.flatten(1)
        pulled = flat @ curved
        value = (weight.flatten(1) * flat).sum(1) - (pulled * flat).sum(1)
        return value, weight - 2 * pulled.reshape(x.shape)

    found = climbed(drawn(1, *SHAPE), plus(quadratic, l2, -0.3), 2000)
    expected = weight.flatten(1) @ torch.linalg.inv(2 * curved + 0.6 * torch.eye(SIZE, dtype=torch.float64))
    torch.testing.assert_close(found.best.flatten(1), expected, rtol=0, atol=1e-8)


def test_linear_score_and_the_gaussian_of_images():
    """w x + lambda log p(x) is highest at mean + S w / lambda, with the circulant covariance S written out."""
    images = np.random.default_rng(3).normal(size=(40, 2, 5, 6)).cumsum(3)
    spectrum = Spectrum.of(images[:15]).merge(Spectrum.of(images[15:]))
    weight = drawn(0, *SHAPE)
    gaussian = Gaussian(spectrum.mean, spectrum.covariance(0.5), weight)
    found = climbed(drawn(1, *SHAPE), plus(linear(weight), gaussian, 2.0), 3000, 0.3)
    whole = circulant(images) + 0.5 * half_grid_variance(images) * np.eye(SIZE)
    expected = images.mean(0).ravel() + weight.flatten(1).numpy() @ whole / 2
    np.testing.assert_allclose(found.best.flatten(1).numpy(), expected, rtol=0, atol=1e-8)


def circulant(images):
    """Return the mean over all shifts of the covariance of images, (pixel, pixel), by plain loops."""
    away = images - images.mean(0)
    count, _channels, height, width = away.shape
    whole = np.zeros((SIZE, SIZE))
    for y in range(height):
        for x in range(width):
            moved = np.roll(away, (y, x), (2, 3)).reshape(count, -1)
            whole += moved.T @ moved / count
    return whole / (height * width)


def half_grid_variance(images):
    """Return the mean variance over half of the frequencies, as `rfft2` keeps them."""
    away = np.fft.rfft2(images - images.mean(0), norm="ortho")
    return float((np.abs(away) ** 2).mean())


@pytest.mark.parametrize("prior", [l2, total_variation])
def test_gradients_of_penalties(prior):
    x = drawn(0, *SHAPE).requires_grad_()
    value, gradient = prior(x)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], gradient.detach(), rtol=1e-12, atol=1e-12)


def test_total_variation_by_loops():
    x = drawn(0, 1, 2, 3, 4)
    pairs = [(x[0, c, i + 1, j] - x[0, c, i, j]) ** 2 for c in range(2) for i in range(2) for j in range(4)]
    pairs += [(x[0, c, i, j + 1] - x[0, c, i, j]) ** 2 for c in range(2) for i in range(3) for j in range(3)]
    torch.testing.assert_close(total_variation(x)[0][0], sum(pairs))


def test_gradient_of_the_gaussian():
    images = np.random.default_rng(3).normal(size=(20, 2, 5, 6))
    spectrum, x = Spectrum.of(images), drawn(0, *SHAPE).requires_grad_()
    prior = Gaussian(spectrum.mean, spectrum.covariance(0.1), x.detach())
    value, gradient = prior(x)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], gradient.detach(), rtol=1e-9, atol=1e-9)


def test_never_below_its_start():
    """Steps that only lead down leave the start as the best place; each image is judged for itself."""
    weight = drawn(0, *SHAPE)
    start = weight / 0.6
    start[1] += 1

    def gradient(place, step):
        return -(weight - 0.6 * place) if step < 3 else torch.ones_like(place) * 5

    def value(x):
        return (weight * x).flatten(1).sum(1) - 0.3 * l2(x)[0]

    found = ascend(start, gradient, value, 20, 1.0)
    assert (found.value >= found.start).all()
    assert found.step[0] == 0
    torch.testing.assert_close(found.best[0], start[0])


@pytest.mark.parametrize(("bad", "last"), [(torch.nan, 19), (torch.inf, 0), (-torch.inf, 3), (1e200, 3)])
def test_a_gradient_that_is_not_finite_is_told_of_its_image_alone(bad, last):
    """Also of the last step, after which nothing moves; and one whose square overflows, which would stop the path."""
    weight, start = drawn(0, *SHAPE), drawn(1, *SHAPE)

    def gradient(place, step):
        given = weight - 0.6 * place
        if step == last:
            given[1, 0, 2, 3] = bad
        return given

    def value(x):
        return (weight * x).flatten(1).sum(1) - 0.3 * l2(x)[0]

    found = ascend(start, gradient, value, 20, 0.1, lambda x: x.clamp(-1, 1))
    assert found.finite.tolist() == [True, False, True]


def test_other_images_of_the_batch_change_nothing():
    weight, start = drawn(0, *SHAPE), drawn(1, *SHAPE)

    def run(rows):
        def objective(x):
            value = (weight[rows] * x).flatten(1).sum(1).tanh()
            return value, (1 - value.square()).view(-1, 1, 1, 1) * weight[rows]

        return climbed(start[rows], plus(objective, l2, -1.0), 30)

    assert torch.equal(run([0, 1, 2]).best[2], run([2]).best[0])


def test_bounds_hold():
    weight = drawn(0, *SHAPE)
    found = climbed(0 * weight, linear(weight), 200, 0.1, lambda x: x.clamp(-1, 2))
    expected = torch.where(weight > 0, 2.0, -1.0).double()
    torch.testing.assert_close(found.best, expected)


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (8, 5)])
def test_magnitudes_stay_and_phases_are_free(size):
    images = np.random.default_rng(0).normal(size=(9, 2, *size)) + 0.5
    magnitude = torch.from_numpy(Spectrum.of(images).mean_magnitude)
    phase = 3 * drawn(1, 4, 2, size[0], size[1] // 2 + 1)
    made = image_of(phase, magnitude, size[1])
    found = torch.fft.fft2(made, norm="ortho").abs()[..., : size[1] // 2 + 1]
    torch.testing.assert_close(found, magnitude.expand_as(found), rtol=1e-10, atol=1e-10)
    assert (made[0] - made[1]).abs().max() > 0.1


def test_sums_of_spectra_are_those_of_all_images():
    images = np.random.default_rng(0).normal(size=(7, 3, 4, 5))
    whole, parts = Spectrum.of(images), Spectrum.of(images[:3]).merge(Spectrum.of(images[3:]))
    assert whole.images == parts.images == 7
    np.testing.assert_allclose(parts.mean, images.mean(0), atol=1e-12)
    slow = np.abs(np.stack([[np.fft.fft2(c) / 20**0.5 for c in each] for each in images]))[..., :3].mean(0)
    np.testing.assert_allclose(whole.mean_magnitude, slow, atol=1e-12)
    np.testing.assert_allclose(whole.covariance(0.0), parts.covariance(0.0), atol=1e-12)


def test_linear_score_of_a_linear_generator():
    """w G z - lambda |z|^2 is highest at G' w / (2 lambda), among all that the generator makes."""
    weight, generator = drawn(0, 3, SIZE), drawn(2, 7, SIZE)

    def score(z):
        return ((z @ generator) * weight).sum(1), weight @ generator.T

    found = climbed(drawn(1, 3, 7), plus(score, l2, -0.4), 2000)
    torch.testing.assert_close(found.best, weight @ generator.T / 0.8, rtol=0, atol=1e-8)
