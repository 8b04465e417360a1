"""Ablation of stored layers against whole forward passes in float64, image by image; and what is made again."""

import csv
import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from experiments import VIT, labelled_images, lines, run, scenes, segmentation, tiny

import pipeline
from kernels.ablation import KINDS, random_sets
from pipeline.data.listing import derangement
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.graph.tail import unit_dim
from pipeline.networks.graph.trace import forward_with
from pipeline.networks.layers import resolve, to_maps
from pipeline.plan import inspected
from pipeline.run import experiment as run_experiment
from pipeline.run import forecast, planner, preflight, results
from pipeline.stages.ablate.results import group_of, open_groups
from pipeline.storage.identity import digest
from pipeline.storage.manifest import within
from pipeline.storage.store import create, write_whole
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "concepts", "network", "extract", "dissect", "ablate")
LAYER = "encoder.layers.encoder_layer_1"


def experiment(folder, network="tiny", **how):
    """Scenes of twelve classes, and a random network whose predictions vary."""
    if network == "tiny":
        spec = tiny(folder, arguments={"classes": 12, "units": 6}, seed=3)
    else:
        (folder / "vit.py").write_text(VIT)
        spec = {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "layers": [LAYER], "seed": 1}
    spec["numerics"] = {"micro_batch": 4}
    raw = scenes(folder, networks={network: spec | {"ablate": {"sizes": [1, 2, 4], "draws": 3} | how}})
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 20, "validation": 20}}
    return raw


