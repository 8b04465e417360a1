"""CKA against exact fractions, golden values, and plain loops in float64; on what breaks it, too."""

import json
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.similarity import cka as kernel
from kernels.similarity.alignment import mutual_neighbours, procrustes, procrustes_shuffled
from kernels.similarity.cka import Cka, centred, cka, hsic, images_of, pack, unpack
from kernels.similarity.gram import gram

SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))
GOLDEN = SHARED / "golden" / "cka.json"
X = [[1, 0, 2], [0, 3, -1], [2, 2, 0], [-1, 1, 4], [3, -2, 1], [0, 0, 5], [2, -1, -3]]
Y = [[2, 1], [-1, 0], [4, 1], [0, 3], [1, -2], [5, 5], [-2, 2]]


def packed(*features):
    """Gram matrices of features (image, ...), one a layer, as a stage makes them."""
    return np.stack([pack(gram(torch.as_tensor(np.asarray(x), dtype=torch.float32)).numpy()) for x in features])


def exact_hsic1(x, y):
    """HSIC1 in rational arithmetic, entry by entry."""
    n = len(x)

    def centre(rows):
        k = [[Fraction(sum(p * q for p, q in zip(a, b, strict=True))) if i != j else Fraction(0)
              for j, b in enumerate(rows)] for i, a in enumerate(rows)]  # fmt: skip
        r = [sum(row) for row in k]
        s = sum(r)
        return [
            [k[i][j] - (r[i] + r[j]) / (n - 2) + s / ((n - 1) * (n - 2)) if i != j else Fraction(0) for j in range(n)]
            for i in range(n)
        ]

    a, b = centre(x), centre(y)
    return sum(a[i][j] * b[i][j] for i in range(n) for j in range(n)) / (n * (n - 3))


def plain_hsic(x, y, estimator):
    """Either estimator in float64, from uncentred features, with matrices as they are defined."""
    n = len(x)
    k, m = (np.asarray(z, np.float64).reshape(n, -1) for z in (x, y))
    k, m = k - k.mean(0), m - m.mean(0)
    k, m = k @ k.T, m @ m.T
    if estimator == "biased":
        h = np.eye(n) - np.ones((n, n)) / n
        return float((h @ k @ h).ravel() @ (h @ m @ h).ravel()) / (n - 1) ** 2
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)  # Song et al., "Feature selection via dependence maximization" (JMLR 2012), equation 5
    return float(
        np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 * (one @ k @ m @ one) / (n - 2)
    ) / (n * (n - 3))


def single(grams, estimator="unbiased"):
    """CKA of layers over one minibatch."""
    return cka(hsic(grams, estimator)[None], np.ones(1)).cka


def test_exact_fractions():
    assert exact_hsic1(X, X) == Fraction(6707, 105)
    assert exact_hsic1(X, Y) == Fraction(767, 210)
    assert exact_hsic1(Y, Y) == Fraction(1018, 21)
    found = hsic(packed(X, Y), "unbiased")
    np.testing.assert_allclose(found, [[6707 / 105, 767 / 210], [767 / 210, 1018 / 21]], rtol=1e-6)
    assert single(packed(X, Y))[0, 1] == pytest.approx(0.06563603288721426, abs=1e-7)
    assert single(packed(X, Y), "biased")[0, 1] == pytest.approx(0.42765690979258575, abs=1e-7)


