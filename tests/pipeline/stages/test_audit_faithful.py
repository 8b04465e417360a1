"""Tests of faithfulness against loops that change one image at a time, and what a linear network must give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from toy_batch import Linear, Toy, toy

from kernels.audit.imputation import imputed
from pipeline.errors import MicrotomeError
from pipeline.stages.audit.faithful import (
    TESTS,
    Deletion,
    Infidelity,
    Insertion,
    LinearView,
    LogOdds,
    Road,
    SensitivityN,
    Stability,
)
from pipeline.stages.audit.trials import noisy, removal, subsets

SIZE, IMAGES = (4, 5), 3
DRAW = np.random.default_rng(2)
PIXELS = DRAW.integers(1, 256, (IMAGES, 3, *SIZE), dtype=np.uint8)
MAPS = DRAW.standard_normal((IMAGES, *SIZE)).astype(np.float32)
NETWORK = Linear(SIZE, 3)


def exact(batch: Toy) -> np.ndarray:
    """What each pixel contributes to the score against black: of a linear network, gradient x input."""
    return batch.explain()


def said(pixels: np.ndarray, image: int, of: int) -> tuple[float, float]:
    """Return logit and probability of a class of one image, uint8 (3, y, x)."""
    with torch.no_grad():
        logits = NETWORK(torch.from_numpy(pixels[None]).float() / 255)[0].numpy()
    odds = np.exp(logits - logits.max())
    return float(logits[of]), float(odds[of] / odds.sum())


@pytest.mark.parametrize("filler", ["black", "mean"])
@pytest.mark.parametrize("trial", ["deletion", "insertion"])
def test_curves_are_those_of_a_loop(trial: str, filler: str) -> None:
    batch = toy(NETWORK, PIXELS, MAPS)
    options = (Deletion if trial == "deletion" else Insertion)(steps=5, fillers=[filler])
    found = getattr(removal, trial)(batch, options)
    for image in range(IMAGES):
        own, of = PIXELS[image], int(batch.classes[image])
        colour = own.astype(float).mean((1, 2)).round().astype(np.uint8) if filler == "mean" else np.zeros(3, np.uint8)
        order = np.argsort(-MAPS[image].ravel(), kind="stable")
        twin = []
        for step in range(6):
            changed = own.copy()
            first = order[: 4 * step] if trial == "deletion" else order[4 * step :]
            changed.reshape(3, -1)[:, first] = colour[:, None]
            twin.append(said(changed, image, of))
        score, probability = np.array(twin).T
        np.testing.assert_allclose(found["score_curve"][image, 0], score, rtol=1e-6)
        np.testing.assert_allclose(found["probability_curve"][image, 0], probability, rtol=1e-6)
        assert found[f"score_{filler}"][image] == pytest.approx(np.trapezoid(score, dx=0.2), rel=1e-6)
        assert found[f"probability_{filler}"][image] == pytest.approx(np.trapezoid(probability, dx=0.2), rel=1e-6)


def test_several_fillers_have_a_curve_each() -> None:
    batch = toy(NETWORK, PIXELS, MAPS)
    both = removal.deletion(batch, Deletion(steps=3, fillers=["black", "blur"]))
    assert both["score_curve"].shape == (IMAGES, 2, 4)
    alone = removal.deletion(toy(NETWORK, PIXELS, MAPS), Deletion(steps=3, fillers=["blur"]))
    np.testing.assert_array_equal(both["score_curve"][:, 1], alone["score_curve"][:, 0])
    np.testing.assert_array_equal(both["score_blur"], alone["score_blur"])
    assert not np.array_equal(both["score_black"], both["score_blur"])


def test_no_order_beats_that_of_what_pixels_do() -> None:
    """Of a linear network, the true contributions make the fastest fall and the fastest rise."""
    right = toy(NETWORK, PIXELS, exact)
    wrong = toy(NETWORK, PIXELS, lambda batch: -exact(batch))
    options = Deletion(steps=20)
    best, worst = (removal.deletion(each, options)["score_black"] for each in (right, wrong))
    drawn = removal.deletion(toy(NETWORK, PIXELS, MAPS), options)["score_black"]
    assert (best < drawn).all()
    assert (drawn < worst).all()
    rise = removal.insertion(right, Insertion(steps=20, fillers=["black"]))["score_black"]
    assert (
        rise > removal.insertion(toy(NETWORK, PIXELS, MAPS), Insertion(steps=20, fillers=["black"]))["score_black"]
    ).all()


def test_other_images_of_the_batch_change_nothing() -> None:
    options = Deletion(steps=4)
    classes = toy(NETWORK, PIXELS, MAPS).classes
    whole = removal.deletion(toy(NETWORK, PIXELS, MAPS, classes), options)
    one = removal.deletion(toy(NETWORK, PIXELS[1:2], MAPS[1:2], classes[1:2]), options)
    np.testing.assert_array_equal(whole["score_curve"][1], one["score_curve"][0])


def test_road_fills_and_asks_again() -> None:
    batch = toy(NETWORK, PIXELS, MAPS)
    found = removal.road(batch, Road(shares=[0.25, 0.6], noise=0.05))
    for image in range(IMAGES):
        for order, values in enumerate((MAPS[image], -MAPS[image])):
            places = np.argsort(np.argsort(-values.ravel(), kind="stable"))
            for at, count in enumerate((5, 12)):
                gone = (places < count).reshape(SIZE)
                filled = imputed(PIXELS[image] / 255, gone, 0.05, [100 + image, 3, at])
                changed = np.rint(np.clip(filled, 0, 1) * 255).astype(np.uint8)
                every = [said(changed, image, of) for of in range(3)]
                of = int(batch.classes[image])
                assert found["probability_curve"][image, order, at] == pytest.approx(every[of][1], rel=1e-6)
                same = max(range(3), key=lambda each: every[each][0]) == of
                assert found["accuracy_curve"][image, order, at] == same
    np.testing.assert_allclose(found["probability_most_first"], found["probability_curve"][:, 0].mean(1))
    np.testing.assert_allclose(found["accuracy_least_first"], found["accuracy_curve"][:, 1].mean(1))


def test_the_sums_of_a_linear_network_are_what_sets_do() -> None:
    batch = toy(NETWORK, PIXELS, exact)
    found = subsets.sensitivity_n(batch, SensitivityN(shares=[0.1, 0.5, 0.9], sets=20))
    np.testing.assert_allclose(found["correlation"], 1, atol=1e-6)
    np.testing.assert_allclose(found["mean_correlation"], 1, atol=1e-6)
    found = subsets.infidelity(batch, Infidelity(sets=20, side=0.5))
    np.testing.assert_allclose(found["infidelity"], 0, atol=1e-9)
    np.testing.assert_allclose(found["scaled_infidelity"], 0, atol=1e-9)


def test_other_maps_are_less_than_perfect_with_the_same_forwards() -> None:
    batch = toy(NETWORK, PIXELS, exact)
    options = SensitivityN(shares=[0.5], sets=40)
    subsets.sensitivity_n(batch, options)
    counted = []
    NETWORK.register_forward_hook(lambda *_: counted.append(1))
    other = batch.of("other", "", MAPS, {})
    other.__dict__ |= {"network": NETWORK}
    found = subsets.sensitivity_n(other, options)
    assert not counted, "the sets are the same for every method: their forwards are made once"
    assert (np.abs(found["correlation"]) < 0.9).all()
    infidelity = subsets.infidelity(other, Infidelity(sets=20))["scaled_infidelity"]
    assert (infidelity > 0.3).all()
    NETWORK._forward_hooks.clear()


def test_log_odds_by_hand() -> None:
    batch = toy(NETWORK, PIXELS, exact)
    found = removal.log_odds(batch, LogOdds(share=0.3))["change"]
    weight = NETWORK.weight.detach().numpy().reshape(3, 3, *SIZE)
    logits = batch.logits.numpy()
    for image in range(IMAGES):
        of, against = np.argsort(-logits[image])[:2]
        assert of == batch.classes[image]
        difference = ((weight[of] - weight[against]) * PIXELS[image] / 255).sum(0).ravel()
        erased = np.sort(difference)[::-1][:6]
        assert found[image] == pytest.approx(erased[erased > 0].sum(), rel=1e-5)
    drawn = removal.log_odds(toy(NETWORK, PIXELS, MAPS, control="random"), LogOdds(share=0.3))["change"]
    assert (drawn < found).all()


def test_log_odds_need_a_second_class() -> None:
    with pytest.raises(MicrotomeError, match="has one logit"):
        removal.log_odds(toy(Linear(SIZE, 1), PIXELS, exact), LogOdds(share=0.3))


def test_the_linear_view_of_a_linear_network_is_right_at_every_radius() -> None:
    batch = toy(NETWORK, PIXELS)
    found = noisy.linear_view(batch, LinearView(radii=[1, 60], draws=6))["r2"]
    np.testing.assert_allclose(found, 1, atol=1e-6)


def test_the_linear_view_of_a_square_ends() -> None:
    class Square(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.double().square().flatten(1).sum(1), x.double().flatten(1).sum(1) * 0], 1)

    found = noisy.linear_view(toy(Square(), PIXELS // 2 + 60), LinearView(radii=[1, 90], draws=30))["r2"]
    assert (found[:, 0] > 0.98).all()
    assert (found[:, 1] < found[:, 0]).all()


def test_maps_of_a_linear_network_change_as_the_image_does() -> None:
    """Gradient x input of a linear network moves by weight x noise, and no more."""
    batch = toy(NETWORK, PIXELS, exact)
    found = noisy.stability(batch, Stability(noise=0.05, draws=2))
    changes = []
    for draw in range(2):
        moved = noisy.noisy(batch, 0.05 * 255, draw)
        maps = batch.explain(inputs=moved.float() / 255)
        own = [np.linalg.norm(b - a) / np.linalg.norm(a) for a, b in zip(batch.maps, maps, strict=True)]
        changes.append(own)
        spread = (moved.double() - torch.from_numpy(PIXELS).double()).std()
        assert 8 < float(spread) < 15
    np.testing.assert_allclose(found["largest_change"], np.max(changes, 0), rtol=1e-6)
    assert (found["rank_correlation"] > 0.5).all()


def test_options_that_cannot_be_meant() -> None:
    for make, said in (
        (lambda: Road(shares=[0.5, 0.2]), "ascending"),
        (lambda: Road(shares=[1.0]), "less than 1"),
        (lambda: Deletion(fillers=["black", "black"]), "each filler once"),
        (lambda: LinearView(radii=[3, 3]), "ascending"),
        (lambda: Deletion(steps=1), "greater than or equal to 2"),
    ):
        with pytest.raises(ValidationError, match=said):
            make()


@pytest.mark.parametrize("name", sorted(TESTS))
def test_what_is_measured_is_what_is_declared(name: str) -> None:
    options = TESTS[name].options()
    if name in ("sensitivity_n", "infidelity"):
        options = options.model_copy(update={"sets": 3})
    function = next(getattr(each, name) for each in (removal, subsets, noisy) if hasattr(each, name))
    found = function(toy(NETWORK, PIXELS, exact), options)
    measures = TESTS[name].measures(options)
    assert {key: values.shape for key, values in found.items()} == {
        key: (IMAGES, *measure.shape) for key, measure in measures.items()
    }
