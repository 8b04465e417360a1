"""The training of runs: against plain torch, taken up from a checkpoint, side by side, and without looking back."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.calibration.reliability import BINS, Reliability, equal_width, softmax
from kernels.images.whiten import whiten
from pipeline.errors import MicrotomeError
from pipeline.networks.training.repeatable import order
from pipeline.stages.randomize import training
from pipeline.stages.randomize.settings import How
from pipeline.stages.randomize.training import Sets, Training, repeatable, train


def sets(count=43, size=10, classes=4, seed=0):
    draw = np.random.default_rng(seed)
    return Sets(
        draw.integers(0, 256, (count, 3, size, size), np.uint8), draw.integers(0, classes, count),
        draw.integers(0, 256, (21, 3, size, size), np.uint8), draw.integers(0, classes, 21),
    )  # fmt: skip


def network(dropout=0.0):
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(6 * 36, 4)
    )


def settings(**changes):
    return How(**{"seed": 1, "crop": 8, "batch_size": 16, "epochs": 3, "learning_rate": 0.02} | changes)


@pytest.fixture(autouse=True)
def _repeatable():
    with repeatable("cpu"):
        yield


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(training, "native_bfloat16", lambda device: False)


def bits(module):
    return {name: value.numpy().tobytes() for name, value in module.state_dict().items()}


def test_against_plain_torch(float32):
    data, how = sets(), settings(weight_decay=0.1)
    mine = Training(network(), data, how)
    train([mine])
    plain = network()
    decayed, others = ([p for p in plain.parameters() if (p.ndim > 1) == many] for many in (True, False))
    optimiser = torch.optim.SGD([{"params": decayed, "weight_decay": 0.1}, {"params": others}], lr=1, momentum=0.9)
    images, test = (whiten(torch.from_numpy(each[..., 1:9, 1:9]).float()) for each in (data.images, data.test_images))
    labels = torch.from_numpy(data.labels)
    for epoch in range(3):
        plain.train()
        loss_sum, right = 0.0, 0
        for group in optimiser.param_groups:
            group["lr"] = 0.02 * 0.95**epoch
        for rows in torch.from_numpy(order(1, epoch, 43)).split(16):
            optimiser.zero_grad()
            logits = plain(images[rows])
            loss = cross_entropy(logits, labels[rows])
            loss.backward()
            optimiser.step()
            loss_sum += loss.item() * len(rows)
            right += int((logits.argmax(1) == labels[rows]).sum())
        assert mine.curve.loss[epoch] == pytest.approx(loss_sum / 43, rel=1e-4)
        assert mine.curve.accuracy[epoch] == pytest.approx(right / 43, abs=0.03)
        plain.eval()
        with torch.inference_mode():
            tested = plain(test).numpy()
        assert mine.curve.test_accuracy[epoch] == pytest.approx((tested.argmax(1) == data.test_labels).mean(), abs=0.05)
        found = Reliability.zeros(4)
        found.update(softmax(tested), data.test_labels, tested.argmax(1))
        assert mine.curve.test_loss[epoch] == pytest.approx(found.nll / len(tested), rel=1e-3)
        assert mine.curve.test_ece[epoch] == pytest.approx(found.ece, rel=1e-2)
    for (name, own), other in zip(mine.network.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4, msg=name)
    images_right = float((plain(images).argmax(1) == labels).double().mean())
    assert mine.train_accuracy() == pytest.approx(images_right, abs=0.03)


def test_taken_up_from_any_epoch_it_ends_with_the_same_bits(tmp_path):
    data, how = sets(), settings(random_crop=True, dropout=0.3, epochs=5)
    whole = Training(network(), data, how)
    train([whole])
    for killed_after in (1, 3):
        folder = tmp_path / str(killed_after)
        folder.mkdir()
        first = Training(network(), data, how, "key", folder)
        for _ in range(killed_after):
            first.begin_epoch()
            for number in range(first.steps):
                first.step(number)
            first.test()
            first.end_epoch()
        # Killed in the middle of the next epoch, and while it saved.
        first.begin_epoch()
        first.step(0)
        (folder / ".checkpoint.pt.x.partial").write_bytes(b"half")
        torch.manual_seed(99)
        second = Training(network(), data, how, "key", folder)
        assert len(second.curve) == killed_after
        train([second])
        assert second.curve.loss == whole.curve.loss and second.curve.test_accuracy == whole.curve.test_accuracy
        assert len(second.curve.seconds) == 5 and not list(folder.glob("*.partial"))
        assert bits(second.network) == bits(whole.network)
    # What is finished is not gone on with; another key is refused.
    third = Training(network(), data, how, "key", folder)
    assert third.done and bits(third.network) == bits(whole.network)
    with pytest.raises(MicrotomeError, match="another recipe or data set"):
        Training(network(), data, how, "other", folder)


def test_side_by_side_each_run_is_as_alone():
    data = sets()
    hows = [settings(seed=seed, epochs=epochs, dropout=0.2) for seed, epochs in ((0, 2), (1, 4), (2, 3))]
    alone = []
    for how in hows:
        alone.append(Training(network(), data, how))
        train([alone[-1]])
    together = [Training(network(), data, how) for how in hows]
    train(together)
    for one, other in zip(alone, together, strict=True):
        assert one.curve.loss == other.curve.loss and bits(one.network) == bits(other.network)
        assert len(other.curve) == other.how.epochs


class NoLookingBack(TorchDispatchMode):
    """Fails where a value of a tensor is asked for: on a GPU the host would wait for it."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "a step asks for a value"
        assert function is not torch.ops.aten.nonzero.default, "the shape of a result depends on values"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("crop", [False, True])
