"""Calibration of stored logits against the kernels, split by split; and what is made again."""

import csv
import hashlib
import shutil
import tracemalloc
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import xarray as xr
from experiments import job, labelled_images, lines, run, scenes, segmentation, tiny
from safetensors.numpy import load_file

from kernels.calibration.methods import NAMES, fit, judge
from kernels.calibration.reliability import softmax
from pipeline.errors import MicrotomeError
from pipeline.networks.layer import Inspection
from pipeline.plan import inspected as preflight
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.run import preflight as run_preflight
from pipeline.run.results import Network
from pipeline.stages.calibrate import page as page_of
from pipeline.stages.calibrate import settings, tasks
from pipeline.stages.calibrate.stage import STAGE, work_of
from pipeline.stages.calibrate.tasks import ERRORS, MEASURES, in_two, keys
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "concepts", "network", "extract", "calibrate")


def experiment(folder, classes=12, images=60, **how):
    raw = scenes(folder, networks={"tiny": tiny(folder, arguments={"classes": classes, "units": 6}, seed=3)})
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 0, "validation": images}}
    return raw | {"calibrate": {"splits": 3} | how}


def only_one_class(images, split):
    label = np.asarray(images.reader()["label"][:])
    return label == np.bincount(label[label >= 0]).argmax()


