"""Black boxes on networks: against brute force over the network's own copies, and the laws that they promise."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pipeline import attribute
from pipeline.errors import MicrotomeError
from pipeline.stages.attribute.options import OPTIONS, link_of

METHODS = ("lime", "kernel_shap", "rise")
GRID = {"kind": "grid", "cells": [2, 3]}
FINE = {"kind": "grid", "cells": [4, 4]}


def convolutional(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8 * 36, 5)).double().eval()


def images(count=3, seed=0):
    return torch.randn((count, 3, 16, 16), generator=torch.Generator().manual_seed(seed)).double()


def shown(x, x0, segments, mask):
    """An image with the segments of a mask, the others as the baseline has them."""
    return torch.where(torch.as_tensor(mask)[torch.as_tensor(segments)], x, x0)


def cells(rows, columns, size=16):
    return np.add.outer(np.arange(size) * rows // size * columns, np.arange(size) * columns // size)


def game_of(net, x, x0, segments, cls, players):
    masks = list(itertools.product([False, True], repeat=players))
    with torch.no_grad():
        scores = net(torch.stack([shown(x, x0, segments, np.array(mask)) for mask in masks]))[:, cls]
    return dict(zip(masks, scores.tolist(), strict=True))


def test_kernel_shap_of_few_segments_is_the_mean_over_all_orders():
    net, x = convolutional(), images(2)
    found = attribute.kernel_shap(net, x, 3, segments=GRID, samples=64, baseline=0.25)
    parts = cells(2, 3)
    for image in range(2):
        game = game_of(net, x[image], torch.full_like(x[image], 0.25), parts, 3, 6)
        wanted = np.zeros(6)
        for order in itertools.permutations(range(6)):
            mask = [False] * 6
            for player in order:
                before = game[tuple(mask)]
                mask[player] = True
                wanted[player] += (game[tuple(mask)] - before) / 720
        np.testing.assert_allclose(found.facts["value"][image], wanted, atol=1e-12)
        np.testing.assert_allclose(found.map[image], wanted[parts], atol=1e-12)
        assert found.facts["score"][image] == pytest.approx(game[(True,) * 6], abs=1e-14)
        assert found.facts["baseline_score"][image] == pytest.approx(game[(False,) * 6], abs=1e-14)
    assert found.residual.max() < 1e-14 and not found.facts["standard_error"].any()
    assert found.facts["samples"].tolist() == [64, 64] and found.facts["players"].tolist() == [6, 6]


@pytest.mark.parametrize("estimator", ["regression", "permutation"])
def test_sampled_values_are_near_the_exact_ones_and_add_up(estimator):
    net, x = convolutional(), images(2)
    halves = {"kind": "grid", "cells": [3, 4]}
    exact = attribute.kernel_shap(net, x, 1, segments=halves, samples="exact", batch=256)
    assert exact.facts["samples"].tolist() == [4096, 4096]
    found = attribute.kernel_shap(net, x, 1, segments=halves, samples=600, estimator=estimator, batch=256)
    assert found.residual.max() < 1e-14 and exact.residual.max() < 1e-13
    apart = (found.facts["value"] - exact.facts["value"]).abs()
    assert (apart <= 4 * found.facts["standard_error"]).all()
    assert (apart**2).mean().sqrt() < 2 * found.facts["standard_error"].mean()


def test_sampling_goes_on_until_the_mean_error_is_within_the_tolerance():
    net, x = convolutional(), images(3)
    how = {"segments": FINE, "samples": 128, "seeds": [5, 6, 7], "batch": 256}
    first = attribute.kernel_shap(net, x, 1, **how)
    found = attribute.kernel_shap(net, x, 1, tolerance=0.03, **how)
    share = found.facts["standard_error"].mean(1) / found.facts["value"].abs().amax(1)
    assert (share <= 0.03).all() and (found.facts["samples"] > first.facts["samples"]).any()
    assert found.residual.max() < 1e-13
    bounded = attribute.kernel_shap(net, x, 1, tolerance=1e-6, max_samples=400, **how)
    assert (bounded.facts["samples"] <= 400).all() and (bounded.facts["samples"] > 260).all()
    alone = attribute.kernel_shap(net, x[1:2], 1, tolerance=0.03, segments=FINE, samples=128, seeds=[6], batch=256)
    torch.testing.assert_close(alone.facts["value"][0], found.facts["value"][1], atol=1e-13, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [64, 200])
def test_a_segment_that_is_like_the_baseline_has_exactly_nothing(method, samples):
    net, x, parts = convolutional(), images(2), cells(4, 4)
    x[0, :, parts == 5] = 0.5
    found = attribute.explain(method, net, x, 2, segments=FINE, samples=samples, baseline=0.5)
    assert found.facts["players"].tolist() == [15, 16]
    assert found.facts["value"][0, 5] == 0 and (found.map[0][torch.as_tensor(parts == 5)] == 0).all()
    assert (found.facts["value"][1] != 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_an_image_that_is_the_baseline_has_nothing_anywhere(method):
    net, x = convolutional(), torch.cat([torch.full((1, 3, 16, 16), 0.5).double(), images(1)])
    found = attribute.explain(method, net, x, 2, segments=FINE, samples=100, baseline=0.5)
    assert (found.map[0] == 0).all() and found.facts["players"].tolist() == [0, 16]
    assert found.facts["score"][0] == found.facts["baseline_score"][0]
    assert (found.map[1] != 0).any()


@pytest.mark.parametrize("method", METHODS)
def test_one_segment_has_the_whole_score(method):
    net, x = convolutional(), images(2)
    found = attribute.explain(method, net, x, 2, segments=torch.zeros(16, 16, dtype=torch.int64), samples=100)
    assert found.facts["value"].shape == (2, 1) and found.facts["players"].tolist() == [1, 1]
    if method == "kernel_shap":
        wanted = (net(x) - net(0 * x))[:, 2].detach()
        torch.testing.assert_close(found.facts["value"][:, 0], wanted, atol=1e-14, rtol=0)


def test_a_linear_network_has_its_weights():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768, 4)).double().eval()
    x, x0 = images(2), images(2, seed=3)
    parts = cells(4, 4)
    change = (net[1].weight[3] * (x - x0).flatten(1)).reshape(2, 3, 16, 16).sum(1).detach()
    wanted = torch.stack([change[:, torch.as_tensor(parts == j)].sum(1) for j in range(16)], 1)
    shap = attribute.kernel_shap(net, x, 3, segments=FINE, samples=120, baseline=x0)
    torch.testing.assert_close(shap.facts["value"], wanted, atol=1e-12, rtol=0)
    lime = attribute.lime(net, x, 3, segments=FINE, samples=120, baseline=x0, softmax=False, ridge=0)
    torch.testing.assert_close(lime.facts["value"], wanted, atol=1e-9, rtol=0)
    torch.testing.assert_close(lime.facts["r2"], torch.ones(2).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(lime.facts["intercept"], net(x0)[:, 3].detach(), atol=1e-8, rtol=0)
    assert (lime.facts["stability"] > 0.99).all()


def test_lime_and_rise_explain_the_probability_and_kernel_shap_the_logit():
    net, x = convolutional(), images(2)
    both = net(x).detach(), net(x).softmax(1).detach()
    for method, softmax, wanted in (
        ("lime", {}, both[1]),
        ("rise", {}, both[1]),
        ("lime", {"softmax": False}, both[0]),
        ("kernel_shap", {}, both[0]),
    ):
        found = attribute.explain(method, net, x, 2, segments=GRID, samples=100, **softmax)
        torch.testing.assert_close(found.facts["score"], wanted[:, 2], atol=1e-14, rtol=0)
    target = attribute.Logit(torch.tensor([0, 1]), link="log_probability")
    found = attribute.lime(net, x, target, segments=GRID, samples=100)
    torch.testing.assert_close(found.facts["score"], both[1].log().gather(1, target.classes[:, None])[:, 0])
    assert link_of(OPTIONS["lime"](), "logit") == "probability" == link_of(OPTIONS["rise"](), "logit")
    assert link_of(OPTIONS["lime"](), "log_probability") == "log_probability"
    assert link_of(OPTIONS["kernel_shap"](), "logit") == "logit" == link_of(OPTIONS["lime"](softmax=False), "logit")


def of_sizes(masks):
    """The weight of each copy by its size, as of drawn ones: the Shapley kernel's with mean 1, and 1 at both ends."""
    players = masks.shape[1]
    found = np.array([1 / (math.comb(players, s) * s * (players - s)) if s % players else 0 for s in masks.sum(1)])
    return np.where(found > 0, found / found[found > 0].mean(), 1.0)


