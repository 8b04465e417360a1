"""Calibration measures and methods against fixtures with known values, brute force, and scikit-learn."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.calibration import binning as maps
from kernels.calibration.methods import NAMES, facts, fit, judge, uncalibrated
from kernels.calibration.reliability import (
    FLOOR,
    Reliability,
    check_labels,
    check_logits,
    ece_equal_mass,
    equal_mass,
    equal_width,
    log_softmax,
    logits_of,
    softmax,
)
from kernels.calibration.scaling import PENALTIES, fit_matrix, fit_regularised_matrix, fit_temperature, fit_vector
from kernels.calibration.uncertainty import ClasswiseNoise, noise

SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))
GOLDEN = SHARED / "golden" / "calibration.json"
FIXTURES = ("k3_over", "k5_under")


@pytest.fixture(scope="module")
def golden():
    if not GOLDEN.exists():
        pytest.skip(f"{GOLDEN} is not there")
    return json.loads(GOLDEN.read_text())


@pytest.fixture(params=FIXTURES)
def one(request, golden):
    found = golden[request.param]
    return found, np.array(found["logits"]), np.array(found["labels"])


def nll(scaling, logits, labels):
    return -log_softmax(scaling.scaled(logits))[np.arange(len(labels)), labels].mean()


def made(images, classes, seed, gain=2.0, lift=4.0):
    """Overconfident logits and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, images)
    logits = generator.standard_normal((images, classes)) * 2
    logits[np.arange(images), labels] += generator.normal(lift, 2, images)
    return logits * gain, labels


# Against the golden values --------------------------------------------------------------------------------------------


def test_measures_of_the_fixtures(one):
    values, logits, labels = one
    found, confidence, right = judge(uncalibrated, logits, labels)
    assert found.accuracy == pytest.approx(values["accuracy"], abs=1e-14)
    assert found.nll / found.images == pytest.approx(values["nll"], abs=1e-13)
    assert found.brier / found.images == pytest.approx(values["brier"], abs=1e-13)
    for name in ("ece15", "ece15_netcal", "ece15_uncertainty_calibration"):
        assert found.ece == pytest.approx(values[name], abs=1e-13)
    held = found.count > 0
    square = (found.count[held] * found.gaps[held] ** 2).sum() / found.images
    assert math.sqrt(square) == pytest.approx(values["ece15_l2"], abs=1e-13)
    assert found.mce == pytest.approx(values["mce15"], abs=1e-13)
    for name in ("ece15_debiased_l2", "ece15_debiased_l2_uncertainty_calibration"):
        assert found.ece_debiased == pytest.approx(values[name], abs=1e-13)
    assert found.classwise_ece == pytest.approx(values["classwise_ece15"], abs=1e-13)
    assert ece_equal_mass(confidence, right) == pytest.approx(values["ece15_equal_mass"], abs=1e-13)


def test_errors_in_any_number_of_bins_of_equal_mass_are_those_of_the_sweep(one):
    # Roelofs et al. (AISTATS 2022): as many bins of equal mass as there can be with accuracies that do not fall.
    values, logits, labels = one
    _, confidence, right = judge(uncalibrated, logits, labels)
    bins = 1
    while bins < len(labels):
        at = equal_mass(confidence, bins + 1)
        if (np.diff(np.bincount(at, right) / np.bincount(at)) < 0).any():
            break
        bins += 1
    assert ece_equal_mass(confidence, right, bins) == pytest.approx(values["ece_sweep"], abs=1e-13)


def test_one_versus_rest_maps_differ_from_the_libraries_by_as_much_as_recorded(one):
    from sklearn.isotonic import IsotonicRegression

    values, logits, labels = one
    before = softmax(logits)
    counted, regressed = np.empty_like(before), np.empty_like(before)
    for c in range(before.shape[1]):
        scores, outcomes = before[:, c], labels == c
        regressed[:, c] = IsotonicRegression(out_of_bounds="clip").fit(scores, outcomes).predict(scores)
        # As netcal bins: the shares of outcomes in 15 bins of equal width.
        for m in range(15):
            inside = (scores > m / 15) & (scores <= (m + 1) / 15)
            if inside.any():
                counted[inside, c] = outcomes[inside].mean()
    for method, expected, key in (
        ("histogram", counted, "hist_maxdiff_netcal"), ("isotonic", regressed, "iso_maxdiff_sklearn")
    ):  # fmt: skip
        expected /= expected.sum(1, keepdims=True)
        found, _ = fit(method, logits, labels)(logits)
        assert np.abs(found - expected).max() == pytest.approx(values[key], abs=1e-12)


