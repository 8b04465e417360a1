"""Training: the schedule, the order of images, and that an interruption leaves no trace."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from pipeline.config.recipe import Recipe
from pipeline.errors import MicrotomeError
from pipeline.networks.training.loop import CHECKPOINT, _augment, _batch, _take, evaluate, fit, learning_rate
from pipeline.networks.training.repeatable import native_bfloat16

ROOT = Path(__file__).parents[3]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
RECIPE = Recipe(steps=12, batch_size=8, learning_rate=5e-3, shift=1, threads=1, checkpoint_every=5)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 3),
    )  # fmt: skip


def data(count=40, seed=0):
    """Three classes: bright in red, green or blue."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, count)
    images = draw.integers(0, 120, (count, 3, 12, 10), dtype=np.uint8)
    images[np.arange(count), labels] += 120
    return images, labels


def weights(model):
    return torch.cat([value.double().flatten() for value in model.state_dict().values()])


def train(model, recipe=RECIPE, **options):
    arguments = {"train": data(), "validation": data(30, 1), "mean": MEAN, "std": STD} | options
    return fit(model, arguments.pop("train"), arguments.pop("validation"), recipe=recipe, **arguments)


def test_it_learns_and_says_how_well():
    model = network()
    result = train(model, RECIPE.model_copy(update={"steps": 80, "learning_rate": 0.03}))
    assert result["accuracy"] > 0.9
    assert [point["step"] for point in result["curve"]] == list(range(1, 81))
    assert result["curve"][-1]["loss"] < result["curve"][0]["loss"]
    assert result["precision"] in ("bfloat16", "float32")
    assert (result["threads"], result["train_images"], result["validation_images"]) == (1, 40, 30)
    assert not model.training
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_accuracy_and_loss_against_float64():
    model, (images, labels) = network(), data(30, 1)
    accuracy, loss, count = evaluate(model, (images, np.where(labels == 1, -1, labels)), MEAN, STD)
    x = (images.astype(np.float64) / 255 - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    kept = labels != 1
    with torch.no_grad():
        logits = model.double()(torch.from_numpy(x[kept])).numpy()
    shifted = logits - logits.max(1, keepdims=True)
    likelihood = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    assert count == kept.sum()
    assert accuracy == (logits.argmax(1) == labels[kept]).mean()
    assert loss == pytest.approx(-likelihood[np.arange(count), labels[kept]].mean(), rel=1e-4)


class StopError(Exception):
    pass


@pytest.mark.parametrize("killed_at", [1, 5, 6, 11])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, killed_at):
    undisturbed = network()
    expected = train(undisturbed)

    def stop(step, *_):
        if step == killed_at:
            raise StopError

    with pytest.raises(StopError):
        train(network(), folder=tmp_path, progress=stop)
    assert (tmp_path / CHECKPOINT).exists() == (killed_at > 5)
    resumed = network(seed=0 if killed_at <= 5 else 9)  # from a checkpoint on, the first weights no longer matter
    (tmp_path / f".{CHECKPOINT}.x.partial").touch()  # as a kill in the middle of saving leaves it
    steps = []
    found = train(resumed, folder=tmp_path, progress=lambda step, *_: steps.append(step))
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    assert steps[0] == 5 * ((killed_at - 1) // 5) + 1
    assert torch.equal(weights(undisturbed), weights(resumed))
    assert found == expected
    again = network(seed=9)
    assert train(again, folder=tmp_path, progress=lambda *_: pytest.fail("trained again")) == expected
    assert torch.equal(weights(again), weights(undisturbed))


def test_a_killed_process_leaves_no_trace(tmp_path):
    """SIGKILL in the middle of a step, from outside the loop's control."""
    code = (
        "import os, signal, sys; from pathlib import Path; import tests.pipeline.networks.test_training as t;"
        "t.train(t.network(), folder=Path(sys.argv[1]),"
        " progress=lambda step, *_: os.kill(os.getpid(), signal.SIGKILL) if step == 8 else None)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment, check=False)
    assert killed.returncode == -9
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]
    undisturbed, resumed = network(), network(3)
    train(undisturbed)
    train(resumed, folder=tmp_path)
    assert torch.equal(weights(undisturbed), weights(resumed))


def test_state_of_torch_is_put_back():
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.get_rng_state().clone()
    train(network(), RECIPE.model_copy(update={"threads": 2, "steps": 2}))
    torch.manual_seed(0)
    network()
    assert torch.get_num_threads() == before[0]
    assert torch.are_deterministic_algorithms_enabled() == before[1]


def test_random_state_of_the_caller_is_left_alone():
    model = network()
    before = torch.get_rng_state().clone()
    train(model, RECIPE.model_copy(update={"steps": 2}))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_without_label_are_left_out():
    images, labels = data()
    with_more = np.concatenate([images, 255 - images]), np.concatenate([labels, np.full(40, -1)])
    models = network(), network()
    one, other = train(models[0]), train(models[1], train=with_more)
    assert one == other
    assert torch.equal(weights(models[0]), weights(models[1]))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(40, -1), "found 0 labelled training images of 0"),
        (np.zeros(40, int), "found 40 labelled training images of 1"),
        (np.arange(40) % 5, "has 3 classes but the training labels go up to 4; build it with 5 or more"),
        (np.zeros(39, int), r"found \(40, 3, 12, 10\) and \(39,\)"),
    ],
)
def test_labels_that_cannot_be_learnt(labels, message):
    with pytest.raises(MicrotomeError, match=message):
        train(network(), train=(data()[0], labels))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    model = network()
    nn.init.constant_(model[-1].weight, math.inf)
    with pytest.raises(MicrotomeError, match=r"loss is (nan|inf) at step 0 of 12; lower `learning_rate` \(now 0.005\)"):
        train(model, folder=tmp_path)