@pytest.mark.parametrize("kernel", ["masks_cosine", "masks_l2", "pixels_cosine", "pixels_l2"])
def test_lime_is_weighted_ridge_regression_over_all_copies(kernel):
    net, x = convolutional(), images(1)
    found = attribute.lime(net, x, 2, segments=GRID, samples=64, kernel=kernel, width=0.4, baseline=0.1)
    masks = np.array(list(itertools.product([False, True], repeat=6)))
    points = torch.stack([shown(x[0], torch.full_like(x[0], 0.1), cells(2, 3), mask) for mask in masks])
    values = net(points).softmax(1)[:, 2].detach().numpy()
    if kernel.startswith("pixels"):
        flat, own = points.flatten(1).numpy(), x.flatten().numpy()
    else:
        flat, own = masks.astype(float), np.ones(6)
    lengths = np.linalg.norm(flat, axis=1) * np.linalg.norm(own)
    cosine = 1 - np.divide(flat @ own, lengths, out=np.zeros(64), where=lengths > 0)
    straight = np.linalg.norm(flat - own, axis=1) / np.linalg.norm(flat[0] - own)
    weight = of_sizes(masks) * np.exp(-((cosine if kernel.endswith("cosine") else straight) ** 2) / 0.4**2)
    x1 = np.concatenate([masks, np.ones((64, 1))], 1)
    gram = (x1 * weight[:, None]).T @ x1 + np.diag([1.0] * 6 + [0])
    wanted = np.linalg.solve(gram, x1.T @ (weight * values))
    np.testing.assert_allclose(found.facts["value"][0], wanted[:6], atol=1e-11)
    assert float(found.facts["intercept"][0]) == pytest.approx(wanted[6], abs=1e-11)


