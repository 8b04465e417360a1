"""The test `counterfactual` of the audit: where it must be perfect, where it must be at chance, and what it refuses."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from experiments import labelled_images, scenes, segmentation
from safetensors.torch import save_file

from kernels.attribution.agreement import rank_correlation
from pipeline.config.datasets import Scenes
from pipeline.config.networks import Network
from pipeline.data.scenes import CLASSES, DEFINING, KINDS, generate
from pipeline.errors import MicrotomeError
from pipeline.networks import checkpoint
from pipeline.networks.build import build
from pipeline.networks.forward import Model
from pipeline.networks.gradients import Logit
from pipeline.run import experiment, planner
from pipeline.stages.attribute.options import OPTIONS, IntegratedGradients
from pipeline.stages.attribute.tasks import Work, examine_network
from pipeline.stages.audit import effects
from pipeline.stages.audit.batch import Batch, Shared
from pipeline.stages.audit.controls import CONTROLS as MAPS
from pipeline.stages.audit.counterfactual import CONTROLS, OBJECTS, SIZES, Counterfactual, outcomes
from pipeline.stages.audit.results import Outcome
from pipeline.stages.audit.trials import counterfactual as trial
from pipeline.workers.tasks import computing

SIZE, COUNT = 24, 24
NETWORKS = """
from collections import OrderedDict

from torch import nn


def linear(size=24):
    return nn.Sequential(OrderedDict(flatten=nn.Flatten(), head=nn.Linear(3 * size * size, 12)))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 12),
    )
"""
ADDITIVE = {
    "gradient_x_input": {},
    "integrated_gradients": {"steps": 4, "max_steps": 4},
    "deeplift": {},
    "lrp": {"rule": "epsilon", "epsilon": 0},
}


class Blocks:
    """A hand-made scene: blocks of random size and colour, on black, none over another."""

    def __init__(self, seed, size=SIZE):
        random = np.random.default_rng(seed)
        self.image = np.zeros((3, size, size), np.uint8)
        self.instance_map = np.zeros((size, size), np.uint8)
        cell = size // 3
        places = random.permutation(9)[: random.integers(5, 8)]
        self.things = [SimpleNamespace(kind=KINDS[number]) for number in random.integers(0, len(KINDS), len(places))]
        for k, place in enumerate(places.tolist()):
            y, x = cell * (place // 3), cell * (place % 3)
            high, wide = random.integers(3, cell + 1, 2)
            self.instance_map[y : y + high, x : x + wide] = k + 1
            self.image[:, y : y + high, x : x + wide] = random.integers(0, 256, (3, high, wide))

    def pictures(self, shown):
        covered = np.concatenate([np.ones((len(shown), 1), bool), shown], 1)[:, self.instance_map]
        return np.where(covered[:, None], self.image, 0).astype(np.uint8)


def stored(name, spec, weights):
    """Return a network with the weights that it draws, as the stage `network` stores it."""
    save_file({key: value.contiguous() for key, value in build(spec).state_dict().items()}, weights)
    return Model(name, spec.model_dump_json(), weights, checkpoint.sha256(weights), "")


def batch_of(folder, network, images, ids, methods=None, labels=None, size=SIZE):
    """What a worker sees of images: their labels are what the network predicts, unless given."""
    file, weights = folder / "audited.py", folder / f"{network}.safetensors"
    file.write_text(NETWORKS)
    spec = Network(
        module=f"{file}:{network}",
        weights="random",
        seed=5,
        preprocessing={"mean": [0, 0, 0], "std": [1, 1, 1]},
        numerics={"micro_batch": 8},
    )
    model = stored(network, spec, weights)
    found = {name: OPTIONS[name].model_validate({"method": name} | how) for name, how in (methods or {}).items()}
    layers = [layer for each in found.values() if (layer := each.layer_name()) is not None]
    _, explainable = examine_network(model, (size, size), layers)
    targets = SimpleNamespace(kind="predicted", classes=(), link="logit", ranks=1)
    shared = Shared(
        Work(model, explainable, targets, "black", found, {}, {}),
        torch.from_numpy(images),
        np.zeros(len(images), np.int64),
        np.arange(len(images)),
        ids,
        list(range(len(images))),
        Logit(torch.zeros(len(images), dtype=torch.int64)),
        Scenes(kind="scenes", size=size).model_dump(),
        "validation",
        list(CLASSES),
        twin=stored("twin", spec.model_copy(update={"seed": 6}), weights.with_name("twin.safetensors")),
    )
    with computing:
        classes = Batch(shared, "", "area").logits.argmax(1)
    shared.kept.clear()
    own = {"target": Logit(classes), "labels": classes.numpy() if labels is None else labels}
    return Batch(SimpleNamespace(**(vars(shared) | own)), "", "area")


def measured(batch, name, options=None, maps=None):
    """Run the test for a method, or for one of its controls; with `maps`, for a method that has these."""
    with computing:
        if name in MAPS:
            cell = batch.of(name, name, MAPS[name](batch), {})
        elif name in CONTROLS and maps is None:
            cell = batch.of(name, name, None, {})
        else:
            cell = batch.of(name, "", batch.of(name, "", None, {}).explain() if maps is None else maps, {})
        return trial.counterfactual(cell, options or Counterfactual(steps=4, coalitions=64, pixels=2))


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Scenes of blocks, seen by a linear network."""
    hand_made, original = {f"blocks/{at}": Blocks(at) for at in range(COUNT)}, trial.draw_again
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trial, "draw_again", lambda dataset, name: hand_made.get(name) or original(dataset, name))
        images = np.stack([each.image for each in hand_made.values()])
        yield batch_of(tmp_path_factory.mktemp("blocks"), "linear", images, list(hand_made), ADDITIVE)


