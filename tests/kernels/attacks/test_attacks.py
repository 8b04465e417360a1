"""Attacks against closed forms on linear networks, brute force, and the laws of balls and rounding."""

import itertools
import math

import numpy as np
import pytest
import torch

from kernels.attacks import losses, rounding
from kernels.attacks.ascent import Best, Look, apgd, pgd
from kernels.attacks.balls import INSIDE, Ball, lengths
from kernels.attacks.carlini_wagner import smallest
from kernels.attacks.intervals import auroc, mean_interval, share_interval
from kernels.attacks.square import side_of, square

SHAPE = (3, 4, 4)
SEEDS = [[0, 7, row] for row in range(3)]


def middle(rows=3):
    """Images far from black and white, so that no ball leaves the box."""
    return torch.randint(90, 160, (rows, *SHAPE), generator=torch.Generator().manual_seed(1)).float()


class Linear:
    """A network of two logits, w.x / 255 + b and 0, and its looks."""

    def __init__(self, seed=0, bias=0.5):
        self.w = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        self.bias = bias

    def margin(self, points):
        return (points / 255 * self.w).flatten(1).sum(1) + self.bias

    def look(self, points):
        gradient = -(self.w / 255).expand_as(points)
        return Look(-self.margin(points), gradient, self.margin(points))


@pytest.mark.parametrize("steps", [1, 8])
def test_a_linear_network_is_attacked_by_signs(steps):
    net, images = Linear(), middle()
    ball = Ball(images, "linf", 6.0)
    best = pgd(images, ball, net.look, net.margin, steps, rate=6.0)
    assert torch.equal(best.points, images - 6 * net.w.sign())
    automatic = apgd(images, ball, net.look, steps)
    assert torch.equal(automatic.points, images - 6 * net.w.sign())


@pytest.mark.parametrize("start", ["image", "random"])
def test_a_linear_network_is_attacked_along_its_weights(start):
    net, images = Linear(), middle()
    ball = Ball(images, "l2", 100.0)
    first = images if start == "image" else ball.random(SEEDS)
    wanted = images - 100 * INSIDE * net.w / net.w.norm()
    for best in (pgd(first, ball, net.look, net.margin, 40, rate=40.0), apgd(first, ball, net.look, 40)):
        torch.testing.assert_close(best.points, wanted, rtol=0, atol=0.3)
        assert bool((lengths(best.points - images) <= 100).all())


def test_the_shortest_change_is_the_distance_to_the_plane():
    net, images = Linear(bias=0.0), middle()
    net.bias = -float(net.margin(images).min()) + 0.4
    distance = net.margin(images) / net.w.norm()  # in units of the pixel range

    def look(points):
        return net.margin(points), (net.w / 255).expand_as(points)

    found = smallest(images, look, 300, 6)
    assert bool(found.length.isfinite().all()) and bool((net.margin(found.points) < 0).all())
    ratio = found.length / distance
    assert bool((ratio >= 1 - 1e-4).all()) and bool((ratio < 1.5).all())


def test_without_success_the_image_stays():
    images = middle()
    found = smallest(images, lambda points: (torch.ones(len(points)), torch.zeros_like(points)), 3, 3)
    assert torch.equal(found.points, images) and bool(found.length.isinf().all()) and found.first.tolist() == [-1] * 3


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_projections_are_brute_force(norm):
    """Of a grid of allowed points, none is nearer; inside the box, where the l2 projection is exact."""
    image = torch.tensor([[[[100.0, 120.0]]]])
    point, ball = torch.tensor([[[[109.0, 113.0]]]]), Ball(image, norm, 5.0)
    found = ball.projected(point)
    step = np.arange(-5, 5.001, 0.05)
    grid = np.array([p for p in itertools.product(step, step) if norm == "linf" or np.hypot(*p) <= 5])
    delta = (point - image).flatten().numpy()
    nearest = np.abs(grid - delta).__pow__(2).sum(1).min() ** 0.5
    assert float((found - point).norm()) == pytest.approx(nearest, abs=0.05)
    assert torch.equal(ball.projected(found), found) or norm == "l2"


def test_projections_stay_in_ball_and_box():
    images = torch.randint(0, 256, (4, *SHAPE), generator=torch.Generator().manual_seed(2)).float()
    far = images + 400 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    for norm, radius in (("linf", 7.0), ("l2", 60.0)):
        ball = Ball(images, norm, radius)
        for points in (ball.projected(far), ball.random([[0, row] for row in range(4)])):
            assert float(points.min()) >= 0 and float(points.max()) <= 255
            size = (points - images).abs().amax() if norm == "linf" else lengths(points - images).amax()
            assert float(size) <= radius