def test_temperature_of_the_fixtures(one):
    values, logits, labels = one
    found = fit_temperature(logits, labels)
    assert found.converged
    assert 1 / found.weight == pytest.approx(values["T"], abs=1e-8)
    assert 1 / found.weight == pytest.approx(values["T_scipy"], abs=1e-6)
    assert 1 / found.weight == pytest.approx(values["T_sklearn"], abs=1e-6)
    assert nll(found, logits, labels) == pytest.approx(values["nll_T"], abs=1e-13)


def test_vector_and_matrix_of_the_fixtures(one):
    # The fixtures scale the logits as they are; centred ones are another, smaller family.
    values, logits, labels = one
    vector = fit_vector(logits, labels, centre=False)
    assert vector.converged and nll(vector, logits, labels) == pytest.approx(values["vector_nll"], abs=1e-10)
    np.testing.assert_allclose(vector.weight, values["vector_w"], atol=1e-5)
    np.testing.assert_allclose(vector.bias, values["vector_b"], atol=1e-5)
    matrix = fit_matrix(logits, labels, centre=False)
    assert matrix.converged
    for name in ("matrix_nll", "matrix_nll_sklearn"):
        assert nll(matrix, logits, labels) == pytest.approx(values[name], abs=1e-10)


@pytest.mark.parametrize(("method", "key"), [("histogram", "hist_ece15"), ("isotonic", "iso_ece15"),
                                             ("bbq", "bbq_ece15"), ("temperature", "ece15_T")])  # fmt: skip
def test_methods_of_the_fixtures(one, method, key):
    values, logits, labels = one
    fitted = fit(method, logits, labels)
    found, _, _ = judge(fitted, logits, labels)
    assert found.ece == pytest.approx(values[key], abs=1e-10)
    if method == "histogram":
        assert found.nll / found.images == pytest.approx(values["hist_nll_clipped"], abs=1e-12)
    if method == "bbq":
        np.testing.assert_allclose(fitted(logits)[0][0], values["bbq_first_row"], atol=1e-12)


def test_edges_of_bins(golden):
    for case in golden["edge_cases"]:
        probabilities, labels = np.array(case["probs"]), np.array(case["labels"])
        found = Reliability.zeros(probabilities.shape[1])
        found.update(probabilities, labels, probabilities.argmax(1))
        assert found.ece == pytest.approx(case["ece15"], abs=1e-12), case["what"]
        for other in {"left_closed", "torchmetrics_1_9_0_says"} & case.keys():  # other edges, another error
            assert abs(found.ece - case[other]) > 0.01


# Measures -------------------------------------------------------------------------------------------------------------


def test_every_confidence_is_in_the_bin_that_its_definition_names():
    for bins in (1, 7, 10, 15):
        edges = [m / bins for m in range(bins + 1)]
        values = np.array([0.0, *edges, *(np.nextafter(edge, 2) for edge in edges[:-1]), 0.05, 0.33, 1.0])
        expected = [max(0, next(m for m in range(bins) if value <= edges[m + 1])) for value in values]
        assert equal_width(values, bins).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 60), st.integers(2, 6), st.booleans())
