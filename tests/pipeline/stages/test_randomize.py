"""The stage `randomize`: what it writes, what a changed line costs, and what is refused."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import lines, run, scenes, shown

import pipeline
from kernels.expressivity import interpolate
from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.checkpoint import read
from pipeline.run import experiment as run_experiment
from pipeline.run import planner, preflight
from pipeline.stages.randomize import expressivity, page, tasks
from pipeline.stages.randomize.found import TABLE_1, Run, read_expressivity
from pipeline.stages.randomize.outcomes import output
from pipeline.stages.randomize.results import Expressivity, How, Told
from pipeline.stages.randomize.settings import Corruption
from pipeline.stages.randomize.stage import data_of, runs_of
from pipeline.stages.randomize.tasks import corrupted
from pipeline.stages.randomize.training import Sets
from pipeline.stages.registry import jobs
from pipeline.upkeep import damage, unreferenced
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "randomize")
NETWORK = """
from torch import nn


def small(classes=12, units=8):
    return nn.Sequential(nn.Conv2d(3, units, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(units * 36, classes))
"""


def experiment(folder, runs=None, **changes):
    raw = scenes(folder)
    raw["datasets"]["scenes"]["images"] = {"train": 40, "validation": 20}
    (folder / "small.py").write_text(NETWORK)
    raw["randomize"] = {
        "noise": {
            "dataset": "scenes", "crop": 14, "epochs": 3, "batch_size": 8, "images": 36,
            "networks": {"small": {"module": f"{folder / 'small.py'}:small"}},
            "runs": runs if runs is not None else {
                "true": {"network": "small"},
                "half": {"network": "small", "corruption": "corrupted_labels", "share": 0.5},
                "random": {"network": "small", "corruption": "random_labels", "random_crop": True},
            },
        } | changes
    }  # fmt: skip
    return raw


def curves(made, name="noise"):
    return xr.open_zarr(made.results / "randomization" / name / "curves.zarr").load()


def table(made, name="noise"):
    with (made.results / "randomization" / name / "runs.csv").open(newline="") as file:
        return {row["run"]: row for row in csv.DictReader(file)}


def trained(made):
    return len(lines(made.results / "randomization/noise/runs.ledger"))


def test_what_is_written(tmp_path):
    made = run(experiment(tmp_path), *STAGES)
    found, rows = curves(made), table(made)
    images = pipeline.open_results(made.results)["scenes"].images
    assert found.run.values.tolist() == list(rows) == ["true", "half", "random"]
    assert found.sizes == {"run": 3, "epoch": 3, "image": 36, "test_image": 20}
    assert (images["split"][found.image.values] == "train").all()
    np.testing.assert_array_equal(found.true_label, images["label"][found.image.values])
    np.testing.assert_array_equal(found.label[0], found.true_label)
    assert int((found.label[1] != found.true_label).sum()) == int(rows["half"]["labels_changed"])
    assert rows["true"]["labels_changed"] == "0"
    for at, row in enumerate(rows.values()):
        assert row["outcome"] == "finished" and row["parameters"] == str(224 + 12 * 288 + 12)
        assert float(row["train_loss"]) == pytest.approx(float(found.train_loss[at, -1]), rel=1e-6)
        tested = found.test_accuracy[at].values
        assert float(row["best_test_accuracy"]) == pytest.approx(tested.max())
        assert int(row["best_epoch"]) == tested.argmax() + 1
        lost = found.test_loss[at].values
        assert float(row["lowest_test_loss"]) == pytest.approx(lost.min(), rel=1e-6)
        assert int(row["lowest_test_loss_epoch"]) == lost.argmin() + 1
    assert rows["random"]["random_crop"] == "True" and rows["half"]["share"] == "0.5" and rows["true"]["share"] == ""
    assert (found.seconds.values > 0).all()
    assert pipeline.open_results(made.results).randomization["noise"].sizes["run"] == 3
    manifest = made.manifest(made.step("randomize", experiment="noise"))
    assert not list((made.results / "randomization/noise/runs").glob("*/checkpoint.pt"))
    assert damage.verify(made.results) == []
    # The accuracy is that of the weights that are kept.
    spec = NetworkSpec(module=f"{tmp_path / 'small.py'}:small")
    network = build(spec)
    network.load_state_dict(read(made.results / f"randomization/noise/runs/{rows['true']['id']}/model.safetensors"))
    pixels = torch.from_numpy(images["image"].values[found.test_image.values][..., 1:15, 1:15]).float()
    from kernels.images.whiten import whiten

    with torch.inference_mode():
        right = network(whiten(pixels)).argmax(1).numpy() == images["label"].values[found.test_image.values]
    assert abs(right.mean() - float(rows["true"]["test_accuracy"])) <= 0.05
    assert manifest.result["runs"]["true"]["test_accuracy"] == float(rows["true"]["test_accuracy"])


def test_a_changed_line_trains_its_run_alone(tmp_path):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    assert trained(made) == 3
    before = curves(made)
    runs = raw["randomize"]["noise"]["runs"]
    runs["half"]["share"] = 0.6
    made = run(raw, *STAGES)
    assert trained(made) == 4
    np.testing.assert_array_equal(curves(made).train_loss[[0, 2]], before.train_loss[[0, 2]])
    # Names and order are no part of a run; neither is how often it is saved.
    raw["randomize"]["noise"]["checkpoint_seconds"] = 0
    raw["randomize"]["noise"]["runs"] = {"again": runs["true"], "random": runs["random"], "same": runs["true"]}
    made = run(raw, *STAGES)
    assert trained(made) == 4
    found = curves(made)
    assert found.run.values.tolist() == ["again", "random", "same"]
    np.testing.assert_array_equal(found.train_loss, before.train_loss[[0, 2, 0]])
    unused = [folder for folder in unreferenced.folders(made.results) if "randomization" in folder.parts]
    assert len(unused) == 2
    # What is set for all of them trains all.
    raw["randomize"]["noise"]["momentum"] = 0.5
    assert trained(run(raw, *STAGES)) == 6


def test_the_same_bits_after_a_cut_and_for_any_workers(tmp_path, monkeypatch, two_workers):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    folder = made.results / "randomization/noise"
    before = {name: (folder / name).read_bytes() for name in stored(made)}
    step = made.step("randomize", experiment="noise")
    digest = made.manifest(step).digest
    (made.results / step.manifest).unlink()
    ledger = folder / "runs.ledger"
    whole = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(whole[0] + whole[1][: len(whole[1]) // 2])
    monkeypatch.setenv(client.ADDRESS, two_workers)
    made = run(raw, *STAGES)
    assert made.manifest(step).digest == digest
    assert {name: (folder / name).read_bytes() for name in stored(made)} == before


def stored(made):
    files = made.manifest(made.step("randomize", experiment="noise")).files
    return [name for name in files if "/seconds/c/" not in name]


def test_a_killed_run_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    raw = experiment(tmp_path, {"true": {"network": "small"}}, checkpoint_seconds=0, epochs=6)
    made = run(raw, *STAGES)
    whole, id = curves(made), table(made)["true"]["id"]
    # The worker ends after three epochs: nothing but the checkpoint is there.
    (of_noise,) = jobs(made, "randomize")
    data = data_of(of_noise.images, of_noise)
    folder = tmp_path / "elsewhere"
    one = runs_of(of_noise, data, folder)["true"]
    assert one.id == id
    begun = []

    def stop(trainings):
        (training,) = trainings
        begun.append(len(training.curve))
        while len(training.curve) < 3:
            training.begin_epoch()
            for number in range(training.steps):
                training.step(number)
            training.test()
            training.end_epoch()
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "train", stop)
        with pytest.raises(SystemExit):
            tasks.train_runs(data, [one])
        assert [file.name for file in one.folder.iterdir()] == ["checkpoint.pt"]
        with pytest.raises(SystemExit):
            tasks.train_runs(data, [one])
    assert begun == [0, 3]
    ((done, files),) = tasks.train_runs(data, [one])
    facts = json.loads((one.folder / "run.json").read_text())
    assert done == id and set(files) == {f"{id}/run.json", f"{id}/model.safetensors"}
    np.testing.assert_array_equal(facts["curve"]["loss"], whole.train_loss[0])
    np.testing.assert_array_equal(facts["curve"]["test_accuracy"], whole.test_accuracy[0])
    kept = made.results / f"randomization/noise/runs/{id}/model.safetensors"
    assert (one.folder / "model.safetensors").read_bytes() == kept.read_bytes()


def test_a_diverged_run_is_marked_and_the_others_stand(tmp_path):
    raw = experiment(tmp_path)
    raw["randomize"]["noise"]["runs"]["half"]["learning_rate"] = 1e30
    made = run(raw, *STAGES)
    rows, found = table(made), curves(made)
    assert [row["outcome"] for row in rows.values()] == ["finished", "diverged", "finished"]
    assert rows["half"]["train_loss"] == rows["half"]["train_accuracy"] == ""
    assert np.isnan(found.train_loss[1, -1]) and np.isfinite(found.train_loss[[0, 2]]).all()
    raw["networks"] = {
        "noisy": {"module": f"{tmp_path / 'small.py'}:small", "weights": "randomize:noise/half",
                  "preprocessing": {"per_image": True}, "layers": ["0"]}
    }  # fmt: skip
    with pytest.raises(MicrotomeError, match=r"run 'half' of 'noise' diverged and has no weights"):
        run(raw, *STAGES, "network")


def test_a_run_is_a_network_of_the_configuration(tmp_path):
    raw = experiment(tmp_path)
    raw["datasets"]["seen"] = raw["datasets"]["scenes"] | {"size": 16}
    raw["randomize"]["noise"]["crop"] = 16
    del raw["randomize"]["noise"]["runs"]["random"]["random_crop"]
    raw["randomize"]["noise"]["networks"]["small"]["arguments"] = {"units": 6}
    (tmp_path / "small.py").write_text(NETWORK.replace("units * 36", "units * 49"))
    network = {
        "module": f"{tmp_path / 'small.py'}:small", "arguments": {"units": 6}, "weights": "randomize:noise/true",
        "preprocessing": {"per_image": True}, "layers": ["1"], "datasets": ["scenes"],
    }  # fmt: skip
    raw["networks"] = {"meaning": network, "noise": network | {"weights": "randomize:noise/random"}}
    stages = (*STAGES, "concepts", "network", "extract", "dissect")
    made = run(raw, *stages)
    rows = table(made)
    model = json.loads((made.results / "networks/meaning/model.json").read_text())
    assert model["weights_sha256"] == model["run"]["weights_sha256"]
    assert model["accuracy"] == float(rows["true"]["test_accuracy"])
    # The network that is dissected recognises the test images as the run did: it sees them in the same way.
    logits = xr.open_zarr(made.results / "scenes/meaning/logits.zarr").logits
    label = pipeline.open_results(made.results)["scenes"].images["label"]
    tested = curves(made).test_image.values
    right = (logits[tested].values.argmax(1) == label[tested].values).mean()
    assert abs(right - model["accuracy"]) <= 0.05
    units = [len(pipeline.open_results(made.results)["scenes"][name].units) for name in raw["networks"]]
    assert units == [6, 6]
    # Another run's line concerns neither of them.
    before = {name: made.step("extract", "scenes", name).id for name in raw["networks"]}
    raw["randomize"]["noise"]["runs"]["half"]["share"] = 0.1
    made = run(raw, *stages)
    assert {name: made.step("extract", "scenes", name).id for name in raw["networks"]} == before
    assert trained(made) == 4


def test_the_page_of_the_report(tmp_path):
    from pipeline.report.experiment import Experiment
    from pipeline.stages.randomize import page
    from pipeline.stages.randomize.figures import over_share
    from pipeline.stages.randomize.found import read_randomization
    from pipeline.stages.report.site import render

    raw = experiment(tmp_path)
    raw["randomize"]["noise"]["runs"]["wild"] = {"network": "small", "learning_rate": 1e30}
    plan_made = run(raw, *STAGES)
    of_noise = shown(plan_made, "randomize", tmp_path / "report")
    (found,) = page.pages(of_noise)
    rows = table(plan_made)
    kinds = ("curves", "calibration", "time", "error")
    assert [figure.kind for figure in found.figures] == [f"randomization-{kind}" for kind in kinds]
    (panel,) = over_share(7.1, read_randomization(plan_made.results, "noise", of_noise.made[0].result), "time").axes
    assert [text.get_text() for text in panel.texts] == ["none in the epochs that runs had"]  # and no axes of nothing
    with (tmp_path / "report" / found.figures[3].files["csv"]).open(newline="") as file:
        errors = {row["run"]: float(row["test_error"]) for row in csv.DictReader(file)}
    assert errors == {name: pytest.approx(1 - float(rows[name]["test_accuracy"])) for name in ("true", "half")}
    assert any(
        each.startswith("0 of 2 runs on corrupted data fit all of 36 training images") for each in found.findings
    )
    assert "Diverged: wild." in found.findings
    with (tmp_path / "report" / found.figures[1].files["csv"]).open(newline="") as file:
        tested = [(row["run"], float(row["test_loss"]), float(row["test_ece"])) for row in csv.DictReader(file)]
    assert [run for run, _, _ in tested] == ["true"] * 3  # neither noise nor what diverged
    assert tested[-1][1:] == pytest.approx((float(rows["true"]["test_loss"]), float(rows["true"]["test_ece"])))
    html = render(of_noise, found, [found])
    assert html.count("<figure>") == 4 and "diverged in epoch" in html and "Paper" not in html
    assert "A two-layer ReLU network of 2n + d = 660 weights" in html and "n = 36 training images of d = 588" in html
    assert html.count('<th scope="row">true labels</th>') == html.count('<th scope="row">random labels</th>') == 1
    # Results that were made before have no such file.
    for name in ("expressivity.json", "seconds.json"):
        (plan_made.results / "randomization/noise" / name).unlink()
    for manifest in (plan_made.results / "randomization/noise/done").iterdir():
        manifest.unlink()
    (before,) = page.pages(of_noise)
    assert "two-layer ReLU" not in render(of_noise, before, [before])
    assert page.pages(Experiment(plan_made.results, tmp_path / "report", "None", ())) == []


def of_the_table(how, parameters, batch_norm=False):
    """A run of which only these facts are known."""
    return Run("x", Told.model_construct(how=how, parameters=parameters, batch_norm=batch_norm), {})


def test_the_paper_s_numbers_stand_beside_the_same_runs():
    how = {"corruption": "true_labels", "random_crop": True, "weight_decay": 5e-4, "seed": 0, "crop": 28}
    assert of_the_table(How(**how), 1_387_786).paper == (0.9990, 0.8122)
    assert of_the_table(How(**how), 1_387_787).paper is None
    assert of_the_table(How(**how, dropout=0.5), 1_387_786).paper is None
    assert of_the_table(How(**how | {"corruption": "gaussian"}), 1_387_786).paper is None
    assert len(TABLE_1) == 19


def test_the_full_table_s_configuration_is_the_paper_s():
    asked = run_experiment.load(Path("config/noise-cifar10.yaml")).randomize["zhang2017"]
    networks = {name: build(NetworkSpec.of(spec)) for name, spec in asked.networks.items()}
    beside = set()
    for name, one in asked.runs.items():
        network, how = networks[one.network], asked.hyperparameters(name)
        how = How(**how.written(), corruption=one.corruption, share=one.share, seed=one.seed, crop=asked.crop)
        parameters = sum(each.numel() for each in network.parameters())
        batch_norm = any(key.endswith("running_var") for key in network.state_dict())
        beside.add(of_the_table(how, parameters, batch_norm).paper)
        assert how.learning_rate == (0.1 if name.startswith("inception") else 0.01)
    assert beside == set(TABLE_1.values())


def test_a_network_that_is_written_down_gives_any_labels(tmp_path):
    """On the experiment's own images, against the network as the paper writes it and the lemma's matrix."""
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    folder = made.results / "randomization/noise"
    found = Expressivity.read(json.loads((folder / "expressivity.json").read_text()))
    data = pipeline.open_results(made.results)["scenes"].images
    store = curves(made)
    images = data["image"].values[store.image.values]
    labels, classes = store.true_label.values, 12
    built = expressivity.build(images, labels, classes, 14)
    assert built.found == found and set(built.seconds) == {"true labels", "random labels"}
    # Images that are equal count once.
    twice = expressivity.build(np.concatenate([images, images[:5]]), np.append(labels, labels[:5] + 1) % 12, 12, 14)
    assert twice.found.images == found.images
    inputs = images[:, :, 1:15, 1:15].reshape(len(images), -1) / 255.0
    assert len(np.unique(inputs, axis=0)) == len(inputs), "the theorem asks for different ones"
    assert (found.images, found.values, found.weights) == (36, 588, 2 * 36 + 588)
    random = corrupted(Sets(images, labels, images, labels), classes, "random_labels", None, 0).labels
    assert (random != labels).any() and [fit.labels for fit in found.fits] == ["true labels", "random labels"]
    for fit, own in zip(found.fits, (labels, random), strict=True):
        network = interpolate(inputs, own.astype(float))
        # One hidden unit after the other, in plain loops.
        for at, image in enumerate(inputs):
            x = float(image @ network.direction)
            value = sum(w * max(x - b, 0.0) for w, b in zip(network.weight, network.bias, strict=True))
            assert abs(value - own[at]) < 1e-6
        assert fit.largest_error < 1e-9 and fit.largest_error == np.abs(network(inputs) - own).max()
    x = np.sort(inputs @ network.direction)
    matrix = np.maximum(x[:, None] - network.bias[None], 0)
    eigenvalues = np.linalg.eigvals(matrix)
    assert (np.triu(matrix, 1) == 0).all() and np.abs(eigenvalues).min() == pytest.approx(found.smallest_eigenvalue)
    # No digest sees it, and the manifest names it: a file that is another is found.
    manifest = made.manifest(made.step("randomize", experiment="noise"))
    assert "expressivity.json" in manifest.files and "seconds.json" not in manifest.files
    assert manifest.digest == output(
        {name: each for name, each in manifest.files.items() if name != "expressivity.json"}
    )
    assert manifest.result.keys() == {"dataset", "runs", "images", "test_images"}


def test_images_that_differ_too_little_have_no_such_network(tmp_path):
    images = np.zeros((3, 3, 4, 4), np.uint8)
    images[1, 0, 0, 0], images[2, 0, 0, 0] = 1, 2
    assert expressivity.build(images, np.array([0, 1, 0]), 2, 4).found.images == 3
    assert expressivity.build(images, np.array([0, 1, 0]), 2, 2).found.images == 1, "their centres are equal"


def test_where_there_is_no_such_network_the_page_says_why(tmp_path, monkeypatch):
    def refuse(*_):
        raise ValueError("they differ too little")

    monkeypatch.setattr(tasks, "read", lambda data: Sets(*[np.zeros(1)] * 4))
    monkeypatch.setattr(tasks.expressivity, "build", refuse)
    data = SimpleNamespace(classes=2)
    assert set(tasks.express(data, 4, tmp_path)) == {"expressivity.json"}
    known, seconds = read_expressivity(tmp_path)
    assert known == Expressivity(refused="they differ too little") and seconds == {}
    found = SimpleNamespace(expressivity=known)
    assert page.express(found) == "No two-layer network of the theorem was written down: they differ too little."


def test_corruptions_of_a_run():
    draw = np.random.default_rng(0)
    true = Sets(
        draw.integers(0, 256, (30, 3, 6, 6), np.uint8), draw.integers(0, 5, 30),
        draw.integers(0, 256, (9, 3, 6, 6), np.uint8), draw.integers(0, 5, 9),
    )  # fmt: skip
    found = {name: corrupted(true, 5, name, None, 3) for name in get_args(Corruption) if name != "corrupted_labels"}
    for name, one in found.items():
        np.testing.assert_array_equal(one.test_labels, true.test_labels)
        same_images = name in ("true_labels", "random_labels")
        assert (one.images == true.images).all() == same_images
        assert (one.test_images == true.test_images).all() == same_images
        assert (one.labels == true.labels).all() == (name != "random_labels")
        again = corrupted(true, 5, name, None, 3)
        assert (again.images == one.images).all() and (again.labels == one.labels).all()
    moved = found["shuffled_pixels"]
    both = np.concatenate([true.images, true.test_images]).reshape(39, 3, 36)
    after = np.concatenate([moved.images, moved.test_images]).reshape(39, 3, 36)
    places = [int(np.flatnonzero((both == after[..., at : at + 1]).all((0, 1)))[0]) for at in range(36)]
    assert sorted(places) == list(range(36)), "one permutation for training and test images"
    few, many = (corrupted(true, 5, "corrupted_labels", share, 3).labels for share in (0.2, 1.0))
    np.testing.assert_array_equal(many, found["random_labels"].labels)
    assert (few != true.labels).sum() < (many != true.labels).sum()


def test_test_images_are_corrupted_as_training_images_and_are_others():
    draw = np.random.default_rng(1)
    same = draw.integers(0, 256, (9, 3, 12, 12), np.uint8)
    true = Sets(same, draw.integers(0, 5, 9), same, draw.integers(0, 5, 9))
    # Nothing drawn for a training image is drawn again for a test image: what is memorised helps with none of them.
    for name in ("random_pixels", "gaussian"):
        found = corrupted(true, 5, name, None, 3)
        assert (found.images == found.test_images).mean() < 0.1, name
    # The noise of both has the moments of the training images, whatever the test images are.
    dark = Sets(true.images, true.labels, same // 8, true.test_labels)
    noise, wanted = corrupted(dark, 5, "gaussian", None, 3), corrupted(true, 5, "gaussian", None, 3)
    np.testing.assert_array_equal(noise.images, wanted.images)
    np.testing.assert_array_equal(noise.test_images, wanted.test_images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "scene"}, r"randomize.noise: no data set 'scene'; nearest: scenes"),
        ({"runs": {"a": {"network": "smal"}}}, r"runs.a: no network 'smal'; nearest: small"),
        ({"runs": {"a": {"network": "small", "corruption": "random_label"}}}, r"noise.runs.a.corruption"),
        ({"runs": {"a": {"network": "small", "corruption": "corrupted_labels", "share": 1.2}}}, r"a.share: .*1.2"),
        ({"runs": {"a": {"network": "small", "corruption": "corrupted_labels", "share": -0.1}}}, r"a.share: .*-0.1"),
        ({"runs": {"a": {"network": "small", "corruption": "corrupted_labels"}}}, r"`share` go together"),
        ({"runs": {"a": {"network": "small", "share": 0.5}}}, r"`share` go together"),
        ({"runs": {"a": {"network": "small", "epoch": 2}}}, r"a.epoch: unknown key; nearest: epochs"),
        ({"runs": {}}, r"randomize.noise.runs"),
        ({"test": "train"}, r"split and test are both 'train'"),
        ({"networks": {"small": {"torchvision": "alexnet", "weights": "DEFAULT"}}}, r"leave out `weights`"),
        ({"networks": {"small": {"torchvision": "alexnet", "seed": 3}}}, r"leave out `seed`"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(experiment(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 5}, r"5 images of split 'train' and 12 classes: at least one image a class"),
        ({"crop": 17}, r"crop: 17 is larger than the images of 16 x 16"),
        ({"crop": 16}, r"runs.random: images of 16 x 16 leave no room for a random crop of 16"),
        ({"split": "trian"}, r"trian"),
    ],
)
def test_data_that_is_refused(tmp_path, change, message):
    with pytest.raises(MicrotomeError, match=message):
        planner.make(run_experiment.parse(experiment(tmp_path, **change)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "randomize:nose/true"}, r"has no experiment 'nose'; nearest: noise"),
        ({"weights": "randomize:noise/tru"}, r"has no run 'tru'; nearest: true"),
        ({"weights": "randomize:noise"}, r"randomize:<experiment>/<run>"),
        ({"arguments": {"units": 3}}, r"arguments is \{'units': 3\}, and that of randomize:noise/true is \{\}"),
        ({"preprocessing": {}}, r"whiten each image by itself: give `preprocessing: \{per_image: true\}`"),
    ],
)
def test_networks_of_runs_that_are_refused(tmp_path, change, message):
    raw = experiment(tmp_path)
    raw["networks"]["noisy"] = {
        "module": f"{tmp_path / 'small.py'}:small", "weights": "randomize:noise/true",
        "preprocessing": {"per_image": True},
    } | change  # fmt: skip
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(raw)


def test_one_class_is_refused(tmp_path):
    from experiments import write_image

    for at in range(6):
        write_image(tmp_path, f"{'train' if at < 4 else 'test'}/only/{at}", np.full((16, 16, 3), 40 * at, np.uint8))
    raw = experiment(tmp_path, test="test")
    raw["datasets"] = {"scenes": {"kind": "imagefolder", "root": str(tmp_path / "images"), "split": {"folders": True}}}
    raw["networks"]["tiny"]["datasets"] = []
    with pytest.raises(MicrotomeError, match=r"two classes or more, and data set 'scenes' has 1"):
        planner.make(run_experiment.parse(raw))


def test_networks_are_inspected_before_any_work(tmp_path):
    raw = experiment(tmp_path)
    raw["networks"]["tiny"]["datasets"] = []
    networks = raw["randomize"]["noise"]["networks"]
    networks["small"]["arguments"] = {"classes": 5}
    with pytest.raises(MicrotomeError, match=r"network 'small' of randomize.noise: it gives 5 logits.* 12 classes"):
        preflight.check(planner.make(run_experiment.parse(raw)))
    networks["small"] = {"torchvision": "resnet17"}
    with pytest.raises(MicrotomeError, match=r"randomize.noise: .*resnet17.*nearest: .*resnet18"):
        preflight.check(planner.make(run_experiment.parse(raw)))


def test_other_steps_keep_their_ids(tmp_path):
    raw = experiment(tmp_path)
    made = planner.make(run_experiment.parse(raw))
    del raw["randomize"]
    plain = planner.make(run_experiment.parse(raw))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < set(made.steps)
    assert made.step("randomize", experiment="noise").manifest.startswith("randomization/noise/done/randomize.")


def test_only_keeps_the_experiments_that_it_needs(tmp_path):
    raw = experiment(tmp_path)
    raw["networks"]["noisy"] = {
        "module": f"{tmp_path / 'small.py'}:small", "weights": "randomize:noise/true",
        "preprocessing": {"per_image": True},
    }  # fmt: skip
    assert list(run_experiment.parse(raw | {"only": "noisy"}).randomize) == ["noise"]
    assert not run_experiment.parse(raw | {"only": "tiny"}).randomize
    assert list(run_experiment.parse(raw | {"only": "scenes"}).randomize) == ["noise"]
    kept = run_experiment.parse(raw)
    assert run_experiment.parse(json.loads(kept.model_dump_json())) == kept