def test_a_kernel_so_narrow_that_the_image_alone_counts_has_no_stability():
    found = attribute.lime(convolutional(), images(1), 2, segments=FINE, samples=100, width=1e-4)
    assert found.facts["stability"].isnan().all() and found.facts["value"].abs().max() < 1e-9
    assert float(found.facts["intercept"][0]) == pytest.approx(float(found.facts["score"][0]), abs=1e-9)


def test_sparse_weights_and_trees():
    net, x = convolutional(), images(2)
    for selection in ("forward", "lasso"):
        found = attribute.lime(net, x, 2, segments=FINE, samples=200, features=4, selection=selection)
        assert ((found.facts["value"] != 0).sum(1) <= 4).all() and (found.facts["value"] != 0).any()
    tree = attribute.lime(net, x, 2, segments=FINE, samples=200, model="tree", depth=2)
    assert ((tree.facts["value"] != 0).sum(1) <= 2).all() and (tree.facts["r2"] > 0).all()
    assert tree.facts["node_segment"].shape == (2, 7) and tree.facts["node_segment"][:, 3:].isnan().all()
    torch.testing.assert_close(tree.facts["node_mean"][:, 0], tree.facts["intercept"])
    root = tree.facts["node_segment"][:, 0].long()
    step = tree.facts["node_mean"][:, 2] - tree.facts["node_mean"][:, 0]
    for image in range(2):  # what the first split changes; the second may part by the same segment no more
        torch.testing.assert_close(tree.facts["value"][image, root[image]], step[image])


def test_random_masks_are_the_mean_score_where_a_segment_is_shown():
    net, x = convolutional(), images(1)
    found = attribute.rise(net, x, 2, segments=GRID, samples=64, softmax=False)
    game = game_of(net, x[0], 0 * x[0], cells(2, 3), 2, 6)
    masks, values = np.array(list(game)), np.array(list(game.values()))
    for j in range(6):
        wanted = np.average(values[masks[:, j]], weights=of_sizes(masks)[masks[:, j]])
        assert float(found.facts["value"][0, j] + found.facts["intercept"][0]) == pytest.approx(wanted, abs=1e-13)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("samples", [64, 150])
def test_the_same_bits_among_others_and_the_same_numbers_in_any_batch(method, samples):
    net, x, seeds = convolutional(), images(8), list(range(8))
    segments = GRID if samples == 64 else FINE
    how = {"segments": segments, "samples": samples}
    whole = attribute.explain(method, net, x, "predicted", batch=8, seeds=seeds, **how)
    turned = attribute.explain(method, net, x.flip(0), "predicted", batch=8, seeds=seeds[::-1], **how)
    few = attribute.explain(method, net, x[2:4], "predicted", batch=8, seeds=seeds[2:4], **how)
    for name, values in whole.facts.items():
        assert torch.equal(turned.facts[name].flip(0).nan_to_num(9), values.nan_to_num(9)), name
        assert torch.equal(few.facts[name].nan_to_num(9), values[2:4].nan_to_num(9)), name
    alone = attribute.explain(method, net, x[:2], "predicted", batch=1, seeds=seeds[:2], **how)
    assert (alone.map - whole.map[:2]).abs().max() <= 1e-12 * whole.map.abs().max()
    assert all(not module._forward_hooks for module in net.modules())