@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden values are not on this machine")
class TestGolden:
    def test_exact(self):
        golden = json.loads(GOLDEN.read_text())
        found = {"hsic1_float": hsic(packed(X, Y), "unbiased"), "hsic0_float": hsic(packed(X, Y), "biased")}
        for name, values in found.items():
            for pair, (i, j) in {"xx": (0, 0), "xy": (0, 1), "yy": (1, 1)}.items():
                assert values[i, j] == pytest.approx(golden["exact"][pair][name], rel=1e-6)

    @pytest.mark.parametrize(("pair", "at"), [("xy", (0, 1)), ("xw", (0, 2)), ("yw", (1, 2))])
    def test_minibatches(self, pair, at):
        batch = json.loads(GOLDEN.read_text())["minibatch"]
        # Grams in float64 of the float64 features: the values are known to the last digit.
        layers = [np.array(batch["features"][name]) for name in "xyw"]
        sizes = batch["sizes"]
        parts = [slice(start, start + size) for start, size in zip(np.cumsum([0, *sizes[:-1]]), sizes, strict=True)]

        def grams(part):
            return np.stack([pack((x[part] - x[part].mean(0)) @ (x[part] - x[part].mean(0)).T) for x in layers])

        per_batch = np.stack([hsic(grams(part), "unbiased") for part in parts])
        for name, (i, j) in {"xx": (0, 0), "yy": (1, 1), "ww": (2, 2), pair: at}.items():
            np.testing.assert_allclose(per_batch[:, i, j], batch["hsic"][name]["hsic1_per_batch"], rtol=1e-9)
        wanted = batch["cka"][pair]
        weights = np.array([n * (n - 3) for n in sizes])
        found = {
            "equal_weights": cka(per_batch, np.ones(3)),
            "weights_n_n_minus_3": cka(per_batch, weights),
            "first_two_batches": cka(per_batch[:2], np.ones(2)),
            "full_unbiased": cka(hsic(grams(slice(None)), "unbiased")[None], np.ones(1)),
            "full_biased": cka(hsic(grams(slice(None)), "biased")[None], np.ones(1)),
        }
        for name, one in found.items():
            assert one.cka[at] == pytest.approx(wanted[name], rel=1e-9), name
            assert abs(one.cka[at] - wanted["WRONG_mean_of_ckas"]) > 1e-3
        if pair != "xy":
            assert found["equal_weights"].cka[at] < 0, "independent: negative, and not clamped"
        # As the stage makes them, from float32.
        stored = np.stack([hsic(packed(*(x[part] for x in layers)), "unbiased") for part in parts])
        assert cka(stored, weights).cka[at] == pytest.approx(wanted["weights_n_n_minus_3"], abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 9), st.integers(1, 5), st.sampled_from(["unbiased", "biased"]), st.integers(0, 2**32 - 1))
def test_estimators_are_those_of_the_definition(n, width, estimator, seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, width)).astype(np.float32), rng.normal(size=(n, width + 1)).astype(np.float32)
    found = hsic(packed(x, y), estimator)
    scale = math.sqrt(plain_hsic(x, x, "biased") * plain_hsic(y, y, "biased"))
    assert found[0, 1] == pytest.approx(plain_hsic(x, y, estimator), abs=2e-6 * scale)
    assert found[0, 0] == pytest.approx(plain_hsic(x, x, estimator), abs=2e-6 * plain_hsic(x, x, "biased"))
    # The upper triangle is kept: a product of float32 need not be symmetric to the last bit.
    kept = unpack(packed(x, y))[0]
    np.testing.assert_array_equal(np.triu(kept), np.triu(gram(torch.from_numpy(x)).numpy()))
    np.testing.assert_array_equal(kept, kept.T)


@pytest.mark.parametrize("estimator", ["unbiased", "biased"])
@pytest.mark.parametrize("ratio", [0, 1, 1000])
@pytest.mark.parametrize("shape", [(64, 40), (64, 64, 8, 8), (48, 65, 192)])
def test_accuracy_from_float32(estimator, ratio, shape):
    """1e-6 of CKA in float64, also where means are a thousand times the spread."""
    rng = np.random.default_rng(1)
    x = (rng.normal(size=shape) * rng.lognormal(size=shape[1:]) + ratio * rng.lognormal(size=shape[1:])).astype("f4")
    y = (np.tanh(x.reshape(len(x), -1)[:, :30] - ratio) + rng.normal(size=(len(x), 30)) + ratio).astype(np.float32)
    found = single(packed(x, y), estimator)[0, 1]
    xx, xy, yy = (plain_hsic(a, b, estimator) for a, b in ((x, x), (x, y), (y, y)))
    assert found == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-6)


@pytest.mark.parametrize("far", [[0], [0, 1, 2, 3], [9], [0, 40]])
@pytest.mark.parametrize("move", [lambda x: x * 100, lambda x: x + 1e4])
def test_accuracy_with_outliers(far, move):
    """As far from the others as a hundred times their spread, and among them the image from which all are counted."""
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(2, 64, 20000)).astype(np.float32)
    y[:, :500] += x[:, :500]
    x[far] = move(x[far])
    found = single(packed(x, y))[0, 1]
    xx, xy, yy = (plain_hsic(a, b, "unbiased") for a, b in ((x, x), (x, y), (y, y)))
    assert found == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-6)


def test_a_shift_of_all_images_changes_nothing():
    rng = np.random.default_rng(2)
    x, y = rng.integers(-8, 9, (20, 30)), rng.integers(-8, 9, (20, 7))
    np.testing.assert_allclose(single(packed(x + 4096, y - 512)), single(packed(x, y)), atol=2e-7)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e25])