def test_measures_are_those_of_their_definitions(seed, images, classes, tied):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(images, classes)) * 3
    logits = np.round(logits) if tied else logits
    labels = generator.integers(0, classes, images)
    found, confidence, right = judge(uncalibrated, logits, labels)
    p = [[math.exp(v - max(row)) / math.fsum(math.exp(u - max(row)) for u in row) for v in row] for row in logits]
    predicted = [row.index(max(row)) for row in p]
    bins: dict[int, list[tuple[float, bool]]] = {}
    for row, guess, label in zip(p, predicted, labels, strict=True):
        at = next(m for m in range(15) if row[guess] <= (m + 1) / 15)
        bins.setdefault(at, []).append((row[guess], guess == label))
    gaps = {at: (len(of), sum(r for _, r in of) / len(of) - sum(c for c, _ in of) / len(of)) for at, of in bins.items()}
    assert found.ece == pytest.approx(sum(n * abs(gap) for n, gap in gaps.values()) / images, abs=1e-12)
    assert found.mce == pytest.approx(max(abs(gap) for _, gap in gaps.values()), abs=1e-12)
    assert found.nll == pytest.approx(
        -math.fsum(math.log(max(row[label], FLOOR)) for row, label in zip(p, labels, strict=True)), rel=1e-12
    )
    assert found.brier == pytest.approx(
        math.fsum((v - (c == label)) ** 2 for row, label in zip(p, labels, strict=True) for c, v in enumerate(row)),
        abs=1e-12,
    )
    np.testing.assert_allclose(confidence, [max(row) for row in p], atol=1e-15)
    assert right.tolist() == [guess == label for guess, label in zip(predicted, labels, strict=True)]


def test_parts_merge_to_the_whole():
    logits, labels = made(500, 7, 0)
    whole, _, _ = judge(uncalibrated, logits, labels)
    merged = Reliability.zeros(7)
    for part in (slice(0, 1), slice(1, 200), slice(200, 500)):
        merged.merge(judge(uncalibrated, logits[part], labels[part])[0])
    assert merged.count.tolist() == whole.count.tolist() and merged.correct.tolist() == whole.correct.tolist()
    for name in ("ece", "mce", "ece_debiased", "classwise_ece", "nll", "brier", "mean_confidence"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name), rel=1e-12)


def test_float16_logits_are_promoted_before_the_softmax():
    logits = (np.random.default_rng(0).normal(size=(64, 1000)) * 4).astype(np.float16)
    rows = softmax(logits).sum(1)
    assert np.abs(rows - 1).max() < 1e-12
    half = np.exp(logits - logits.max(1, keepdims=True))
    assert np.abs((half / half.sum(1, keepdims=True)).astype(np.float64).sum(1) - 1).max() > 1e-4
    labels = logits.argmax(1)
    for name in NAMES[:-2]:
        probabilities, _ = fit(name, logits[:, :40], labels % 40)(logits[:, :40])
        assert np.abs(probabilities.sum(1) - 1).max() < 1e-12, name


def test_constant_confidence_is_one_bin():
    probabilities = np.tile([0.7, 0.2, 0.1], (40, 1))
    labels = np.repeat([0, 1, 2, 0], 10)
    logits = np.log(probabilities)
    found, confidence, right = judge(uncalibrated, logits, labels)
    assert found.ece == pytest.approx(0.2) and (found.count > 0).sum() == 1
    assert ece_equal_mass(confidence, right) == pytest.approx(0.2)
    for name in NAMES[1:]:
        after, _, _ = judge(fit(name, logits, labels), logits, labels)
        # All that can be known is the share of each class. BBQ counts one image more; one number has two others to fit.
        most = {"bbq": 0.02, "temperature": 0.1, "matrix_odir": 0.01}.get(name.removesuffix("_top"), 1e-5)
        assert after.ece < most, name


def test_equal_confidences_are_never_in_two_bins_of_equal_mass():
    values = np.repeat([0.2, 0.4, 0.9], [50, 3, 7])
    assert equal_mass(values, 10).tolist() == np.repeat([0, 1], [50, 10]).tolist()
    assert np.bincount(equal_mass(np.random.default_rng(0).random(100), 15)).tolist() == [7] * 10 + [6] * 5


# Chance ---------------------------------------------------------------------------------------------------------------


def sampled(images, seed):
    """Confidences whose errors are known, and a generator."""
    generator = np.random.default_rng(seed)
    return 1 - generator.beta(1, 6, images) * 0.9, generator