@pytest.mark.parametrize("method", ADDITIVE)
def test_additive_methods_are_perfect_on_a_linear_network(blocks, method):
    """Of blocks on black, what the score loses is the sum of w x over the block, and so is what these methods say."""
    found = measured(blocks, method)
    counted = found["drop"]
    assert (~np.isnan(counted)).sum(1).min() >= 5
    scale = np.nanmax(np.abs(counted))
    np.testing.assert_allclose(found["signed"], counted, rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(found["shapley"], counted, rtol=0, atol=1e-4 * scale)
    for measure in ("rank", "partial", "top"):
        np.testing.assert_allclose(found[measure][:, 0, :, 0], 1)
    assert (found["against"][~np.isnan(found["against"])] == 1).all()
    assert not found["outside"].any()  # where nothing is, nothing is said


def test_the_map_of_a_wrong_class_and_of_another_network_are_not(blocks):
    found = measured(blocks, "deeplift")
    assert abs(found["partial"][:, 1, 0, 0].mean()) < 0.25
    assert abs(found["partial"][:, 2, 0, 0].mean()) < 0.25
    assert found["top"][:, 1:, 0, 0].mean() < 0.45


def test_random_maps_are_at_chance(blocks):
    found = measured(blocks, "random")
    objects = (~np.isnan(found["drop"])).sum(1)
    assert abs(np.nanmean(found["partial"][:, 0])) < 0.15
    assert abs(found["top"][:, 0].mean() - (1 / objects).mean()) < 0.12
    assert np.isnan(found["rank"][:, 1:]).all()  # a control has no untrained network
    # Their sum is the area, on average.
    raw = [rank_correlation(a[None, :5], b[None, :5])[0] for a, b in zip(found["signed"], found["area"], strict=True)]
    assert np.mean(raw) > 0.85


def test_area_alone_leaves_nothing(blocks):
    found = measured(blocks, "area")
    assert np.isnan(found["partial"]).all()
    assert np.allclose(found["signed"], found["area"] * SIZE**2, equal_nan=True)


def test_the_truth_as_a_map_scores_1(blocks):
    truth = measured(blocks, "drop")
    assert (truth["rank"][:, 0, 0, 0] > 1 - 1e-9).all()
    assert (truth["partial"][:, 0, 0, 0] > 1 - 1e-9).all()
    assert (truth["top"][:, 0, 0, 0] == 1).all()
    assert (measured(blocks, "shapley")["rank"][:, 0, 1, 0] > 1 - 1e-9).all()
    maps = np.zeros((COUNT, SIZE, SIZE), np.float32)
    for row in range(COUNT):
        scene = Blocks(row)
        for k, drop in enumerate(truth["drop"][row][: len(scene.things)]):
            mask = scene.instance_map == k + 1
            maps[row][mask] = drop / mask.sum()
    found = measured(blocks, "deeplift", maps=maps)
    np.testing.assert_allclose(found["signed"], found["drop"], atol=1e-5)
    np.testing.assert_allclose(found["rank"][:, 0, 0, 0], 1)


def test_a_mask_that_is_filled_with_the_ground_is_the_object_left_out(blocks):
    """All around the blocks of this scene is black, where no other block is near."""
    found = measured(blocks, "ring", Counterfactual(ring=1, coalitions=64, pixels=2))
    alone = []
    for row in range(COUNT):
        instances = Blocks(row).instance_map
        for k in range(instances.max()):
            mask = instances == k + 1
            near = trial.objects.ring(mask, 1)
            if not instances[near].any():
                alone.append((found["signed"][row, k], found["drop"][row, k]))
    assert len(alone) > 10
    np.testing.assert_allclose(*np.array(alone).T, atol=1e-5)


def test_pictures_are_seen_once_for_all_methods(blocks, monkeypatch):
    seen = []
    original = Batch.logits_at
    monkeypatch.setattr(
        Batch, "logits_at", lambda self, inputs, *a: seen.append(len(inputs)) or original(self, inputs, *a)
    )
    blocks.shared.kept.clear()
    measured(blocks, "drop")
    first = sum(seen)
    assert first > COUNT * 2**5
    measured(blocks, "deeplift")
    assert sum(seen) == first


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Scenes, seen by a random network with BatchNorm; every third is predicted wrong."""
    known = generate(0, 0, 24, SIZE, "validation", label_map=False)
    ids = [f"validation/{at:07d}" for at in range(24)]
    batch = batch_of(tmp_path_factory.mktemp("real"), "convolutional", known.image, ids, {"gradient_x_input": {}})
    batch.shared.labels[::3] = (batch.shared.labels[::3] + 1) % 12
    return batch


def test_images_that_count(real):
    found = measured(real, "gradient_x_input")
    there = ~np.isnan(found["drop"]).all(1)
    assert not there[::3].any()
    assert there.sum() > 8
    assert not np.isnan(found["signed"][~np.isnan(found["drop"])]).any()
    for measure in ("rank", "partial", "top"):
        assert np.isnan(found[measure][~there]).all()
        assert not np.isnan(found[measure][there][:, :, :, 0]).all()
    known = generate(0, 0, 24, SIZE, "validation", label_map=False, instance_map=True)
    for row in there.nonzero()[0]:
        areas = np.bincount(known.instance_map[row].ravel(), minlength=OBJECTS)[1:]
        counted = areas[areas >= 2] / SIZE**2
        assert np.array_equal(found["area"][row][: len(counted)], counted)
        assert np.isnan(found["area"][row][len(counted) :]).all()


def test_truths_against_scores_of_pictures_one_by_one(real):
    """A slow twin: each object left out in a picture of its own, alone in its batch, in float64."""
    found = measured(real, "drop")
    network = real.network.double()
    try:
        rows = (~np.isnan(found["drop"]).all(1)).nonzero()[0][:3]
        for row in rows:
            scene = trial.draw_again(Scenes(kind="scenes", size=SIZE), real.ids[row])
            counted = [k for k in range(len(scene.things)) if (scene.instance_map == k + 1).sum() >= 2]

            def score(without, scene=scene, row=row):
                shown = np.ones((1, len(scene.things)), bool)
                shown[0, list(without)] = False
                with torch.no_grad():
                    return network(torch.from_numpy(scene.pictures(shown)).double() / 255)[0, real.classes[row]].item()

            drops = [score([]) - score([k]) for k in counted]
            np.testing.assert_allclose(found["drop"][row][: len(counted)], drops, atol=1e-5)
            total = score([]) - score(range(len(scene.things)))
            played = next(iter(real.shared.kept[key] for key in real.shared.kept if key[0] == "counterfactual"))[row]
            np.testing.assert_allclose(played.truths["shapley"].sum(), total, atol=1e-5)
    finally:
        network.float()


def test_every_control_is_there(real):
    for name in CONTROLS:
        found = measured(real, name)
        assert not np.isnan(found["rank"][:, 0, 0, 0]).all(), name
    baselines = [measured(real, f"ig_{name}")["signed"] for name in ("black", "mean", "empty")]
    assert not np.allclose(baselines[0], baselines[1], equal_nan=True)
    assert not np.allclose(baselines[1], baselines[2], equal_nan=True)


def test_integrated_gradients_from_the_empty_scene_add_up_to_the_score_of_all_objects(real):
    with computing:
        cell = real.of("ig_empty", "ig_empty", None, {})
        options = Counterfactual(steps=64, coalitions=64, pixels=2)
        played = trial._play_all(real, options)
        maps = trial._integrated(cell, options, played)
        for map_, (row, own) in zip(maps, played.items(), strict=True):
            empty, whole = real.scores(torch.from_numpy(np.stack([own.empty, own.scene.image])), [row, row])
            assert map_.sum() == pytest.approx(whole - empty, abs=0.02 * max(abs(whole - empty), 0.05))
            untouched = np.logical_or.reduce([thing.painted for thing in own.scene.things])
            assert not map_[~untouched].any()


def test_the_untrained_network_has_statistics_of_scenes(real):
    with computing:
        network = trial._calibrated(real)
    assert network is not real.untrained
    norm, plain = network[1], real.untrained[1]
    images = torch.from_numpy(generate(0, 0, 128, SIZE, "train", label_map=False).image) / 255
    with torch.no_grad():
        before = network[0](images)
    np.testing.assert_allclose(norm.running_mean, before.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(norm.running_var, before.var((0, 2, 3)), rtol=1e-2)
    assert not plain.running_mean.any()
    assert not any(module.training for module in network.modules())


def test_lone_objects_of_another_kind(real):
    with computing:
        played = trial._play_all(real, Counterfactual(coalitions=64, pixels=2))
    lone = {row: own for row, own in played.items() if own.lone is not None}
    assert lone
    for row, own in played.items():
        kinds = [thing.kind for thing in own.scene.things]
        class_ = CLASSES[int(real.classes[row])]
        others = [
            kind for kind in kinds if kind in DEFINING.values() and kind != DEFINING[class_] and kinds.count(kind) == 1
        ]
        seen = [k for k, kind in enumerate(kinds) if kind in others and own.areas[k] >= 2]
        assert own.wrong != real.classes[row]
        assert (own.lone is None) == (not seen)
        if seen:
            assert own.areas[own.lone] == max(own.areas[seen])
            assert DEFINING[CLASSES[own.wrong]] == kinds[own.lone]


def test_other_pixels_are_refused(real):
    changed = SimpleNamespace(**vars(real.shared))
    changed.pixels, changed.kept = real.pixels.clone(), {}
    changed.pixels[1, 0, 0, 0] ^= 1
    with pytest.raises(MicrotomeError, match=r"image 'validation/0000001' has other pixels when it is drawn again"):
        measured(Batch(changed, "", "area"), "area")


# Statistics -----------------------------------------------------------------------------------------------------------


def cell_of(images=12, seed=0):
    """A cell with numbers made up."""
    random = np.random.default_rng(seed)
    arrays = trial._blank(images)
    for row in range(images):
        count = random.integers(4, 8)
        for name in ("drop", "shapley", "signed", "absolute"):
            arrays[name][row, :count] = random.normal(size=count)
        arrays["kind"][row, :count] = random.integers(0, 3, count)
        arrays["area"][row, :count] = random.choice([0.005, 0.02, 0.2], count)
    for name in ("rank", "partial", "top"):
        arrays[name][:] = random.random(arrays[name].shape)
    labels = random.integers(0, 2, images)
    return SimpleNamespace(arrays=arrays, labels=labels, class_names=["one", "two"], measures={})


def test_outcomes_by_class_kind_and_size_against_loops():
    cell = cell_of()
    arrays = cell.arrays
    found = {each.measure: each for each in outcomes(cell, Counterfactual())}
    assert found["partial.drop.signed"].value == pytest.approx(arrays["partial"][:, 0, 0, 0].mean())
    assert found["top.shapley.absolute.wrong_class"].value == pytest.approx(arrays["top"][:, 2, 1, 1].mean())
    assert found["partial.drop.signed"].low < found["partial.drop.signed"].value < found["partial.drop.signed"].high
    for label, name in enumerate(cell.class_names):
        own = found[f"partial.drop.signed.class.{name}"]
        assert own.value == pytest.approx(arrays["partial"][cell.labels == label, 0, 0, 0].mean())
        assert own.images == (cell.labels == label).sum()
    top: dict[str, list] = {}
    over: dict[str, list] = {}
    for row in range(12):
        there = ~np.isnan(arrays["drop"][row])
        drop, said = arrays["drop"][row, there], arrays["signed"][row, there]
        kinds = [KINDS[int(each)] for each in arrays["kind"][row, there]]
        sizes = [next(s for s, most in SIZES.items() if each <= most) for each in arrays["area"][row, there]]
        first = int(np.argmax(drop))
        for group in (f"kind.{kinds[first]}", f"size.{sizes[first]}"):
            top.setdefault(group, []).append(arrays["top"][row, 0, 0, 0])
        places = [np.argsort(np.argsort(each)) for each in (said, drop)]
        higher = (places[0] - places[1]) / (len(drop) - 1)
        for groups in ([f"kind.{kind}" for kind in kinds], [f"size.{size}" for size in sizes]):
            for group in set(groups):
                over.setdefault(group, []).append(higher[[each == group for each in groups]].mean())
    for group, values in top.items():
        assert found[f"top.drop.signed.{group}"].value == pytest.approx(np.mean(values))
        assert found[f"top.drop.signed.{group}"].images == len(values)
    for group, values in over.items():
        assert found[f"overrated.drop.signed.{group}"].value == pytest.approx(np.mean(values))
    assert len([name for name in found if name.startswith("overrated.")]) == len(over)


@pytest.mark.parametrize("width", [3.5, 7.0])
def test_figures_show_methods_before_controls_and_the_best_first(width):
    options = Counterfactual()
    told = {
        name: {each.measure: each for each in outcomes(cell_of(seed=at), options)}
        for at, name in enumerate(["saliency", "ig", "control:random", "control:ig_black", "control:drop"])
    }
    told["refused"] = {"partial.drop.signed": Outcome("partial.drop.signed", np.nan, state="refused")}
    titles = {"saliency": "Saliency", "ig": "Integrated", "refused": "Refused"}
    drawn = list(effects.drawings(told, titles, options))
    assert [each.name for each in drawn] == ["", "classes", "overrated"]
    panel = drawn[0].draw(width).axes[0]
    shown = [label.get_text() for label in panel.get_yticklabels()]
    best = max(("saliency", "ig"), key=lambda name: told[name]["partial.drop.signed"].value)
    assert shown[0] == titles[best]
    assert shown[-1] == effects.GROUPS["ceilings"]["drop"]
    assert not list(effects.drawings({"refused": told["refused"]}, titles, options))
    matrix = drawn[1].draw(width).axes[0].images[0].get_array()
    rows = [label.get_text() for label in drawn[1].draw(width).axes[0].get_yticklabels()]
    assert matrix.shape == (5, 2)
    assert matrix[rows.index("Saliency"), 0] == told["saliency"]["partial.drop.signed.class.one"].value
    columns = [label.get_text() for label in drawn[2].draw(width).axes[0].get_xticklabels()]
    assert columns[:3] == ["small", "medium", "large"]


def test_too_few_images_are_refused():
    cell = cell_of(images=5)
    for values in cell.arrays.values():
        values[:2] = np.nan
    (one,) = outcomes(cell, Counterfactual())
    assert (one.state, one.images) == ("refused", 3)
    assert "3 images are predicted right and show 4 objects, expected 4" in one.note


def asked(folder, raw, tests, **how):
    raw["attribute"] = {"explained": {"images": 8, "methods": {"saliency": None}} | how}
    raw["audit"] = {"honest": {"attributions": "explained", "tests": tests}}
    return planner.make(experiment.parse(raw))


def test_what_is_refused_before_any_work(tmp_path):
    labelled_images(tmp_path, "abcdefgh")
    raw = segmentation(tmp_path)
    with pytest.raises(
        MicrotomeError, match=r"audit\.honest\.tests\.counterfactual: data set .* cannot be drawn again"
    ):
        asked(tmp_path, raw, ["counterfactual"])
    raw = scenes(tmp_path)
    with pytest.raises(MicrotomeError, match="a contrast of two classes has no wrong class"):
        asked(tmp_path, raw, ["counterfactual"], targets={"contrast": [0, 1]})
    with pytest.raises(MicrotomeError, match="coalitions"):
        asked(tmp_path, raw, {"counterfactual": {"coalitions": 3}})
    plan = asked(tmp_path, raw, {"counterfactual": {"coalitions": 64}})
    assert any(step.stage == "audit" for step in plan.steps.values())


def test_the_method_of_the_baselines_takes_exactly_its_steps():
    method = IntegratedGradients(method="integrated_gradients", steps=8, max_steps=8)
    assert method.taken(8) == 8