def contents(folder):
    """Digest of every file of a network that holds results."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".ledger" and not {"done", "logs"} & set(path.parts)
    }


def results_of(made, network="tiny", layer=None):
    folder = made.results / "scenes" / network
    layer = layer or xr.open_zarr(folder / "ablation.zarr").attrs["layers"][-1]
    return xr.open_zarr(folder / "ablation.zarr", group=layer), folder


class Truth:
    """The plain way: whole forwards in float64 in which the stored values of the layer, with some replaced, go on."""

    def __init__(self, made, network, layer, replace="zero"):
        images = zarr.open_group(made.results / "scenes" / "images.zarr", mode="r", use_consolidated=False)
        self.split, self.label, self.name = images["split"][:], images["label"][:], layer
        self.ids, self.shard = images["image_id"][:], np.arange(len(self.label)) // 8
        spec = made.networks[network]
        self.network = load(spec, made.results / "networks" / network / "model.safetensors")
        self.pixels = normalise(torch.from_numpy(images["image"][:]), spec)
        (self.info,) = resolve(self.network, [layer], tuple(self.pixels.shape[1:]))
        seen = []
        with torch.no_grad():
            forward_with(self.network, layer, self.pixels, lambda value: seen.append(value.clone()) or value)
        self.output = seen[0].half().double()  # as stored, at scale 1
        self.other = {"zero": self.output * 0, "mean": self.mean(), "shuffled": self.shuffled()}[replace]
        self.network.double()

    def mean(self):
        maps, special = to_maps(self.output[torch.from_numpy(self.split == "train")], self.info)
        value = maps.mean((0, 2, 3))
        if special is None:
            return value.view(1, -1, 1, 1).expand_as(self.output)
        grid = value.expand(self.info.shape[1] * self.info.shape[2], -1)
        return torch.cat([special.mean(0), grid]).expand_as(self.output)

    def shuffled(self):
        other = self.output.clone()
        for split in ("train", "validation"):
            for shard in set(self.shard):
                rows = np.flatnonzero((self.split == split) & (self.shard == shard))
                if len(rows):
                    other[rows] = self.output[rows[derangement(self.ids[rows])]]
        return other

    def logits(self, units):
        value = self.output.clone()
        index = (slice(None),) * unit_dim(self.info) + (list(units),)
        value[index] = self.other[index]
        with torch.no_grad():
            return forward_with(self.network, self.name, self.pixels.double(), lambda _: value.clone()).numpy()

    def scores(self, logits, split, c):
        """(true positives, predicted, images) of a class, one image at a time."""
        rows = [i for i in range(len(self.label)) if self.split[i] == split]
        said = logits.argmax(1)
        return (
            sum(1 for i in rows if self.label[i] == c and said[i] == c),
            sum(1 for i in rows if said[i] == c),
            sum(1 for i in rows if self.label[i] == c),
        )

    def balanced(self, logits, split, c):
        positives, predicted, images = self.scores(logits, split, c)
        negatives = int((self.split == split).sum()) - images
        if not images or not negatives:
            return np.nan
        return (positives / images + (negatives - (predicted - positives)) / negatives) / 2


@pytest.mark.parametrize(
    ("network", "replace"),
    [("tiny", "zero"), ("tiny", "shuffled"), ("vit", "zero"), ("vit", "mean")],
)
def test_losses_are_those_of_whole_forwards(tmp_path, network, replace):
    made = run(experiment(tmp_path, network, replace=replace), *STAGES)
    layer = "b" if network == "tiny" else LAYER
    found, folder = results_of(made, network, layer)
    truth = Truth(made, network, layer, replace)
    whole = truth.logits([])
    units, classes = found.sizes["unit"], found.sizes["class"]
    without = [truth.logits([unit]) for unit in range(units)]
    assert any((each.argmax(1) != whole.argmax(1)).any() for each in without)
    for s, split in enumerate(("train", "validation")):
        assert found.split.values[s] == split
        rows = truth.split == split
        for u, logits in enumerate(without):
            counts = [truth.scores(logits, split, c) for c in range(classes)]
            assert found.true_positives.values[s, u].tolist() == [each[0] for each in counts]
            assert found.predicted.values[s, u].tolist() == [each[1] for each in counts]
            assert found.images.values[s].tolist() == [each[2] for each in counts]
            loss = [truth.balanced(whole, split, c) - truth.balanced(logits, split, c) for c in range(classes)]
            np.testing.assert_allclose(found.balanced_accuracy_loss.values[s, u], loss, atol=1e-12)
            right = [(each.argmax(1) == truth.label)[rows].mean() for each in (whole, logits)]
            assert found.accuracy_loss.values[s, u] == pytest.approx(right[0] - right[1], abs=1e-12)
            five = [
                (np.argsort(-each, axis=1)[:, :5] == truth.label[:, None]).any(1)[rows].mean()
                for each in (whole, logits)
            ]
            assert found.top5_accuracy_loss.values[s, u] == pytest.approx(five[0] - five[1], abs=1e-12)
    assert found.true_positives.dtype == np.int64
    assert found.attrs["predictions_changed"] == 0 and found.attrs["logits_difference"] < 0.02
    # Sets: each class by its own ranking, and random ones.
    loss = found.balanced_accuracy_loss.sel(split="train").values
    sizes = found["size"].values.tolist()
    assert sizes == [1, 2, 4]
    for c in range(0, classes, 5):
        if np.isnan(loss[:, c]).any():
            continue
        order = sorted(range(units), key=lambda u, c=c: (-loss[u, c], u))
        assert found.order.values[c].tolist() == order
        for k, chosen in enumerate((lambda n: order[:n], lambda n: order[n:], lambda n: order[units - n :])):  # noqa: B023
            for i, size in enumerate(sizes):
                logits = truth.logits(chosen(size))
                positives, predicted, _ = truth.scores(logits, "validation", c)
                assert found.set_true_positives.values[k, i, c] == positives, KINDS[k]
                assert found.set_predicted.values[k, i, c] == predicted
                wanted = truth.balanced(whole, "validation", c) - truth.balanced(logits, "validation", c)
                np.testing.assert_allclose(found.set_loss.values[k, i, c], wanted, atol=1e-12)
    seed = int(digest(["random sets", layer_id(made, network, layer)]), 16) % 2**63
    sets = random_sets(units, sizes, 3, seed)
    for d, kind, i in ((0, 0, 1), (2, 1, 0), (1, 0, 2)):
        logits = truth.logits(np.flatnonzero(sets[d, kind, i]))
        counts = [truth.scores(logits, "validation", c) for c in range(classes)]
        assert found.random_true_positives.values[d, kind, i].tolist() == [each[0] for each in counts]
        assert found.random_predicted.values[d, kind, i].tolist() == [each[1] for each in counts]
    check_tables(found, folder, layer)


def layer_id(made, network, layer):
    return json.loads((made.results / "scenes" / network / "layers.json").read_text())[layer]["id"]


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_tables(found, folder, layer):
    labels = {int(row["unit"]): row for row in table(folder / "units.csv") if row["layer"] == layer}
    rows = [row for row in table(folder / "ablation.csv") if row["layer"] == layer]
    names = found["class"].values.tolist()
    first = next(row for row in rows if row["class"] == names[2])
    unit = int(found.order.values[2, 0])
    assert (first["place"], first["unit"], first["concept"]) == ("1", str(unit), labels[unit]["concept"])
    assert first["iou"] == labels[unit]["iou"]
    for column, split in (("loss_rank", "train"), ("loss_judge", "validation")):
        value = float(found.balanced_accuracy_loss.sel(split=split)[unit, 2])
        assert float(first[column] or "nan") == pytest.approx(value, rel=1e-6, abs=1e-12, nan_ok=True)
    sets = table(folder / "ablation-sets.csv")
    assert len(sets) == len(names) * len(KINDS) * found.sizes["size"]
    random = found.random_loss.sel(random_kind="keep", size=2).values[:, 2]
    keep = next(r for r in sets if (r["class"], r["kind"], r["size"]) == (names[2], "keep_most", "2"))
    got = [float(keep[key]) for key in ("random_loss", "random_loss_low", "random_loss_high")]
    np.testing.assert_allclose(got, [random.mean(), random.min(), random.max()], rtol=1e-6, atol=1e-9)
    units = table(folder / "ablation-units.csv")
    assert [int(row["classes_served"]) for row in units] == found.classes_served.values.tolist()


def test_every_name_of_a_layer_has_a_group_that_opens(tmp_path):
    names = [
        "conv1",
        "branch/3x3 reduce",
        "branch/1x1",
        "a b",
        "é" * 40,
        "x" * 280,
        "y/" * 150,
        "a//b",
        "__init",
        "%2F/",
    ]
    store, files = tmp_path / "ablation.zarr", {}
    create(store, {}, {})
    for at, name in enumerate(names):
        group = group_of(name)
        files |= open_groups(store, [name])
        files |= within(f"{store.name}/{group}", write_whole(store / group, {"x": (("unit",), np.array([at]))}, {}))
    groups = [group_of(name) for name in names]
    create(store, {}, {"layers": names, "groups": dict(zip(names, groups, strict=True))})
    assert len(set(groups)) == len(names) and groups[:5] == names[:5]
    for at, group in enumerate(groups):
        assert int(xr.open_zarr(store, group=group).x[0]) == at
    written = {path.relative_to(tmp_path).as_posix() for path in store.rglob("*") if path.is_file()}
    assert set(files) | {"ablation.zarr/zarr.json"} == written
    opened = results.Network(tmp_path).ablation
    assert [int(opened[name].x[0]) for name in names] == list(range(len(names)))


def test_the_same_bits_for_any_workers_and_after_a_cut(tmp_path, monkeypatch, two_workers):
    raw = experiment(tmp_path, layers=["a", "b"])
    made = run(raw, *STAGES)
    folder = made.results / "scenes" / "tiny"
    before = contents(folder)
    assert any("ablation.zarr" in name for name in before) and any("-sets.zarr" in name for name in before)

    # Cut short: the manifest was never written, half of the ledger is gone with its last line torn, and one chunk.
    (folder / made.step("ablate", "scenes", "tiny").manifest.split("/", 2)[2]).unlink()
    shutil.rmtree(folder / "ablation.zarr")
    ledgers = sorted((folder / "ablation-predictions").glob("*.ledger"))
    assert len(ledgers) == 4
    shards = {}
    for ledger in ledgers:
        whole = ledger.read_bytes().splitlines(keepends=True)
        shards[ledger] = len(whole)
        ledger.write_bytes(b"".join(whole[:-2]) + whole[-1][: len(whole[-1]) // 2])
    lost = next((folder / "ablation-predictions").glob("*-sets.zarr/prediction/c/*/0"))
    lost.unlink()
    run(raw, *STAGES)
    assert contents(folder) == before
    for ledger, count in shards.items():
        made_again = 2 + (ledger.stem == lost.parents[3].stem)
        good = [line for line in ledger.read_bytes().splitlines() if line.rpartition(b"\t")[2].isdigit()]
        assert len(good) == count - 2 + made_again

    # Two workers, from nothing.
    shutil.rmtree(folder / "ablation-predictions")
    (folder / made.step("ablate", "scenes", "tiny").manifest.split("/", 2)[2]).unlink()
    monkeypatch.setenv(client.ADDRESS, two_workers)
    run(raw, *STAGES)
    assert contents(folder) == before


def test_stored_shards_and_computed_ones_give_the_same(tmp_path):
    """Training images are not stored by default; where they are, it makes no difference."""
    raw = experiment(tmp_path, rank="train", judge="validation")
    plain = run(raw, *STAGES)
    stored = raw | {"results": str(tmp_path / "other")}
    stored["datasets"] = {"scenes": raw["datasets"]["scenes"] | {"dissect": {"split": "train"}}}
    other = run(stored, *STAGES)
    a, b = (results_of(each)[0] for each in (plain, other))
    for name in ("true_positives", "predicted", "in_top5", "set_predicted", "random_predicted"):
        np.testing.assert_array_equal(a[name].values, b[name].values)
    assert sorted(plain.manifest(plain.step("extract", "scenes", "tiny")).result["shards"]) != sorted(
        other.manifest(other.step("extract", "scenes", "tiny")).result["shards"]
    )


def test_only_what_changed_is_made_again(tmp_path):
    raw = experiment(tmp_path)
    made = run(raw, *STAGES)
    folder = made.results / "scenes" / "tiny"

    def ledgers():
        return {path.name: len(lines(path)) for path in (folder / "ablation-predictions").glob("*.ledger")}

    units = f"{layer_id(made, 'tiny', 'b')}.ledger"
    before = ledgers()
    assert before[units] == 5  # 40 images in shards of 8
    # Ablation is another job: nothing before it has another id.
    without = experiment(tmp_path)
    del without["networks"]["tiny"]["ablate"]
    known = set(made.steps)
    plain = planner.make(run_experiment.parse(without))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < known
    # More random draws: sets alone. The units of all shards stay.
    run(experiment(tmp_path, draws=5), *STAGES)
    assert ledgers()[units] == before[units]
    assert results_of(made)[0].sizes["draw"] == 5
    # Fewer images to rank with.
    raw["networks"]["tiny"]["ablate"] = {"images": 4}
    bound = run(raw, *STAGES)
    found, _ = results_of(bound)
    assert 4 <= found.attrs["counted"]["train"] < 20 and found.attrs["counted"]["validation"] < 20


def test_one_split_for_both_and_small_layers(tmp_path):
    made = run(experiment(tmp_path, rank="validation", sizes=[64]), *STAGES)
    found, folder = results_of(made)
    assert found.split.values.tolist() == ["validation"]
    assert "set_loss" not in found and not table(folder / "ablation-sets.csv")
    first = table(folder / "ablation.csv")[0]
    assert first["loss_rank"] == first["loss_judge"]
    made = run(experiment(tmp_path, draws=0), *STAGES)
    found, folder = results_of(made)
    assert "random_loss" not in found and "set_loss" in found
    assert {row["random_loss"] for row in table(folder / "ablation-sets.csv")} == {""}


def labelled(folder, label, split, classes):
    """Segmented photos with classes and splits from tables."""
    names = [f"n/{k:02}" for k in range(len(label))]
    labelled_images(folder, names)
    (folder / "labels.csv").write_text(
        "image,label\n" + "".join(f"{n}.png,{c}\n" for n, c in zip(names, label, strict=True))
    )
    (folder / "splits.csv").write_text(
        "image,split\n" + "".join(f"{n}.png,{s}\n" for n, s in zip(names, split, strict=True))
    )
    raw = segmentation(folder, labels=str(folder / "labels.csv"), split={"csv": str(folder / "splits.csv")})
    raw["networks"] = {"tiny": tiny(folder, arguments={"classes": classes}, seed=33, ablate={"sizes": [1]})}
    return raw


def test_a_class_without_images_is_nan_with_a_note(tmp_path):
    label = ["x", "y", "x", "y", "z", "x", "y", "z"]
    split = ["train", "train", "train", "train", *["validation"] * 4]
    raw = labelled(tmp_path, label, split, 3)
    made = run(raw, *STAGES, "report")
    folder = made.results / "photos" / "tiny"
    (found,) = pipeline.open_results(made.results)["photos"]["tiny"].ablation.values()
    assert found["class"].values.tolist() == ["x", "y", "z"]
    assert np.isnan(found.balanced_accuracy_loss.sel({"split": "train", "class": "z"})).all()
    assert not np.isnan(found.balanced_accuracy_loss.sel(split="validation")).any()
    assert (found.order.sel({"class": "z"}) == -1).all()
    assert np.isnan(found.set_loss.sel({"class": "z"})).all()
    assert not np.isnan(found.set_loss.sel({"class": "x"})).any()
    assert found.attrs["notes"] == ["class 'z' has no images in split 'train': its losses there are not defined"]
    assert {row["class"] for row in table(folder / "ablation.csv")} == {"x", "y"}
    (facts,) = made.manifest(made.step("ablate", "photos", "tiny")).result["layers"]
    assert facts["notes"] == found.attrs["notes"]
    check_page(made.results / "report" / "mini", found, folder)


def check_page(report, found, folder):
    """The report shows the note, and the table of a class has its units with the losses of the CSV."""
    page = (report / "ablation.html").read_text()
    assert "class &#39;z&#39; has no images in split &#39;train&#39;" in page
    rows = [r for r in table(folder / "ablation.csv") if r["class"] == "x" and float(r["loss_rank"]) > 0][:4]
    assert rows
    shown = table(report / "tables" / "ablation-photos-tiny-01.csv")
    assert [r["unit"] for r in shown if r["class"] == "x"] == [r["unit"] for r in rows]
    for row in rows:
        assert f'/{row["unit"]}">{row["unit"]}</a>' in page
    assert page.count("<figure>") == sum(1 for _ in (report / "figures").glob("ablation-*-01.svg"))
    assert "of 3 classes" in (report / "index.html").read_text()


def refused(raw):
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(raw))
    return str(error.value)


def test_what_the_plan_refuses(tmp_path):
    labelled_images(tmp_path, ["a", "b"])
    unlabelled = segmentation(tmp_path)
    unlabelled["networks"]["tiny"]["ablate"] = {}
    assert "the images of data set 'photos' have no classes" in refused(unlabelled)
    said = refused(experiment(tmp_path, rank="trian"))
    assert "ablate.rank: data set 'scenes' has no split 'trian'; it has train" in said and "nearest: train" in said
    assert "ablate.judge: data set 'scenes' has no split 'test'" in refused(experiment(tmp_path, judge="test"))
    raw = experiment(tmp_path)
    assert "nearest: ablate" in refused(raw | {"networks": {"tiny": raw["networks"]["tiny"] | {"ablat": {}}}})
    assert "no data set 'scene'; nearest: scenes" in refused(experiment(tmp_path, datasets=["scene"]))


def test_what_is_seen_before_any_work(tmp_path):
    """One process inspects all networks; what cannot be ablated is refused there, and the cost is known."""
    raw = experiment(tmp_path)
    wrong = raw["networks"]["tiny"] | {"ablate": {"layers": ["bb"]}}
    with pytest.raises(MicrotomeError, match=r"network 'wrong' on 'scenes': ablate.layers: 'bb' is not among"):
        preflight.check(planner.make(run_experiment.parse(raw | {"networks": raw["networks"] | {"wrong": wrong}})))
    said = preflight.sizes(planner.make(run_experiment.parse(raw)))
    assert "tiny on scenes: 6 units of b removed from all of 2 splits, 2.4e-05 MFLOP for each pair" in said


def test_how_long_it_takes_is_said_before_and_images_are_proposed(tmp_path, monkeypatch, in_process):
    raw = experiment(tmp_path)

    def planned(speed, **changes):
        raw["networks"]["tiny"]["ablate"] |= changes
        made = planner.make(run_experiment.parse(raw))
        preflight.check(made)
        monkeypatch.setattr(inspected, "speed", lambda job: speed)
        monkeypatch.setattr("pipeline.workers.memory.workers", lambda cluster: 2)
        (seconds,) = [each.cost.seconds for each in forecast.forecast(made) if each.job.stage.name == "ablate"]
        return [line for line in preflight.sizes(made) if "ablation" in line or "removed" in line], seconds

    (line,), seconds = planned({})
    assert line.endswith("MFLOP for each pair") and seconds is None
    # 24 operations and 12 logits a pair; 6 units of 40 images; 3 sizes of 3 kinds of 12 classes and 2 of 3 draws
    one, units, sets = 24 / (10 * 4.8) + 12 * 11e-9, 6 * 40, 3 * (36 + 6) * 20
    (line,), seconds = planned({"images_per_second": 10, "flops": 4.8, "images": 1})
    assert seconds == pytest.approx(one * (units + sets), rel=1e-6)
    assert line.endswith(
        f", up to {one * units / 2 / 60:.1f} min; 126 sets of units, {one * sets / 2 / 60:.1f} min or more"
    )
    (_, more), seconds = planned({"images_per_second": 1, "flops": 4.8, "images": 1})
    assert more == (
        f"tiny on scenes: the ablation takes about {seconds / 2 / 3600:.1f} h on 2 workers; "
        f"`ablate: {{images: {int(20 * 7200 / seconds)}}}` takes about an hour"
    )
    images = int(20 * 7200 / seconds)
    _, fewer = planned({"images_per_second": 1, "flops": 4.8, "images": 1}, images=images)
    assert fewer == pytest.approx(seconds * images / 20) and fewer / 2 <= 3600


def test_no_step_for_data_sets_that_are_not_named(tmp_path):
    raw = experiment(tmp_path)
    raw["datasets"]["more"] = raw["datasets"]["scenes"] | {"seed": 5}
    raw["networks"]["tiny"]["ablate"]["datasets"] = ["more"]
    made = planner.make(run_experiment.parse(raw))
    assert [(step.dataset, step.network) for step in made.of_stage("ablate")] == [("more", "tiny")]
    (report,) = made.of_stage("report")
    assert made.step("ablate", "more", "tiny").manifest in report.parents


def test_too_little_memory_is_refused_before_any_task(tmp_path):
    raw = experiment(tmp_path)
    run(raw, *STAGES[:-1])
    with pytest.raises(
        MicrotomeError, match=r"ablate scenes tiny: b needs about .* GB per worker.*lower `shard_images`"
    ):
        run(raw | {"cluster": {"memory": "629.15 MB"}}, "ablate")
    assert not (tmp_path / "results/scenes/tiny/ablation-predictions").exists()


SHARES = """
from collections import OrderedDict

from torch import nn


class Shares(nn.Module):
    def forward(self, x):
        return x / x[:, :1]


def shares(classes=12):
    a = nn.Sequential(nn.Conv2d(3, 2, 3, 4, padding=1), nn.Sigmoid())
    rest = OrderedDict(shares=Shares(), pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), head=nn.Linear(2, classes))
    return nn.Sequential(OrderedDict(a=a, **rest))
"""


def test_logits_that_are_not_finite_without_units_are_refused(tmp_path):
    """Without the unit that divides the others, logits are NaN, of which an argmax would be the first."""
    (tmp_path / "shares.py").write_text(SHARES)
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 8, "validation": 8}}
    described = {"module": f"{tmp_path / 'shares.py'}:shares", "weights": "random", "layers": ["a"]}
    raw["networks"] = {"shares": described | {"ablate": {"sizes": [1, 2], "draws": 2}}}
    message = r"layer 'logits without unit 0 of a': class 0: its output for image '.*' of data set 'scenes' is not"
    with pytest.raises(MicrotomeError, match=message):
        run(raw, *STAGES)