def errors(confidence, right, bins=15):
    """The three errors of confidences, by the kernels that measure images."""
    logits = np.log(np.stack([confidence, np.maximum(1 - confidence, 1e-300)], axis=1))
    found = Reliability.zeros(2, bins)
    found.update(softmax(logits), np.where(right, 0, 1), np.zeros(len(right), int))
    at = equal_mass(confidence, bins)
    return {"ece": found.ece, "ece_equal_mass": np.abs(np.bincount(at, right - confidence)).sum() / len(right),
            "ece_debiased": found.ece_debiased}  # fmt: skip


@pytest.mark.parametrize("name", ["ece", "ece_equal_mass", "ece_debiased"])
def test_null_band_is_what_calibrated_confidences_show(name):
    confidence, generator = sampled(1000, 1)
    shown = np.array([errors(confidence, generator.random(1000) < confidence)[name] for _ in range(1000)])
    found = noise(confidence, confidence > 2, draws=4000, seed=0)[name]
    assert found.null_mean == pytest.approx(shown.mean(), rel=0.12 if name == "ece_debiased" else 0.05)  # often 0
    assert (shown > found.null_high).mean() == pytest.approx(0.05, abs=0.025)


def test_the_null_band_ends_above_nineteen_calibrated_networks_in_twenty():
    confidence, generator = sampled(300, 4)
    gaps = ((generator.random((8000, 300)) < confidence) - confidence) @ np.eye(15)[equal_width(confidence)]
    found = noise(confidence, confidence > 2, draws=8000, seed=0)["ece"]
    assert found.null_high == pytest.approx(np.quantile(np.abs(gaps).sum(1) / 300, 0.95), rel=0.015)


def test_null_of_a_network_that_is_right_on_78_percent():
    # Confidences as widely spread as those of a small ViT on CIFAR-10: 0.99 % at 10,000 images, 3.1 % at 1,000, 6.9 %.
    for images, expected in ((10_000, 0.0099), (1000, 0.031), (200, 0.069)):
        confidence = (np.arange(images) + 0.5) / images
        found = noise(confidence ** (1 / 3.6), confidence > 2, draws=500, seed=0)["ece"]
        assert found.null_mean == pytest.approx(expected, rel=0.05)


def test_the_interval_is_that_of_images_drawn_with_replacement():
    confidence, generator = sampled(300, 3)
    right = generator.random(300) < confidence - 0.2
    found = noise(confidence, right, draws=2000, seed=0)
    own = errors(confidence, right)
    again = [generator.integers(0, 300, 300) for _ in range(500)]
    edges = equal_mass(confidence)
    width = np.array([errors(confidence[at], right[at])["ece"] for at in again])
    mass = np.array([np.abs(np.bincount(edges[at], (right - confidence)[at])).sum() / 300 for at in again])
    square = np.array([errors(confidence[at], right[at])["ece_debiased"] for at in again]) ** 2
    for name, drawn in (("ece", width), ("ece_equal_mass", mass)):
        expected = 2 * own[name] - np.quantile(drawn, [0.975, 0.025])
        np.testing.assert_allclose([found[name].low, found[name].high], expected, atol=0.006)
    expected = np.sqrt(own["ece_debiased"] ** 2 + square.mean() - np.quantile(square, [0.975, 0.025]))
    np.testing.assert_allclose([found["ece_debiased"].low, found["ece_debiased"].high], expected, atol=0.008)


def test_the_interval_covers_the_true_error_of_a_miscalibrated_network():
    many, generator = sampled(1_000_000, 2)
    true = np.abs(np.bincount(equal_width(many), -0.1 * np.ones(len(many)), minlength=15)).sum() / len(many)
    held = dict.fromkeys(("ece", "ece_equal_mass", "ece_debiased"), 0)
    for seed in range(100):
        confidence, _ = sampled(500, 100 + seed)
        for name, found in noise(confidence, generator.random(500) < confidence - 0.1, draws=200, seed=seed).items():
            held[name] += found.low <= true <= found.high
    # A constant shift: all three have the same true value.
    assert held["ece"] >= 85 and held["ece_equal_mass"] >= 78 and held["ece_debiased"] >= 85, held


