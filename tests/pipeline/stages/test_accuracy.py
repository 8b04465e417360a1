"""`accuracy.csv`: how often a network is right, measured anew when only labels change."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
from experiments import job, labelled_images, lines, run, scenes, segmentation, tiny

from pipeline.stages.extract.results import logits as logits_of
from pipeline.stages.report import accuracy

IMAGES = [f"{number:02d}" for number in range(20)]


def table(file):
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def brute_force(logits, label):
    """The measures, image by image, as their definitions are written."""
    bins = [[] for _ in range(15)]
    top_1 = top_5 = nll = 0.0
    for values, of in zip(logits.astype(np.float64), label, strict=True):
        p = np.exp(values - values.max()) / np.exp(values - values.max()).sum()
        order = sorted(range(len(p)), key=lambda c: (-values[c], c))
        top_1 += order[0] == of
        top_5 += of in order[:5]
        nll -= math.log(p[of])
        bins[next(m for m in range(15) if p.max() <= (m + 1) / 15)].append((order[0] == of, p.max()))
    ece = sum(abs(sum(right - sure for right, sure in held)) for held in bins)
    return {"top_1": top_1, "top_5": top_5, "nll": nll, "ece": ece}


@pytest.mark.usefixtures("workers")
def test_the_table_is_what_the_logits_and_labels_say(tmp_path):
    raw = scenes(tmp_path, networks={"tiny": tiny(tmp_path, arguments={"classes": 12}, layers=[])})
    raw["networks"]["narrow"] = raw["networks"]["tiny"] | {"arguments": {"classes": 5}}
    raw["datasets"]["scenes"]["images"] = {"train": 6, "validation": 50}
    plan = run(raw | {"figures": {"formats": ["png"]}}, "ingest", "network", "extract", "report")
    of = job(plan, "extract", "scenes", "tiny")
    logits = logits_of(of.folder, of.read()).open()["logits"][:]
    label = np.asarray(of.images.reader()["label"][:])
    counted = of.images.counted("validation")
    (row,) = table(of.folder / "accuracy.csv")
    assert list(row) == ["images", "top_1", "top_5", "nll", "ece"] and row["images"] == "50"
    for name, total in brute_force(logits[counted], label[counted]).items():
        assert float(row[name]) == pytest.approx(total / 50, rel=1e-5), name
    out = job(plan, "report").folder
    assert table(out / "tables/networks.csv") == [{"dataset": "scenes", "network": "tiny"} | row]
    assert "How often each network is right" in (out / "index.html").read_text()
    assert not (tmp_path / "results/scenes/narrow/accuracy.csv").exists()


@pytest.mark.usefixtures("workers")
def test_other_labels_give_another_accuracy_and_no_forward(tmp_path):
    labelled_images(tmp_path, IMAGES)
    raw = segmentation(tmp_path, concepts=[])
    raw["networks"] = {"tiny": tiny(tmp_path, arguments={"classes": 3}, layers=[])}
    raw |= {"figures": {"formats": ["png"]}}
    (data,) = raw["datasets"]
    raw["datasets"][data]["labels"] = str(tmp_path / "labels.csv")

    def measured(shift):
        rows = "".join(f"{name}.png,{(at + shift) % 3}\n" for at, name in enumerate(IMAGES))
        (tmp_path / "labels.csv").write_text("image,label\n" + rows)
        plan = run(raw, "ingest", "network", "extract")
        of = job(plan, "extract", data, "tiny")
        assert not (of.folder / "accuracy.csv").exists(), "what is there would be of other labels"
        run(raw, "report")
        (row,) = table(of.folder / "accuracy.csv")
        return row, lines(of.folder / "logits.ledger")

    (first, before), (second, after), (third, _) = measured(0), measured(1), measured(2)
    right = [float(row["top_1"]) for row in (first, second, third)]
    assert sum(right) == pytest.approx(1, abs=1e-6) and len(set(right)) > 1
    assert first["top_5"] == "" and before == after


@pytest.mark.parametrize("kind", ["probabilities", "one logit", "one probability"])
def test_scores_of_other_kinds(monkeypatch, kind):
    rng = np.random.default_rng(4)
    logits = np.stack([np.zeros(30), rng.normal(size=30)], 1).astype(np.float32)
    probable = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    label = rng.integers(0, 2, 30)
    given = {"probabilities": probable, "one logit": logits[:, 1:], "one probability": probable[:, 1:]}[kind]
    found = accuracy.measure(held(monkeypatch, given, label))
    expected = brute_force(logits, label)
    assert found.images == 30 and math.isnan(found.top_5)
    for name in ("top_1", "nll", "ece"):
        assert getattr(found, name) == pytest.approx(expected[name] / 30, rel=1e-4)


def test_equal_scores_and_images_without_a_label(monkeypatch):
    label = np.array([0, 4, 5, -1, 6])
    found = accuracy.measure(held(monkeypatch, np.zeros((5, 7), np.float32), label))
    assert (found.images, found.top_1, found.top_5) == (4, 0.25, 0.5)
    assert accuracy.measure(held(monkeypatch, np.zeros((5, 9), np.float32), label)) is None
    assert accuracy.measure(held(monkeypatch, np.zeros((5, 7), np.float32), np.full(5, -1))) is None


def held(monkeypatch, scores, label):
    """A job of `extract` with these scores, in shards of four images."""
    images = SimpleNamespace(
        classes=list(range(max(2, label.max() + 1))) if label.max() >= 0 else list(range(7)),
        reader=lambda: {"label": label},
        counted=lambda split: np.ones(len(label), bool),
        range=lambda shard: (4 * shard, min(len(label), 4 * shard + 4)),
    )
    shards = SimpleNamespace(shards=list(range(-(-len(label) // 4))))
    monkeypatch.setattr(accuracy, "Extracted", SimpleNamespace(of=lambda manifest: shards))
    store = SimpleNamespace(files={"logits": 1}, open=lambda: {"logits": scores})
    monkeypatch.setattr(accuracy, "logits", lambda folder, manifest: store)
    return SimpleNamespace(images=images, read=lambda: None, folder=None, settings=SimpleNamespace(split="all"))