def test_nothing_is_asked_of_the_device_within_an_epoch(crop):
    one = Training(network(), sets(), settings(random_crop=crop))
    one.begin_epoch()
    with NoLookingBack():
        for number in range(one.steps):
            one.step(number)
        one.test()
    with pytest.raises(AssertionError, match="asks for a value"), NoLookingBack():
        one.totals[0].item()
    one.end_epoch()
    assert len(one.curve) == 1


def test_random_windows_are_windows_of_the_image(float32):
    data = sets(size=11)
    one = Training(network(), data, settings(random_crop=True, crop=8))
    seen = set()
    for epoch in range(6):
        one.begin_epoch()
        for row, (y, x) in zip(one.rows.tolist(), one.windows.tolist(), strict=True):
            seen.add((y, x))
            if epoch == 0:
                expected = whiten(torch.from_numpy(data.images[row : row + 1, :, y : y + 8, x : x + 8]).float())
                found = one._windows(torch.tensor([row]), torch.tensor([[y, x]]))
                torch.testing.assert_close(found, expected)
        one.curve.loss.append(0.0)
    assert seen == {(y, x) for y in range(4) for x in range(4)}


def test_ends_when_every_image_is_predicted_right():
    one = Training(network(), sets(count=20), settings(until_fitted=True, epochs=200, decay=1.0, learning_rate=0.05))
    train([one])
    assert one.curve.fitted == len(one.curve) < 200 and one.train_accuracy() == 1
    assert one.curve.reaches(0.9) <= one.curve.fitted


def test_a_run_that_diverges_ends_and_the_others_go_on():
    data = sets()
    wild, calm = Training(network(), data, settings(learning_rate=1e30)), Training(network(), data, settings())
    train([wild, calm])
    assert wild.curve.diverged and len(wild.curve) < 3 and not math.isfinite(wild.curve.loss[-1])
    assert not calm.curve.diverged and len(calm.curve) == 3


def test_a_last_minibatch_of_one_image_is_left_out():
    one = Training(network(), sets(count=33), settings())
    assert (one.used, one.steps) == (32, 2)
    train([one])
    assert len(one.curve) == 3
    assert Training(network(), sets(count=9), settings()).size == 9


def test_what_is_refused():
    with pytest.raises(MicrotomeError, match="network has 4 classes but the training labels go up to 6"):
        Training(network(), sets(classes=7), settings())
    with pytest.raises(MicrotomeError, match="has no dropout module"):
        Training(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), sets(), settings(dropout=0.5))


def test_dropout_is_switched():
    one = Training(network(), sets(), settings(dropout=0.5))
    assert one.network[4].p == 0.5
    assert Training(network(0.25), sets(), settings()).network[4].p == 0.25


def test_a_confidence_on_the_edge_of_two_bins_is_in_the_lower_one(monkeypatch):
    """As in the calibration. A network that gives all its classes the same is on an edge, with 3, 5 or 15 of them."""
    one = Training(network(), sets(), settings())
    logits = torch.zeros(21, 4)
    logits[:, 3] = -1000
    logits[7:, 0] = torch.linspace(0.05, 3, 14)
    monkeypatch.setattr(one, "_logits", lambda images: logits)
    confidence = softmax(logits.numpy()).max(1)
    assert confidence[0] == 1 / 3 and confidence[7] > 1 / 3
    at = equal_width(confidence)
    gaps = np.bincount(at, confidence - (logits.argmax(1).numpy() == one.test_labels.numpy()), BINS)
    assert at[0] + 1 == at[7]
    np.testing.assert_allclose(one._judged(one.test_images, one.test_labels)[2:], gaps, atol=1e-12)