def test_chance_in_the_classwise_error_is_that_of_drawn_labels_and_images():
    logits, labels = made(400, 5, 8)
    probabilities, draws = softmax(logits / 3), 1000
    one, parts = ClasswiseNoise.zeros(5, draws), [ClasswiseNoise.zeros(5, draws) for _ in range(2)]
    one.update(probabilities, labels, np.random.default_rng(0))
    for seed, (part, rows) in enumerate(zip(parts, (slice(0, 150), slice(150, 400)), strict=True)):
        part.update(probabilities[rows], labels[rows], np.random.default_rng(seed))
    parts[0].merge(parts[1])
    generator = np.random.default_rng(9)

    def error(p, y):
        found = Reliability.zeros(5)
        found.update(p, y, p.argmax(1))
        return found.classwise_ece

    drawn = (probabilities.cumsum(1)[None] < generator.random((300, 400, 1))).sum(2).clip(0, 4)
    null = np.array([error(probabilities, y) for y in drawn])
    again = np.array([error(probabilities[at], labels[at]) for at in generator.integers(0, 400, (300, 400))])
    low, high = 2 * error(probabilities, labels) - np.quantile(again, [0.975, 0.025])
    for found in (one.noise(5), parts[0].noise(5)):
        assert found.null_mean == pytest.approx(null.mean(), rel=0.03)
        assert found.null_high == pytest.approx(np.quantile(null, 0.95), rel=0.04)
        assert [found.low, found.high] == pytest.approx([low, high], abs=0.004)


def test_the_quantiles_of_chance_in_the_classwise_error():
    """One class and one bin, of which the draws are known: errors of 0, 0.001, ... 1 for ten images."""
    draws = np.arange(1001) / 100
    found = ClasswiseNoise(np.array([6.0]), draws[None], np.zeros(1), draws[None], np.full(1001, 10.0), 10).noise(1)
    assert (found.low, found.high) == pytest.approx((1.2 - 0.975, 1.2 - 0.025))
    assert (found.null_mean, found.null_high) == pytest.approx((0.5, 0.95))


# Methods --------------------------------------------------------------------------------------------------------------


def test_temperature_never_changes_a_prediction_and_is_always_positive():
    for seed in range(20):
        logits, labels = made(60, 5, seed, gain=10 ** (seed / 5 - 2), lift=seed / 5 - 1)
        method = fit("temperature", logits, labels)
        assert method.scaling.weight > 0
        assert (method(logits)[1] == logits.argmax(1)).all()
        if method.scaling.converged:
            for nearby in (0.999, 1.001):
                other = log_softmax(logits * method.scaling.weight * nearby)[np.arange(60), labels].mean()
                assert -other >= nll(method.scaling, logits, labels)


def test_the_temperature_that_is_told_divides_the_logits():
    logits, labels = made(300, 4, 2)  # overconfident
    method = fit("temperature", logits, labels)
    told = facts(method)["temperature"]
    assert told > 1.5
    np.testing.assert_allclose(method(logits)[0], softmax(logits / told), rtol=1e-12)


@pytest.mark.parametrize("name", ["vector", "matrix", "matrix_odir"])
def test_scaling_that_differs_between_classes_predicts_what_it_finds_likeliest(name):
    logits, labels = made(300, 4, 5, lift=1.0)
    logits[:, 0] += 2
    probabilities, predicted = fit(name, logits, labels)(logits)
    np.testing.assert_array_equal(predicted, probabilities.argmax(1))
    assert (predicted != logits.argmax(1)).any()


def test_what_a_softmax_does_not_notice_is_fixed():
    logits, labels = made(300, 4, 5)
    vector, matrix = fit_vector(logits, labels), fit_matrix(logits, labels)
    for sums in (vector.bias.sum(), matrix.bias.sum(), matrix.weight.sum(0), matrix.weight.sum(1)):
        np.testing.assert_allclose(sums, 0, atol=1e-12)


def test_temperature_of_many_images_is_that_of_all_of_them():
    # More than the sample that it begins with.
    logits, labels = made(9000, 4, 3)
    found = fit_temperature(logits.astype(np.float32), labels)
    assert found.converged
    slopes = [
        (log_softmax(logits * w)[np.arange(9000), labels]).mean()
        for w in (found.weight * 0.9999, found.weight * 1.0001)
    ]
    assert slopes[0] == pytest.approx(slopes[1], abs=1e-9)
    assert -nll(found, logits, labels) >= max(slopes)


