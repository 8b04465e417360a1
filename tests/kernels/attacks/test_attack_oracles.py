"""Attacks against those of torchattacks, where it is installed."""

import pytest
import torch
from torch import nn

from kernels.attacks import losses
from kernels.attacks.ascent import Look, apgd, pgd
from kernels.attacks.balls import Ball
from kernels.attacks.carlini_wagner import smallest

torchattacks = pytest.importorskip("torchattacks", reason="torchattacks is not installed")
pytestmark = pytest.mark.slow
LABELS = torch.tensor([0, 1, 2, 3])


def network():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(72, 5),
    ).eval()


def images():
    return 0.2 + 0.6 * torch.rand((4, 3, 8, 8), generator=torch.Generator().manual_seed(5))


def looks(net, loss, visited):
    def look(points):
        given = points.detach().requires_grad_()
        logits = net(given / 255)
        value = loss(logits, LABELS)
        (gradient,) = torch.autograd.grad(value.sum(), given)
        visited.append((points, value.detach()))
        return Look(value.detach(), gradient, losses.margin(logits.detach(), LABELS))

    return look


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_visits_the_points_of_the_library(norm):
    net, x, visited, last = network(), images(), [], []
    if norm == "linf":
        theirs = torchattacks.PGD(net, eps=8 / 255, alpha=2 / 255, steps=7, random_start=False)
        ball, rate = Ball(255 * x, "linf", 8.0), 2.0
    else:
        theirs = torchattacks.PGDL2(net, eps=0.5, alpha=0.2, steps=7, random_start=False)
        ball, rate = Ball(255 * x, "l2", 127.5), 51.0

    def judge(points):
        last.append(points)
        return losses.margin(net(points / 255).detach(), LABELS)

    pgd(255 * x, ball, looks(net, losses.cross_entropy, visited), judge, 7, rate)
    torch.testing.assert_close(last[0] / 255, theirs(x, LABELS), rtol=0, atol=2e-5)


@pytest.mark.parametrize(("norm", "name"), [("linf", "Linf"), ("l2", "L2")])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_apgd_reaches_the_loss_of_the_library(norm, name, loss):
    """Its first check compares with a loss of 0 in place of that of the start, so the paths may part by a hair."""
    net, x, visited = network(), images(), []
    eps = 8 / 255 if norm == "linf" else 0.5
    theirs = torchattacks.APGD(net, norm=name, eps=eps, steps=40, loss=loss)
    theirs.set_model_training_mode(False, False, False)
    torch.manual_seed(6)
    _, _, best, _ = theirs.attack_single_run(x, LABELS)
    torch.manual_seed(6)
    t = 2 * torch.rand(x.shape) - 1 if norm == "linf" else torch.randn(x.shape)
    size = t.flatten(1).abs().amax(1) if norm == "linf" else t.flatten(1).norm(dim=1)
    start = 255 * (x + eps * t / size.view(-1, 1, 1, 1)).clamp(0, 1)
    own = losses.cross_entropy if loss == "ce" else losses.dlr
    apgd(start, Ball(255 * x, norm, 255 * eps), looks(net, own, visited), 40)
    ours = torch.stack([value for _, value in visited]).amax(0)
    torch.testing.assert_close(ours, best, rtol=5e-3, atol=1e-3)


def test_the_ratio_is_the_librarys():
    logits = torch.randn((4, 6), generator=torch.Generator().manual_seed(7))
    theirs = torchattacks.APGD(network(), loss="dlr")
    torch.testing.assert_close(losses.dlr(logits, LABELS), theirs.dlr_loss(logits, LABELS))
    targeted = torchattacks.APGDT(network())
    targets = (LABELS + 1) % 6
    torch.testing.assert_close(losses.dlr(logits, LABELS, targets), targeted.dlr_loss_targeted(logits, LABELS, targets))


def test_the_shortest_changes_are_no_longer_than_the_librarys():
    net, x = network(), images()
    labels = net(x).argmax(1)

    def look(points):
        given = points.detach().requires_grad_()
        margin = losses.margin(net(given / 255), labels)
        return margin.detach(), torch.autograd.grad(margin.sum(), given)[0]

    found = smallest(255 * x, look, 60, 6)
    theirs = torchattacks.CW(net, c=100, kappa=0, steps=200, lr=0.01)(x, labels)
    changed = net(theirs).argmax(1) != labels
    length = (theirs - x).flatten(1).norm(dim=1)
    assert bool(changed.any()) and bool(found.length.isfinite().all())
    assert bool((found.length[changed] <= 1.1 * length[changed] + 1e-3).all())