def contents(folder):
    """Digest of every file of the calibration."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "calibration" in path.as_posix().removeprefix(str(folder)) and path.suffix != ".ledger"
    }


def table(folder, name="calibration.csv"):
    with (folder / name).open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def made(tmp_path_factory, workers):
    folder = tmp_path_factory.mktemp("calibrate")
    return run(experiment(folder), *STAGES)


def test_methods_have_one_list():
    assert NAMES[1:] == get_args(settings.Calibration)
    assert tasks.chosen(None, 100) == list(NAMES[1:]) and tasks.chosen(["vector"], 999) == ["vector"]
    assert tasks.chosen(None, 101) == [name for name in NAMES[1:] if "matrix" not in name]


def test_every_number_is_that_of_the_kernels(made):
    folder = made.results / "scenes" / "tiny"
    images, logits = (
        xr.open_zarr(made.results / "scenes/images.zarr"),
        xr.open_zarr(folder / "logits.zarr").logits.values,
    )
    label = images.label.values
    found = xr.open_zarr(folder / "calibration.zarr")
    assert tuple(found.measure.values) == MEASURES and tuple(found.calibration.values) == NAMES
    for split in range(3):
        to_fit, to_judge = in_two(keys(images.image_id.values.tolist()), 30, split)
        assert sorted([*to_fit, *to_judge]) == list(range(60)) and len(to_fit) == 30
        for name in NAMES:
            sums, _, right = judge(fit(name, logits[to_fit], label[to_fit]), logits[to_judge], label[to_judge])
            stored = found.sel(split=split, calibration=name)
            assert stored["count"].values.tolist() == sums.count.tolist()
            score = dict(zip(MEASURES, stored.score.values.tolist(), strict=True))
            assert score["ece"] == sums.ece and score["nll"] == sums.nll / 30 and score["accuracy"] == right.mean()
            assert score["ece_low"] <= score["ece_high"] and 0 <= score["ece_null"] <= score["ece_null_high"]
            assert np.isnan(score["penalty"]) == (name != "matrix_odir")
            for error in ERRORS:
                band = [score[f"{error}_{end}"] for end in ("low", "high", "null", "null_high")]
                assert np.isfinite(band).all() and band[0] <= band[1] and band[2] <= band[3] + 1e-12, (error, name)
    temperature = found.score.sel(calibration="temperature")
    assert (
        temperature.sel(measure="accuracy") == found.score.sel(calibration="uncalibrated", measure="accuracy")
    ).all()
    whole = found.attrs["all"]
    probabilities = softmax(logits)
    assert whole["accuracy"] == pytest.approx((probabilities.argmax(1) == label).mean())
    assert whole["nll"] == pytest.approx(-np.log(probabilities[np.arange(60), label]).mean())
    assert int(found.all_count.sum()) == 60
    weights = load_file(made.results / "networks/tiny/model.safetensors")
    parameters = sum(array.size for array in weights.values())
    assert found.attrs["network"] == {
        "depth": 3, "width": 5.0, "parameters": parameters, "batch_norm": False, "weight_decay": None, "steps": None
    }  # fmt: skip


def test_tables_are_means_over_the_splits(made):
    folder = made.results / "scenes" / "tiny"
    found = xr.open_zarr(folder / "calibration.zarr").score
    rows = {row["method"]: row for row in table(folder)}
    assert list(rows) == list(NAMES)
    for name, row in rows.items():
        for measure in ("ece", "nll", "brier", "accuracy", "classwise_ece"):
            values = found.sel(calibration=name, measure=measure).values
            assert float(row[measure]) == pytest.approx(values.mean(), rel=1e-6)
        assert float(row["ece_2.5"]) <= float(row["ece"]) <= float(row["ece_97.5"])
        for ending in ("low", "high", "null", "null_high"):
            values = found.sel(calibration=name, measure=f"ece_{ending}").values
            assert float(row[f"ece_{ending}"]) == pytest.approx(values.mean(), rel=1e-6)
    assert float(rows["temperature"]["accuracy_change"]) == 0 and rows["temperature"]["ece_below_temperature"] == ""
    assert float(rows["temperature"]["temperature"]) > 0 and rows["histogram"]["temperature"] == ""
    bins = table(folder, "calibration-bins.csv")
    assert len(bins) == 15 * (1 + len(NAMES))
    assert sum(int(row["images"]) for row in bins if row["images_of"] == "all") == 60
    opened = Network(folder).calibration
    assert opened.attrs["fit"] == 30 and opened.sizes["split"] == 3


def test_the_split_of_an_image_does_not_depend_on_the_others():
    names = [f"image/{at}" for at in range(1000)]
    together = set(in_two(keys(names), 500, 3)[0])
    fewer = set(in_two(keys(names[:900]), 450, 3)[0])
    assert len(together & fewer) >= 0.93 * len(fewer)  # the border between the parts moves, no image is thrown anew
    other = set(in_two(keys(names), 500, 4)[0])
    assert 200 < len(together & other) < 300


def test_any_number_of_workers_gives_the_same_bytes(made, tmp_path, monkeypatch, two_workers):
    shutil.copytree(made.results, tmp_path / "results")
    again = planner.make(made.config.model_copy(update={"results": str(tmp_path / "results")}))
    calibration = job(again, "calibrate", "scenes", "tiny")
    removed = list(STAGE.made(calibration))
    assert len(removed) == 4 and all(path.exists() for path in removed)
    for path in removed:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.setenv(client.ADDRESS, two_workers)
    STAGE.run(calibration)
    assert contents(again.results / "scenes/tiny") == contents(made.results / "scenes/tiny")


def test_only_what_is_missing_is_made_again(tmp_path):
    raw = experiment(tmp_path, methods=["temperature", "isotonic"])
    made = run(raw, *STAGES)
    folder = made.results / "scenes" / "tiny"
    ledger, before = folder / "calibration.ledger", contents(folder)
    assert len(lines(ledger)) == 3
    kept = ledger.read_text().splitlines()[:2]
    ledger.write_text("\n".join(kept) + "\n")
    step = made.step("calibrate", "scenes", "tiny")
    (made.results / step.manifest).unlink()
    run(raw, "calibrate")
    assert len(lines(ledger)) == 3 and contents(folder) == before
    # More splits leave those that are there, and another setting none.
    raw["calibrate"]["splits"] = 5
    run(raw, "calibrate")
    assert [int(line["shard"]) for line in lines(ledger)][3:] == [3, 4]
    raw["calibrate"]["bins"] = 10
    run(raw, "calibrate")
    assert len(lines(ledger)) == 10 and len(table(folder, "calibration-bins.csv")) == 10 * 4
    raw["calibrate"] = {"splits": 2, "bins": 10, "methods": ["temperature", "isotonic"]}
    run(raw, "calibrate")
    assert len(lines(ledger)) == 10 and {row["splits"] for row in table(folder)} == {"2"}


def test_a_damaged_chunk_of_logits_is_refused_by_name(tmp_path):
    raw = experiment(tmp_path, methods=["temperature"])
    made = run(raw, *STAGES[:-1])
    chunk = made.results / "scenes/tiny/logits.zarr/logits/c/1/0"
    chunk.write_bytes(bytes(reversed(chunk.read_bytes())))
    with pytest.raises(MicrotomeError, match=r"logits\.zarr: chunk logits/c/"):
        run(raw, "calibrate")


class Stored:
    """Logits as tasks name them, of these values."""

    path = "logits.zarr"

    def __init__(self, values):
        self.values = values

    def open(self):
        return {"logits": self.values}


def scores_of(values, label):
    rows = np.arange(len(label))
    key = keys(rows.astype(str).tolist())
    return tasks.Scores(str(id(values)), Stored(values), {0: len(label)}, int(label.max()) + 1, rows, label, key)


@pytest.mark.parametrize("classes", [2, 4])
def test_probabilities_of_a_network_are_not_put_through_a_softmax(classes):
    generator = np.random.default_rng(classes)
    label = np.arange(120) % classes
    logits = generator.normal(size=(120, classes)) + 3 * (label[:, None] == np.arange(classes))
    given = softmax(logits).astype(np.float32)
    said, remarks = tasks.predictions_of(scores_of(given, label))
    assert (said.given == given).all() and "their logarithms are taken as logits" in remarks[0]
    whole = tasks.measure(scores_of(given, label), 0, slice(0, 120), 15)[1][0].measures(10, 0)
    plain = tasks.measure(scores_of(logits.astype(np.float32), label), 0, slice(0, 120), 15)[1][0].measures(10, 0)
    for name in ("ece", "nll", "brier", "accuracy", "classwise_ece"):
        assert whole[name] == pytest.approx(plain[name], abs=1e-5)
    if classes == 2:  # a network with one output
        for one, remark in (
            (given[:, 1:], "probabilities of class 1"),
            (logits[:, 1:] - logits[:, :1], "logits of class 1"),
        ):
            said, remarks = tasks.predictions_of(scores_of(one.astype(np.float32), label))
            assert remark in remarks[0]
            np.testing.assert_allclose(said.probabilities, given, atol=1e-6)
    with pytest.raises(MicrotomeError, match=r"logits\.zarr: row 0: the rows sum to 100"):
        tasks.predictions_of(scores_of(100 * given, label))


def test_what_is_refused(tmp_path, monkeypatch):
    with pytest.raises(MicrotomeError, match=r"calibrate: no network 'tine'; nearest: tiny"):
        run_experiment.parse(experiment(tmp_path, networks=["tine"]))
    with pytest.raises(MicrotomeError, match="unknown key"):
        run_experiment.parse(experiment(tmp_path, method=["vector"]))
    for classes, said in ((5, "it gives 5 logits"), (None, "it has no head")):
        answer = {"result": Inspection("tiny", [], {}, 0, 0, (), classes).json()}
        monkeypatch.setattr(preflight, "in_own_process", lambda *_, answer=answer: [answer])
        made = planner.make(run_experiment.parse(experiment(tmp_path) | {"results": str(tmp_path / str(classes))}))
        with pytest.raises(MicrotomeError, match=f"{said}, and the images have 12 classes"):
            run_preflight.check(made)
    with pytest.raises(MicrotomeError, match="'scenes': 10 of its 20 images are to be fitted on, and there are 12"):
        planner.make(run_experiment.parse(experiment(tmp_path, images=20)))
    photos = tmp_path / "photos"
    photos.mkdir()
    labelled_images(photos, ["a", "b"])
    with pytest.raises(MicrotomeError, match="the images of data set 'photos' have no classes"):
        planner.make(run_experiment.parse(segmentation(photos) | {"calibrate": {}}))


def test_memory_is_asked_for_before_anything_is_fitted(tmp_path):
    raw = experiment(tmp_path) | {"cluster": {"workers": 1, "memory": "629.15 MB"}}
    calm = {key: value for key, value in raw.items() if key != "cluster"}
    run(calm, *STAGES[:-1])
    with pytest.raises(MicrotomeError, match=r"`calibrate\.methods`"):
        run(raw, "calibrate")
    assert tasks.memory_need(50_000, 1000, ["matrix"]) < 2e9


def test_a_table_takes_no_more_memory_than_was_asked_for():
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((6000, 50), dtype=np.float32)
    label = generator.integers(0, 50, len(logits))
    methods = ["uncalibrated", "histogram", "isotonic", "temperature"]
    tracemalloc.start()
    try:
        tasks.evaluate(logits[::2], label[::2], logits[1::2], label[1::2], methods, 15, None, seed=0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    need = tasks.memory_need(len(logits), 50, methods)
    assert peak < need - logits.nbytes, (
        peak,
        need,
    )  # the logits themselves are not traced


def test_images_of_one_class_are_refused(tmp_path):
    raw = experiment(tmp_path, methods=["temperature"])
    made = run(raw, *STAGES[:-1])
    calibration = job(made, "calibrate", "scenes", "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(calibration.identity, "classes", 2)
        patch.setattr("pipeline.data.images.Images.counted", only_one_class)
        with pytest.raises(MicrotomeError, match=r"all .* images with a class .* have the class"):
            work_of(calibration)


def test_the_floor_of_the_nll_is_named_in_the_report():
    whole = {"accuracy": 0.5, "mean_confidence": 0.6, "ece": 0.1, "ece_null_high": 0.05}
    for floored, said in ((0.02, True), (0.0, False)):
        found = SimpleNamespace(whole=whole | {"floored": floored}, rows={"uncalibrated": whole})
        found.facts = SimpleNamespace(images=100)
        text = page_of.finding(page_of.Section(found, "cnn", []))
        assert ("2.00 % of them has a probability below 1e-12" in text.replace("\u00a0", " ")) == said