def test_a_network_without_logits_is_refused():
    with pytest.raises(MicrotomeError, match=r"logits of shape \(batch, class\), found \(2, 3, 12, 10\)"):
        train(nn.Sequential(nn.Conv2d(3, 3, 1)))


def test_no_validation_images():
    result = train(network(), validation=None)
    assert (result["accuracy"], result["loss"], result["validation_images"]) == (None, None, 0)


@pytest.mark.parametrize("harm", [lambda data: b"", lambda data: data[: len(data) // 2], lambda data: b"no" + data])
def test_a_damaged_checkpoint_is_named(tmp_path, harm):
    train(network(), folder=tmp_path)
    path = tmp_path / CHECKPOINT
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(MicrotomeError, match=r"checkpoint\.pt cannot be read .*; delete it to train from scratch"):
        train(network(), folder=tmp_path)


def test_a_checkpoint_with_code_is_refused(tmp_path):
    torch.save({"key": StopError}, tmp_path / CHECKPOINT)
    with pytest.raises(MicrotomeError, match="cannot be read"):
        train(network(), folder=tmp_path)


@pytest.mark.parametrize("change", [{"learning_rate": 1e-3}, {"steps": 13}, {"seed": 1}, {"threads": 2}])
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, change):
    train(network(), folder=tmp_path)
    with pytest.raises(MicrotomeError, match="is of another recipe or data set"):
        train(network(), RECIPE.model_copy(update=change), folder=tmp_path)


def test_how_often_it_is_saved_does_not_matter(tmp_path):
    train(network(), folder=tmp_path)
    train(network(), RECIPE.model_copy(update={"checkpoint_every": 3}), folder=tmp_path)


@settings(deadline=None, max_examples=50)
@given(count=st.integers(1, 50), batch=st.integers(2, 20), seed=st.integers(0, 5))
def test_every_image_is_seen_equally_often(count, batch, seed):
    recipe = Recipe(batch_size=batch, seed=seed)
    passes = 3
    steps = -(-passes * count // batch)
    seen = np.bincount(np.concatenate([_batch(recipe, step, count) for step in range(steps)]), minlength=count)
    assert seen.sum() == steps * batch
    assert seen.min() >= passes
    assert seen.max() <= -(-steps * batch // count)


@settings(deadline=None, max_examples=30)
@given(flip=st.booleans(), shift=st.integers(0, 3), step=st.integers(0, 100))
def test_augmented_images_are_windows_of_the_mirrored_and_padded(flip, shift, step):
    images = data(6)[0]
    found = _augment(torch.from_numpy(images), Recipe(flip=flip, shift=shift), step).numpy()
    for one, moved in zip(images, found, strict=True):
        padded = np.pad(one, [(0, 0), (shift, shift), (shift, shift)], mode="edge")
        windows = [padded[:, y : y + 12, x : x + 10] for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
        mirrored = np.pad(one[:, :, ::-1], [(0, 0), (shift, shift), (shift, shift)], mode="edge")
        if flip:
            windows += [mirrored[:, y : y + 12, x : x + 10] for y in range(2 * shift + 1) for x in range(2 * shift + 1)]
        assert any(np.array_equal(moved, window) for window in windows)


def test_learning_rate_rises_and_falls():
    recipe = Recipe(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(rates) == 1.0
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3
    assert learning_rate(Recipe(steps=1, warmup=0.5), 0) > 0


class OnDisk:
    """Like an array on disk: one request, indices strictly rising."""

    def __init__(self, array):
        self.array, self.shape, self.requests = array, array.shape, 0

    def __getitem__(self, index):
        assert (np.diff(index) > 0).all()
        self.requests += 1
        return self.array[index]


def test_images_on_disk_are_read_in_one_request():
    images = OnDisk(data()[0])
    index = np.array([1, 1, 4, 30])
    assert np.array_equal(_take(images, index), images.array[index])
    assert images.requests == 1


@pytest.mark.parametrize("wrong", [{"stepz": 3}, {"steps": 0}, {"batch_size": 1}, {"warmup": 1.0}, {"shift": -1}])
def test_recipes_are_strict(wrong):
    with pytest.raises(ValidationError):
        Recipe(**wrong)


def test_bfloat16_only_where_native(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": False})
    assert not native_bfloat16("cpu")
    assert train(network(), RECIPE.model_copy(update={"steps": 1}))["precision"] == "float32"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert native_bfloat16("cpu")