@pytest.mark.parametrize("wrong", ["always right", "always wrong"])
def test_a_temperature_without_a_minimum_is_a_limit_and_said_to_be(wrong):
    logits = np.eye(3)[np.arange(30) % 3] * 4
    labels = (np.arange(30) + (wrong == "always wrong")) % 3
    found = fit_temperature(logits, labels)
    assert not found.converged and found.weight > 0
    assert found.weight < 0.01 if wrong == "always wrong" else found.weight > 100


def test_vector_and_matrix_do_not_depend_on_what_is_added_to_a_row():
    logits, labels = made(300, 4, 5)
    shifted = logits + np.random.default_rng(0).normal(size=(300, 1)) * 20
    for name in ("vector", "matrix", "matrix_odir"):
        one, other = fit(name, logits, labels), fit(name, shifted, labels)
        np.testing.assert_allclose(one(logits)[0], other(shifted)[0], atol=1e-4)
    plain = fit_vector(shifted, labels, centre=False)
    assert np.abs(plain(shifted) - fit_vector(logits, labels, centre=False)(logits)).max() > 0.01


def test_each_scaling_contains_the_smaller_one():
    logits, labels = made(400, 5, 6)
    temperature, vector = fit_temperature(logits, labels), fit_vector(logits, labels)
    matrix, odir = fit_matrix(logits, labels), fit_matrix(logits, labels, penalty=0.1)
    losses = [nll(each, logits, labels) for each in (temperature, vector, matrix)]
    assert losses[0] >= losses[1] >= losses[2] and matrix.converged
    off = ~np.eye(5, dtype=bool)
    assert np.abs(odir.weight[off]).sum() < np.abs(matrix.weight[off]).sum()
    # As scikit-learn's multinomial regression without a penalty.
    from sklearn.linear_model import LogisticRegression

    z = logits - logits.mean(1, keepdims=True)
    oracle = LogisticRegression(C=np.inf, tol=1e-9, max_iter=2000).fit(z, labels)
    np.testing.assert_allclose(matrix(logits), oracle.predict_proba(z), atol=1e-4)


def test_the_penalty_is_chosen_on_images_that_are_fitted_on():
    logits, labels = made(200, 4, 11)
    found = fit("matrix_odir", logits, labels).scaling
    held, others = np.split(np.random.default_rng(0).permutation(200), [40])
    losses = [nll(fit_matrix(logits[others], labels[others], p), logits[held], labels[held]) for p in PENALTIES]
    best = int(np.argmin(losses))
    assert found.penalty == PENALTIES[best] and losses[best] < losses[-1] - 0.01
    np.testing.assert_array_equal(found.weight, fit_matrix(logits, labels, PENALTIES[best]).weight)
    assert facts(fit("matrix_odir", logits, labels))["penalty"] == PENALTIES[best]
    assert fit_regularised_matrix(logits, labels, 3.0).penalty == 3 and "penalty" not in facts(
        fit("matrix", logits, labels)
    )
    assert fit_regularised_matrix(logits[:4], np.arange(4)).penalty in PENALTIES  # one image judges