def test_random_starts_are_of_their_own_seeds():
    ball = Ball(middle(), "l2", 30.0)
    together = ball.random(SEEDS)
    alone = Ball(middle()[1:2], "l2", 30.0).random(SEEDS[1:2])
    assert torch.equal(together[1:2], alone) and not torch.equal(together[0] - middle()[0], together[1] - middle()[1])


def spend(delta, radius):
    """The l2 rule written as a loop."""
    base = [math.trunc(each) for each in delta]
    left = radius**2 - sum(each**2 for each in base)
    order = sorted(range(len(delta)), key=lambda at: -abs(delta[at] - base[at]))
    for at in order:
        price = 2 * abs(base[at]) + 1
        if delta[at] == base[at] or price > left:
            break
        left -= price
        base[at] += 1 if delta[at] > 0 else -1
    return base


@pytest.mark.parametrize("seed", range(4))
def test_what_is_left_of_a_radius_is_spent(seed):
    images, radius = middle(1), 9.0
    delta = 3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ball = Ball(images.double(), "l2", radius)
    delta = delta * (0.999 * radius / delta.norm())
    found = rounding.spending(ball, images + delta)
    wanted = spend(delta.flatten().tolist(), radius)
    assert (found - images).flatten().tolist() == wanted
    towards = rounding.towards(images.double(), images + delta)
    assert float((towards - images).norm()) <= float((found - images).norm()) <= radius
    assert bool(((towards - images).abs() <= delta.abs()).all())


def test_small_changes_survive_by_spending():
    """A change of a third of a grey value everywhere is nothing when it is rounded towards the image."""
    images = middle(1)
    points, ball = images + 0.3, Ball(images, "l2", 0.3 * images.numel() ** 0.5)
    assert torch.equal(rounding.towards(images, points), images)
    moved = (rounding.spending(ball, points) - images).sum()
    assert int(moved) == int(0.09 * images.numel())


def test_distances_are_exact():
    a = torch.zeros((1, 1, 1, 2), dtype=torch.uint8)
    b = torch.tensor([[[[3, 4]]]], dtype=torch.uint8)
    linf, l2 = rounding.distances(b, a)
    assert linf.tolist() == [4.0] and l2.tolist() == [5 / 255]


def test_noise_has_the_norms_of_the_attack():
    images = middle().to(torch.uint8)
    attacked = (images.int() + torch.randint(-6, 7, images.shape)).to(torch.uint8)
    made = rounding.noise(images, attacked, SEEDS)
    for before, after in zip(rounding.distances(images, attacked), rounding.distances(images, made), strict=True):
        assert torch.equal(before, after)
    assert not torch.equal(made, attacked)
    assert torch.equal(rounding.noise(images[1:2], attacked[1:2], SEEDS[1:2]), made[1:2])


LOGITS = torch.tensor([[2.0, 1.0, -1.0, 0.5], [0.0, 3.0, 1.0, 2.5]], dtype=torch.float64)


def test_losses_by_hand():
    sources, targets = torch.tensor([0, 1]), torch.tensor([2, 3])
    assert losses.margin(LOGITS, sources).tolist() == [1.0, 0.5]
    assert losses.margin(LOGITS, sources, targets).tolist() == [3.0, 0.5]
    assert losses.dlr(LOGITS, sources).tolist() == pytest.approx([-1 / 1.5, -0.5 / 2.0])
    scale = [2.0 - (0.5 + -1.0) / 2, 3.0 - (1.0 + 0.0) / 2]
    assert losses.dlr(LOGITS, sources, targets).tolist() == pytest.approx([-3 / scale[0], -0.5 / scale[1]])
    likely = LOGITS.softmax(1).log().tolist()
    assert losses.cross_entropy(LOGITS, sources).tolist() == pytest.approx([-likely[0][0], -likely[1][1]])
    assert losses.cross_entropy(LOGITS, sources, targets).tolist() == pytest.approx([likely[0][2], likely[1][3]])


@pytest.mark.parametrize("targeted", [False, True])
def test_the_ratio_knows_no_shift_and_no_scale(targeted):
    sources, targets = torch.tensor([0, 1]), torch.tensor([2, 3]) if targeted else None
    same = losses.dlr(5 * LOGITS + 7, sources, targets)
    torch.testing.assert_close(same, losses.dlr(LOGITS, sources, targets))