def test_tiny_and_huge_activations(factor):
    """Their squares leave float32, and the result does not depend on the factor."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(16, 50)), rng.normal(size=(16, 50))
    grams = packed(x * factor, y)
    assert np.isfinite(grams).all() and grams[0].any()
    assert single(grams)[0, 1] == pytest.approx(single(packed(x, y))[0, 1], abs=1e-6)


def test_memory_formats_give_the_same():
    x = torch.randn(8, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    plain = gram(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3), x.double()):
        np.testing.assert_allclose(gram(other).numpy(), plain.numpy(), rtol=1e-5, atol=1e-4)
    before = x.clone()
    gram(x.relu_())
    assert torch.equal(x, before.relu())


@pytest.mark.parametrize("value", [0.0, 0.1, 7.3e8])
@pytest.mark.parametrize("images", [5, 7, 64])
def test_a_constant_layer_is_undefined(value, images):
    rng = np.random.default_rng(4)
    grams = packed(rng.normal(size=(images, 9)), np.full((images, 5000), value), rng.normal(size=(images, 3)))
    assert not grams[1].any()
    for estimator in ("unbiased", "biased"):
        batches = np.stack([hsic(grams, estimator)] * 2)
        found = cka(batches, np.ones(2))
        assert found.constant.tolist() == [False, True, False]
        assert np.isnan(found.cka[1]).all() and np.isnan(found.cka[:, 1]).all()
        assert np.isfinite(found.cka[np.ix_([0, 2], [0, 2])]).all()
        assert (found.most_influential[1] == -1).all()
    assert np.isnan(mutual_neighbours(grams, 2)[1]).all() and np.isnan(procrustes(grams)[1]).all()


def test_infinite_for_all_images_is_not_constant():
    assert not gram(torch.full((8, 3000), math.inf)).isfinite().any()


def test_one_constant_feature_is_none():
    x = np.random.default_rng(5).normal(size=(10, 4))
    with_constant = np.concatenate([np.full((10, 3000), 0.1), x], axis=1)
    np.testing.assert_allclose(single(packed(with_constant, x))[0, 1], 1, atol=1e-6)


@pytest.mark.parametrize(("images", "estimator"), [(3, "unbiased"), (1, "unbiased"), (1, "biased")])
def test_too_few_images(images, estimator):
    with pytest.raises(ValueError, match=f"{images} images: the {estimator} estimator needs at least"):
        centred(packed(np.ones((images, 2))), estimator)


def test_not_a_triangle():
    with pytest.raises(ValueError, match="7 is not"):
        images_of(7)


def test_jackknife_and_influence_are_those_of_leaving_out():
    rng = np.random.default_rng(6)
    batches, weights = [], []
    for n in (12, 12, 12, 8):
        x = rng.normal(size=(n, 5))
        batches.append(hsic(packed(x, x @ rng.normal(size=(5, 4)), rng.normal(size=(n, 6))), "unbiased"))
        weights.append(n * (n - 3))
    h, w = np.stack(batches), np.array(weights)
    found = cka(h, w)

    def ratio(rows):
        s = [sum(w[i] * h[i, a, b] for i in rows) for a, b in ((0, 2), (0, 0), (2, 2))]
        return s[0] / math.sqrt(s[1] * s[2])

    left = [ratio([i for i in range(4) if i != out]) for out in range(4)]
    assert found.cka[0, 2] == pytest.approx(ratio(range(4)), rel=1e-12)
    error = math.sqrt(3 / 4 * sum((each - np.mean(left)) ** 2 for each in left))
    assert found.standard_error[0, 2] == pytest.approx(error, rel=1e-12)
    change = [abs(each - ratio(range(4))) for each in left]
    assert found.influence[0, 2] == pytest.approx(max(change), rel=1e-12)
    assert found.most_influential[0, 2] == int(np.argmax(change))
    np.testing.assert_array_equal(np.diagonal(found.cka), 1)


def test_another_epoch_of_the_same_makes_no_error_smaller():
    rng = np.random.default_rng(7)
    h = np.stack([hsic(packed(x, np.tanh(x)), "unbiased") for x in rng.normal(size=(6, 12, 4))])
    once = cka(h, np.ones(6))
    twice = cka(np.concatenate([h, h]), np.ones(12), np.repeat([0, 1], 6))
    np.testing.assert_allclose(twice.standard_error, once.standard_error, rtol=1e-12)
    np.testing.assert_allclose(twice.cka, once.cka, rtol=1e-12)
    assert (once.standard_error[0, 1] > 0).all()


def test_a_single_minibatch_has_no_error():
    found: Cka = cka(hsic(packed(X, Y), "unbiased")[None], np.ones(1))
    assert np.isnan(found.standard_error).all() and np.isnan(found.influence).all()
    assert (found.most_influential == -1).all()


def test_standard_errors_cover_the_truth():
    """CKA of a linear pair with known covariance: the error bars of independent samples hold it 90 % of the time."""
    rng = np.random.default_rng(8)
    mix = np.array([[1.0, 0.2], [0.0, 0.6], [0.5, -0.4]])
    # Features x and x @ mix of standard normal x: HSIC tends to squared norms of cross-covariances.
    truth = (mix**2).sum() / math.sqrt(3 * ((mix.T @ mix) ** 2).sum())
    held = []
    for _ in range(120):
        x = rng.normal(size=(20, 16, 3))
        h = np.stack([hsic(np.stack([pack(b @ b.T), pack(b @ mix @ mix.T @ b.T)]), "unbiased") for b in x])
        found = cka(h, np.ones(len(h)))
        held.append(abs(found.cka[0, 1] - truth) < 2 * found.standard_error[0, 1])
    assert 0.88 <= np.mean(held) <= 0.99


def test_outliers_that_coincide_show_in_influence_and_not_in_neighbours():
    rng = np.random.default_rng(9)
    x, y = rng.normal(size=(4, 64, 20)), rng.normal(size=(4, 64, 20))
    x[2, :2] += 60
    y[2, :2] += 60
    grams = [packed(a, b) for a, b in zip(x, y, strict=True)]
    found = cka(np.stack([hsic(each, "unbiased") for each in grams]), np.ones(4))
    assert found.cka[0, 1] > 0.8, "independent but for two images of 256"
    assert found.most_influential[0, 1] == 2 and found.influence[0, 1] > 0.7
    # 10 of 63 by chance: the outliers are near each other, and nothing else is.
    assert np.mean([mutual_neighbours(each, 10)[0, 1] for each in grams]) < 10 / 63 + 0.03


def test_neighbours_are_those_of_a_loop():
    rng = np.random.default_rng(10)
    x, y = rng.normal(size=(15, 4)), rng.normal(size=(15, 3))
    y[3] = y[8] = y[5]

    def nearest(features, i, k):
        d = ((features - features[i]) ** 2).sum(1)
        return set(sorted((j for j in range(15) if j != i), key=lambda j: (d[j], j))[:k])

    for k in (1, 4, 14):
        wanted = np.mean([len(nearest(x, i, k) & nearest(y, i, k)) / k for i in range(15)])
        found = mutual_neighbours(np.stack([pack(x @ x.T), pack(y @ y.T)]), k)
        assert found[0, 1] == pytest.approx(wanted, abs=1e-9)
        assert found[0, 0] == found[1, 1] == 1
    with pytest.raises(ValueError, match="15 neighbours among the 14 other images"):
        mutual_neighbours(packed(x), 15)


def test_procrustes_is_that_of_the_features():
    rng = np.random.default_rng(11)
    x, y = rng.normal(size=(12, 5)), rng.normal(size=(12, 7))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    grams = np.stack([pack(z @ z.T) for z in (x, y, x @ rotation + 3)])

    def unit(z):
        z = z - z.mean(0)
        return z / np.linalg.norm(z)

    wanted = np.linalg.norm(unit(x).T @ unit(y), "nuc")
    found = procrustes(grams)
    assert found[0, 1] == found[1, 0] == pytest.approx(wanted, abs=1e-6)
    assert found[0, 2] == pytest.approx(1, abs=1e-6)
    assert found[1, 1] == pytest.approx(1, abs=1e-6)
    shuffled = procrustes_shuffled(grams)
    assert shuffled[0, 1] == pytest.approx(np.linalg.norm(unit(x).T @ unit(np.roll(y, 1, 0)), "nuc"), abs=1e-6)
    wide = [rng.normal(size=(12, 400)) for _ in range(2)]
    by_chance = procrustes_shuffled(packed(*wide))[0, 1]
    assert by_chance > 0.9, "with more features than images anything can be turned into anything"
    assert set(kernel.FEWEST) == {"unbiased", "biased"}