@pytest.mark.parametrize(("images", "classes", "seed", "at"), [(120, 5, 2, 0), (60, 4, 5, 2)])
def test_images_that_judge_a_penalty_are_not_fitted(images, classes, seed, at):
    """Judged by images that are fitted, too, the weakest penalty would win."""
    logits, labels = made(images, classes, seed)
    held, others = np.split(np.random.default_rng(0).permutation(images), [images // 5])
    losses = [nll(fit_matrix(logits[others], labels[others], p), logits[held], labels[held]) for p in PENALTIES]
    assert int(np.argmin(losses)) == at
    assert fit_regularised_matrix(logits, labels).penalty == PENALTIES[at]


def test_isotonic_is_scikit_learns():
    from sklearn.isotonic import IsotonicRegression

    generator = np.random.default_rng(0)
    ties = np.round(generator.random(200), 1)
    nearly = np.repeat(generator.random(40), 5) * (1 + np.tile(np.arange(5), 40) * 2.0**-52)
    for scores in (generator.random(200), ties, np.full(20, 0.3), np.repeat([0.0, 1.0], 30), nearly, ties**40):
        outcomes = generator.random(len(scores)) < scores
        new = np.linspace(-0.1, 1.1, 77)
        oracle = IsotonicRegression(out_of_bounds="clip").fit(scores, outcomes)
        np.testing.assert_allclose(maps.isotonic(scores, outcomes)(new), oracle.predict(new), atol=1e-12)


def binning_by_the_rule(ordered, outcomes, bins):
    """The authors' rule in a loop: [first, last] of each bin."""
    n = len(ordered)
    size = n // bins
    found, i = [], 1
    while i <= bins:
        first = (i - 1) * size
        last = n - 1 if i == bins else i * size - 1
        j = i + 1
        while j <= bins and ordered[n - 1 if j == bins else j * size - 1] == ordered[first]:
            last = n - 1 if j == bins else j * size - 1
            j += 1
        found.append((first, last))
        i = j
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.integers(5, 80), st.sampled_from([None, 1, 2]))
def test_bbq_is_the_mean_of_binnings_by_the_rule(seed, images, digits):
    generator = np.random.default_rng(seed)
    scores = generator.random(images)
    scores = np.sort(scores if digits is None else np.round(scores, digits))
    outcomes = generator.random(images) < scores
    root = images ** (1 / 3)
    counts = range(max(1, math.floor(root / 10)), min(math.ceil(images / 5), math.ceil(10 * root)) + 1)
    rows, values = [], []
    for bins in counts:
        parts = binning_by_the_rule(scores, outcomes, bins)
        cuts = [(scores[last] + scores[last + 1]) / 2 for _, last in parts[:-1]]
        score, value = 0.0, []
        for (first, last), low, high in zip(parts, [0.0, *cuts], [*cuts, 1.0], strict=True):
            true = scores[first : last + 1][outcomes[first : last + 1]]
            n, m, middle = last - first + 1, len(true), (low + high) / 2
            value.append((m + (true.sum() + middle) / (m + 1)) / (n + 1))
            a = 2 * min(max(middle, 5e-3), 1 - 5e-3)
            score += math.lgamma(m + a) + math.lgamma(n - m + 2 - a) - math.lgamma(n + 2)
            score -= math.lgamma(a) + math.lgamma(2 - a)
        rows.append((score, cuts, value))
    likelihood = np.array([math.exp(score - max(row[0] for row in rows)) for score, _, _ in rows])
    kept = maps.elbow(likelihood)
    new = generator.random(20)
    for x in new:
        values.append(
            sum(likelihood[at] * rows[at][2][sum(x >= cut for cut in rows[at][1])] for at in kept)
            / likelihood[kept].sum()
        )
    np.testing.assert_allclose(maps.bbq(scores, outcomes)(new), values, atol=1e-9)


def test_the_elbow_keeps_what_the_rule_says():
    assert maps.elbow(np.array([1.0])).tolist() == [0]
    assert maps.elbow(np.array([0.5, 1.0, 0.5])).tolist() == [1]
    assert maps.elbow(np.array([0.1, 1.0, 0.6, 0.1 - 1e-9])).tolist() == [1, 2]
    assert maps.elbow(np.array([1.0, 1.0, 1.0])).tolist() == [0, 1]
    # A drop of 0.0005 is 0.5 % of the variance, one of 0.00005 no more than 0.05 %.
    assert maps.elbow(np.array([1.0, 0.5, 0.4995, 0.1])).tolist() == [0, 1, 2]
    assert maps.elbow(np.array([1.0, 0.5, 0.49995, 0.1])).tolist() == [0]


def test_an_empty_bin_gives_its_middle():
    found = maps.histogram_equal_width(np.array([0.05, 0.95]), np.array([False, True]), 10)
    assert found(np.array([0.05, 0.45, 1.0])).tolist() == [0.0, 0.45, 1.0]


def test_a_row_of_which_every_class_has_no_chance_stays_as_it_was():
    logits = np.log([[0.6, 0.4], [0.6, 0.4], [0.1, 0.9], [0.1, 0.9]])
    fitted = fit("histogram", logits, np.array([1, 1, 0, 0]))
    probabilities, _ = fitted(logits)
    np.testing.assert_allclose(probabilities, np.array([[0, 1], [0, 1], [1, 0], [1, 0]]))
    impossible = fit("histogram", np.log([[0.52, 0.48]] * 3), np.array([1, 1, 1]))
    row = np.log([[0.52, 0.48], [0.52, 0.48]])
    assert impossible(row)[0][0].tolist() == [0.0, 1.0]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("_top")])