def test_methods_share_their_copies():
    calls = []

    class Counting(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            calls.append(len(x))
            return self.net(x)

    from pipeline.networks.gradients import Logit
    from pipeline.stages.attribute.methods.registry import FUNCTIONS
    from pipeline.stages.attribute.segments import part
    from pipeline.stages.attribute.subject import Known, Subject

    x, options = images(2), {name: OPTIONS[name](segments=GRID, samples=50) for name in METHODS}
    key = options["lime"].segments.key
    parts = torch.from_numpy(part(options["lime"].segments, np.zeros((2, 3, 16, 16)))[0])
    target = Logit(torch.tensor([1, 2]))
    subject = Subject(Counting(convolutional()).eval(), x, target, 0 * x, 2, of_inputs=False, segments={key: parts})
    counts = []
    for name in METHODS:
        before = sum(calls)
        shared = FUNCTIONS[name](subject, options[name], Known())
        counts.append(sum(calls) - before)
        alone = attribute.explain(name, convolutional(), x, target, segments=GRID, samples=50)
        torch.testing.assert_close(shared.facts["value"], alone.facts["value"], atol=1e-15, rtol=0)
    assert counts == [2 + 2 * 52, 2, 0]  # the shared pass, the copies with both ends, and the baselines


@pytest.mark.parametrize("method", ["lime", "rise"])
def test_all_copies_and_a_large_sample_of_them_give_the_same(method):
    """At the number of samples at which all copies are taken, nothing jumps."""
    net, x, segments = convolutional(), images(1), {"kind": "grid", "cells": [2, 4]}
    whole = attribute.explain(method, net, x, 2, segments=segments, samples=256).facts["value"]
    subject = attribute.explain(method, net, x, 2, segments=segments, samples=254).facts
    assert float(subject["samples"][0]) == 254 + 2 or float(subject["samples"][0]) == 256
    torch.testing.assert_close(subject["value"], whole, atol=0.02 * float(whole.abs().max()), rtol=0)


class Stepped(nn.Module):
    """A network without any gradient."""

    def forward(self, x):
        with torch.no_grad():
            bright = (x.mean(1) > 0).double()
            return torch.stack([bright[:, :8].sum((1, 2)), bright[:, 8:].sum((1, 2))], 1).round()


@pytest.mark.parametrize("method", METHODS)
def test_networks_without_gradients_and_plain_functions_are_explained(method):
    x = images(2).abs()
    net = attribute.explain(method, Stepped().eval(), x, 0, segments=GRID, samples=64, baseline=-1.0)
    plain = attribute.explain(method, lambda x: Stepped()(x).numpy(), x, 0, segments=GRID, samples=64, baseline=-1.0)
    assert torch.equal(net.map, plain.map) and (net.map != 0).any()
    if method == "kernel_shap":  # the lower row of cells has nothing to do with class 0
        assert (net.facts["value"][:, 3:] == 0).all() and net.residual.max() < 1e-14
    with pytest.raises(MicrotomeError, match="saliency explains modules; these explain any function: occlusion, lime"):
        attribute.saliency(lambda x: x, x, 0)


def test_values_of_vectors_and_rows_of_matrices_are_segments():
    w = torch.tensor([2.0, -3, 0.5]).double()
    found = attribute.kernel_shap(lambda x: (x @ w)[:, None], torch.tensor([[1, 2, -4]]).double(), 0, samples=8)
    assert found.map is None and found.values.tolist() == [[2, -6, -2]]
    rows = torch.randn((2, 4, 3), generator=torch.Generator().manual_seed(0)).double()
    found = attribute.kernel_shap(lambda x: (x.sum(2) ** 2).sum(1)[:, None], rows, 0, samples=16)
    torch.testing.assert_close(found.facts["value"], rows.sum(2) ** 2, atol=1e-12, rtol=0)
    assert found.values is None
    how = {"samples": 16, "softmax": False, "kernel": "pixels_l2"}
    lime = attribute.lime(lambda x: (x.sum(2) ** 2).sum(1)[:, None], rows, 0, **how)
    assert lime.facts["value"].shape == (2, 4)
    groups = torch.tensor([0, 0, 1])
    found = attribute.kernel_shap(
        lambda x: (x @ w)[:, None], torch.tensor([[1, 2, -4]]).double(), 0, samples=8, segments=groups
    )
    assert found.facts["value"].tolist() == [[-4, -2]] and found.values.tolist() == [[-4, -4, -2]]


def test_superpixels_part_the_inputs():
    pytest.importorskip("skimage", reason="scikit-image, the extra `segments`, is not installed")
    y, x = torch.meshgrid(torch.arange(24), torch.arange(24), indexing="ij")
    picture = torch.stack([torch.sin(y / 5), torch.cos(x / 4), torch.sin((x + y) / 6)])[None].double()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double().eval()
    found = attribute.kernel_shap(net, picture, 1, segments={"kind": "slic", "count": 12}, samples="exact")
    assert 2 <= int(found.facts["players"][0]) <= 12 and found.residual[0] < 1e-13
    scaled = attribute.kernel_shap(net, picture, 1, segments={"kind": "slic", "count": 12}, samples="exact")
    assert torch.equal(scaled.map, found.map)


ODD = [
    (
        {"samples": "exact", "segments": FINE},
        "exact` plays all of at most 2\\^12 copies, and there are up to 16",
    ),
    ({"samples": 20, "segments": FINE}, "samples: 20 of up to 16 segments, expected at least 32"),
    ({"segments": {"kind": "grid", "cells": [1, 1]}}, "a grid of one cell is one segment"),
    ({"segments": {"kind": "slic", "count": 1}}, "greater than or equal to 2"),
    ({"segments": {"kind": "grid", "cells": [32, 2]}}, "cells: 32 x 2 cells of 16 x 16 pixels"),
    ({"segments": "patches"}, "computes no attention that can be read"),
    ({"segments": {"kind": "labels", "category": "truth/object"}}, "give them as a tensor"),
    ({"segments": "labels"}, "category"),
    ({"segments": "cubes"}, "cubes"),
    ({"segments": torch.zeros(3, 8, 8, dtype=torch.int64)}, "expected integers from 0"),
    ({"segments": torch.zeros(16, 16)}, "expected integers from 0"),
    ({"segments": torch.full((16, 16), -1)}, "expected integers from 0"),
    ({"samples": 3}, "greater than or equal to 4"),
    ({"max_samples": 100, "tolerance": 0.1}, "max_samples: 100 is below `samples`, 512"),
    ({"samples": "exact", "tolerance": 0.1}, "`samples: exact` leaves no error"),
    ({"estimator": "guess"}, "estimator"),
]


@pytest.mark.parametrize("at", range(len(ODD)))
def test_what_cannot_be_explained_is_refused_by_its_key(at):
    options, message = ODD[at]
    with pytest.raises(MicrotomeError, match=message):
        attribute.kernel_shap(convolutional(), images(), 0, **options)


def test_odd_options_of_lime_and_of_others_are_refused():
    net, x = convolutional(), images()
    with pytest.raises(MicrotomeError, match="a tree has no such bound: give its `depth`"):
        attribute.lime(net, x, 0, segments=GRID, model="tree", features=3)
    with pytest.raises(MicrotomeError, match="width"):
        attribute.lime(net, x, 0, segments=GRID, width=0)
    with pytest.raises(MicrotomeError, match="saliency has no segments"):
        attribute.saliency(net, x, 0, segments=torch.zeros(16, 16, dtype=torch.int64))
    with pytest.raises(MicrotomeError, match="saliency: segments: unknown key"):
        attribute.saliency(net, x, 0, segments=GRID)
    with pytest.raises(MicrotomeError, match=r"segments are of images .* not of inputs \(1, 3\)"):
        attribute.lime(lambda x: x, torch.ones(1, 3), 0, segments=GRID, samples=8)


def test_patches_of_a_transformer():
    from torchvision.models import VisionTransformer

    torch.manual_seed(0)
    net = VisionTransformer(16, 4, 1, 2, 8, 16, num_classes=3).double().eval()
    nn.init.normal_(net.heads.head.weight)
    x = images(1)
    found = attribute.kernel_shap(net, x, 1, segments="patches", samples=100, batch=64)
    own = attribute.kernel_shap(net, x, 1, segments=torch.as_tensor(cells(4, 4)), samples=100, batch=64)
    assert found.facts["value"].shape == (1, 16) and found.residual[0] < 1e-13
    torch.testing.assert_close(found.map, own.map, atol=1e-14, rtol=0)


def test_the_documented_words_are_explained():
    page = (Path(__file__).parents[3] / "docs/attribution.md").read_text()
    block = page.partition("explains the words of a sentence:\n\n")[2].partition("\nWords")[0]
    scope = {}
    exec("\n".join(line.removeprefix("    ") for line in block.splitlines()), scope)
    values = dict(zip(scope["words"], scope["found"].values[0].tolist(), strict=True))
    assert scope["found"].residual[0] < 1e-12
    assert values["beach"] > 0 > values["pine"] and max(values, key=values.get) == "waves"
    assert scope["local"].values.shape == (1, len(values)) and scope["local"].facts["r2"][0] > 0.9