def test_squares_lower_the_margin_and_stay_inside():
    net, images = Linear(), middle()
    ball = Ball(images, "linf", 6.0)
    few, many = (square(ball, net.margin, queries, SEEDS) for queries in (2, 120))
    assert bool((many.margin <= few.margin).all()) and bool((many.margin < few.margin).any())
    assert float((many.points - images).abs().max()) == 6
    exact = net.margin(images - 6 * net.w.sign())
    assert bool((many.margin >= exact - 1e-5).all())
    assert torch.equal(square(Ball(images[1:2], "linf", 6.0), net.margin, 2, SEEDS[1:2]).points, few.points[1:2])
    with pytest.raises(ValueError, match="linf"):
        square(Ball(images, "l2", 6.0), net.margin, 2, SEEDS)
    assert side_of(0.0, (32, 32)) == 29 and side_of(1.0, (32, 32)) == 1 and side_of(0.5, (1, 9)) == 1


def test_the_best_point_and_the_first_success_are_kept():
    best = Best(torch.zeros(2, 1), torch.tensor([1.0, -1.0]))
    best.update(torch.ones(2, 1), torch.tensor([-2.0, 3.0]), 1)
    best.update(2 * torch.ones(2, 1), torch.tensor([-1.0, -5.0]), 2)
    assert best.points[:, 0].tolist() == [1, 2] and best.margin.tolist() == [-2, -5] and best.first.tolist() == [1, 0]


def test_automatic_steps_are_those_of_the_algorithm():
    """A concave bowl, whose top the first steps overshoot: written row by row, as algorithm 1 reads."""
    centre = middle(2) + torch.tensor([0.7, 3.1]).view(-1, 1, 1, 1)

    def look(points):
        return Look(-(points - centre).flatten(1).square().sum(1), -2 * (points - centre), torch.ones(len(points)))

    ball = Ball(middle(2), "l2", 40.0)
    seen = []
    apgd(ball.random(SEEDS[:2]), ball, lambda points: seen.append(points.clone()) or look(points), 30)
    for row in range(2):
        own = Ball(middle(2)[row : row + 1], "l2", 40.0)
        wanted = loop(
            own, lambda points, row=row: look_row(points, centre[row : row + 1]), own.random([SEEDS[row]]), 30
        )
        for here, there in zip(seen, wanted, strict=True):
            torch.testing.assert_close(here[row : row + 1], there, rtol=0, atol=1e-3)


def look_row(points, centre):
    return -float((points - centre).square().sum()), -2 * (points - centre)


def loop(ball, look, x, steps):
    checks, last, before = [0, int(0.22 * steps)], 0, int(0.22 * steps)
    while checks[-1] < steps:
        checks.append(checks[-1] + max(before := before - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)))
    f, g = look(x)
    values, visited, eta = [f], [x], 80.0
    best, top, pull = x, f, g
    x_old, reduced, top_before = x, True, f
    for k in range(steps):
        z = ball.projected(x + eta * ball.direction(g))
        x_new = z if k == 0 else ball.projected(x + 0.75 * (z - x) + 0.25 * (x - x_old))
        x_old, x = x, x_new
        f, g = look(x)
        visited.append(x)
        if f > top:
            best, top, pull = x, f, g
        values.append(f)
        if k + 1 in checks:
            span = k + 1 - last
            rises = sum(values[i + 1] > values[i] for i in range(last, k + 1))
            if rises <= 0.75 * span or (not reduced and top_before >= top):
                eta, x, g, reduced = eta / 2, best, pull, True
            else:
                reduced = False
            last, top_before = k + 1, top
    return visited


def test_intervals():
    values = np.array([1.0, 2.0, 4.0, math.nan])
    mean, low, high, count = mean_interval(values, 0.99)
    half = 9.92484320091807 * np.std([1, 2, 4], ddof=1) / 3**0.5  # Student's t of 2 degrees of freedom, 99 %
    assert (mean, count) == (7 / 3, 3) and (low, high) == pytest.approx((mean - half, mean + half))
    assert mean_interval(np.array([math.nan]), 0.99)[3] == 0 and math.isnan(mean_interval(np.ones(1), 0.99)[1])
    assert share_interval(8, 10, 0.95) == pytest.approx((0.490162, 0.943318), abs=1e-5)
    assert share_interval(0, 4, 0.95)[0] == 0 and math.isnan(share_interval(0, 0, 0.95)[0])


def test_auroc_counts_pairs():
    scores, positive = np.array([1.0, 2.0, 2.0, 5.0, 0.0]), np.array([False, True, False, True, True])
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auroc(scores, positive) == pytest.approx(np.mean(pairs))
    assert math.isnan(auroc(scores, np.ones(5, bool)))