def test_top_label_methods_keep_every_prediction(name):
    logits, labels = made(200, 6, 7)
    logits[0] = [800, 0, 0, 0, 0, 0]  # nothing is left for the others
    probabilities, predicted = fit(name, logits, labels)(logits)
    assert (predicted == logits.argmax(1)).all()
    np.testing.assert_allclose(probabilities.sum(1), 1, atol=1e-12)
    assert (probabilities >= 0).all()


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused_with_its_row():
    logits = np.zeros((5, 3))
    logits[3, 1] = np.nan
    with pytest.raises(ValueError, match="row 3: a logit is not finite"):
        check_logits(logits)
    for wrong in (np.zeros((5, 3), int), np.zeros(5), np.zeros((5, 3), np.longdouble)):
        with pytest.raises(ValueError, match=r"\(image, class\) in float16, float32 or float64"):
            check_logits(wrong)
    for beyond in (-np.inf, 1e39):
        with pytest.raises(ValueError, match="row 2: a logit is not finite"):
            check_logits(np.array([[0.0, 1], [1, 0], [beyond, 0]]))
    for wrong in (["0", "1", "2"], [0j, 1, 2], np.array([0, 1, 2], "M8[D]")):
        with pytest.raises(ValueError, match="class numbers, 0 to 2"):
            check_labels(np.array(wrong), 3, 3)
    with pytest.raises(ValueError, match="rows 0 to 4 all have the label 2"):
        check_labels(np.full(5, 2), 3, 5)
    for wrong in (np.full((2, 2), "0.5"), np.full((2, 2), 0.5 + 0j), np.full(2, 0.5)):
        with pytest.raises(ValueError, match=r"numbers \(image, class\)"):
            logits_of(wrong)
    for labels, row in (([0, 1, 3], 2), ([0, -1, 0], 1), ([0, 0.5, 1], 1), ([0, 1, np.nan], 2), ([-1, 0, 1], 0)):
        with pytest.raises(ValueError, match=f"row {row}: label"):
            check_labels(np.array(labels), 3, 3)
    with pytest.raises(ValueError, match="at least two"):
        check_labels(np.zeros(3, int), 1, 3)
    with pytest.raises(ValueError, match="one label per row"):
        check_labels(np.zeros(3, int), 4, 5)
    with pytest.raises(ValueError, match="no images"):
        check_labels(np.zeros(0, int), 4, 0)
    with pytest.raises(ValueError, match=r"row 1: the probabilities sum to 0\.9"):
        logits_of(np.array([[0.5, 0.5], [0.5, 0.4]]))
    for bad in (np.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match="row 0: a probability"):
            logits_of(np.array([[bad, 0.5], [0.5, 0.5]]))
    with pytest.raises(ValueError, match="2 images to calibrate on, and 3 classes"):
        fit("temperature", np.zeros((2, 3)), np.array([0, 1]))


def test_a_network_that_is_certain_and_right_is_fitted_too():
    labels = np.arange(60) % 3
    logits = logits_of(np.eye(3, dtype=int)[labels])
    for name in NAMES:
        after, _, _ = judge(fit(name, logits, labels), logits, labels)
        assert after.accuracy == 1 and after.ece < 0.1, name


def test_probabilities_and_their_logits_are_the_same():
    given = softmax(np.random.default_rng(0).normal(size=(20, 5)))
    np.testing.assert_allclose(softmax(logits_of(given)), given, atol=1e-12)
    assert np.isfinite(logits_of(np.array([[1.0, 0.0]]))).all()
    logits_of(given.astype(np.float16))
