"""The stage of linear probes against plain forwards and least squares; what is made again; and what is refused."""

import csv
import hashlib
import json
import math
import os
import shutil

import numpy as np
import pytest
import torch
import xarray as xr
import zarr
from experiments import VIT, copied, job, labelled_images, lines, run, scenes, segmentation, shown, tiny, write_image

from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.forward import normalise
from pipeline.networks.layers import Recorder, resolve, to_maps
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.extract.results import Extracted
from pipeline.stages.probes import tasks
from pipeline.stages.probes.division import PARTS, divide, picks, ranks
from pipeline.stages.probes.stage import STAGE, layers_of
from pipeline.storage.store import StoreRef
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "extract", "probes")
FILLED = ["1", "2", "full"]  # of the shots asked for, those for which every class has images
BLOCKS = [f"encoder.layers.encoder_layer_{block}" for block in range(2)]
PENALTIES = [1e-4, 1e-2, 1.0]


def experiment(folder, **how):
    """Scenes, a small CNN and a small ViT, probed."""
    (folder / "vit.py").write_text(VIT)
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"concepts": ["truth"], "images": {"train": 150, "validation": 40}}
    vit = {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "layers": BLOCKS, "seed": 1}
    raw["networks"] = {
        "cnn": tiny(folder, arguments={"classes": 12, "units": 6}, seed=3, layers=["a", "b", "pool"]),
        "vit": vit | {"numerics": {"micro_batch": 4}},
    }
    raw["probes"] = {"draws": 4, "shots": [1, 2, 30], "penalties": PENALTIES} | how
    return raw


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(experiment(tmp_path_factory.mktemp("probes")), *STAGES)


def opened(made, network, dataset="scenes"):
    return xr.open_zarr(made.results / dataset / network / "probes.zarr")


def features_of(made, network, name, kind, positions):
    """[(image, unit) float64] of all images, from a plain forward."""
    images = zarr.open_group(made.results / "scenes" / "images.zarr", mode="r", use_consolidated=False)
    spec = made.networks[network]
    model = load(spec, made.results / "networks" / network / "model.safetensors")
    pixels = normalise(torch.from_numpy(images["image"][:]), spec)
    (info,) = resolve(model, [name], tuple(pixels.shape[1:]))
    with Recorder(model, [name]) as record:
        maps, special = to_maps(record(pixels)[1][name], info)
    if kind == "class_token":
        return [special[:, 0].double().numpy()]
    if kind == "pooled":
        return [maps.double().mean((2, 3)).numpy()]
    return [maps[:, :, y, x].double().numpy() for y, x in positions]


def plain_right(x, label, fit, choose, test, classes=12):
    """Whether each test image is recognised, with the penalty that is best on `choose`, of equal ones the largest."""
    n = len(fit)
    mean, std = x[fit].mean(0), x[fit].std(0)
    z = np.divide(x - mean, std, out=np.zeros_like(x), where=std > 1e-12 * np.abs(x).max())
    z = np.hstack([z, np.ones((len(z), 1))])
    best = (-1, 0.0, None)
    for penalty in PENALTIES:
        extra = math.sqrt(n * penalty) * np.eye(z.shape[1])[:-1]
        targets = np.vstack([np.eye(classes)[label[fit]], np.zeros((len(extra), classes))])
        weight = np.linalg.lstsq(np.vstack([z[fit], extra]), targets, rcond=None)[0]
        right = (z @ weight).argmax(1) == label
        if (right[choose].sum(), penalty) > best[:2]:
            best = (right[choose].sum(), penalty, right[test])
    return best[2], best[1]


def the_division(made, network="vit", dataset="scenes"):
    probes = job(made, "probes", dataset, network)
    return divide(probes.images, probes.settings.probes, probes.name)


def test_accuracies_are_those_of_plain_forwards_and_least_squares(made):
    division = the_division(made)
    parts = {part: division.slots(part) for part in PARTS}
    label = division.label
    images = xr.open_zarr(made.results / "scenes/images.zarr")
    assert set(images.split.values[parts["test"]]) == {"validation"} and len(parts["test"]) == 40
    assert set(images.split.values[np.concatenate([parts["fit"], parts["choose"]])]) == {"train"}
    assert len(parts["fit"]) + len(parts["choose"]) == 150 and 15 <= len(parts["choose"]) <= 45
    (note,) = division.notes
    assert division.shots == [1, 2] and note.startswith("probes of 30 images a class are left out: class ")
    checked = 0
    for network, names in (("cnn", ["a", "b", "pool"]), ("vit", BLOCKS)):
        found = opened(made, network)
        assert found.layer.values.tolist() == names, "in execution order"
        assert found.shots.values.tolist() == ["1", "2", "30", "full"]
        assert np.isnan(found.probe_accuracy.sel(shots="30")).all()
        for name in names:
            one = found.sel(layer=name)
            for kind in found.features.values.tolist():
                own = one.sel(features=kind)
                positions = [
                    (y, x) for y, x in zip(one.position_y.values, one.position_x.values, strict=True) if y >= 0
                ]
                has = {"class_token": network == "vit", "pooled": True, "spatial": name != "pool"}[kind]
                assert bool(np.isfinite(own.accuracy.sel(shots=["1", "2", "full"])).all()) == has
                if not has:
                    continue
                vectors = features_of(made, network, name, kind, positions)
                shares = []
                for position, x in enumerate(vectors):
                    full, _ = plain_right(x, label, *parts.values())
                    shares.append(full)
                    cells = own.isel(draw=0, position=position)
                    assert float(cells.probe_accuracy.sel(shots="full")) == pytest.approx(full.mean(), abs=0.051)
                    checked += float(cells.probe_accuracy.sel(shots="full")) == pytest.approx(full.mean())
                    for draw in (0, 1):
                        rows = division.picks[draw, :, :2].ravel()
                        few, _ = plain_right(x, label, rows, parts["choose"], parts["test"])
                        cells = own.isel(draw=draw, position=position).sel(shots="2")
                        checked += float(cells.probe_accuracy) == pytest.approx(few.mean())
                assert np.isnan(own.probe_accuracy.values[:, :, len(vectors) :]).all()
                assert float(own.accuracy.sel(shots="full")) == pytest.approx(
                    float(own.probe_accuracy.sel(shots="full").mean())
                )
    # Features are kept with the rounding of stored activations: a near tie may fall the other way.
    assert checked >= 0.9 * 3 * (3 + 4 * 2 + 2 * 2 + 4 * 2)


def test_intervals_and_table(made):
    found = opened(made, "vit")
    logits = xr.open_zarr(made.results / "scenes/vit/logits.zarr").logits.values
    division = the_division(made)
    test = division.slots("test")
    assert found.attrs["network_accuracy"] == pytest.approx((logits[test].argmax(1) == division.label[test]).mean())
    assert found.attrs["counted"] == {part: len(division.slots(part)) for part in PARTS}
    few = found.probe_accuracy.sel(features="pooled", shots="1").isel(layer=1, position=0).values
    half = 3.182446 * few.std(ddof=1) / 2  # the quantile of Student's t with 3 degrees of freedom
    cell = found.isel(layer=1).sel(features="pooled", shots="1")
    assert float(cell.accuracy) == pytest.approx(few.mean())
    assert float(cell.low) == pytest.approx(max(0, few.mean() - half), abs=1e-6)
    assert float(cell.high) == pytest.approx(few.mean() + half, abs=1e-6)
    cell = found.isel(layer=1).sel(features="class_token", shots="full")
    share, square = float(cell.accuracy), 1.959964**2
    middle = (share + square / 80) / (1 + square / 40)
    half = 1.959964 / (1 + square / 40) * math.sqrt(share * (1 - share) / 40 + square / 6400)
    assert (float(cell.low), float(cell.high)) == pytest.approx((middle - half, middle + half), abs=1e-5)
    cell = found.isel(layer=1).sel(features="spatial", shots="full")
    assert 0 <= float(cell.low) <= float(cell.accuracy) <= float(cell.high) <= 1
    with (made.results / "scenes/vit/probes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * 3
    last = rows[-1]
    assert (last["layer"], last["features"], last["shots"], last["positions"], last["draws"]) == (
        BLOCKS[1], "spatial", "full", "4", "1",
    )  # fmt: skip
    assert float(last["accuracy"]) == pytest.approx(float(cell.accuracy), rel=1e-6)
    assert float(last["penalty"]) in PENALTIES


def test_read_and_computed_features_are_the_same_bits(made):
    for network in ("cnn", "vit"):
        own = job(made, "probes", "scenes", network)
        images, extracted = own.images, Extracted.of(own.parent("extract"))
        prepared = tasks.prepare_layers(own.model, images.size, [layer.name for layer in extracted.layers])
        layers = layers_of(own, prepared, extracted.layers)
        for shard in extracted.shards:
            start, stop = images.range(shard)
            pixels = StoreRef(images.store, images.files_of(shard))
            values = tasks.computed(own.model, pixels, (start, stop), layers)
            for layer in layers:
                kept = zarr.open_group(layer.features, mode="r", use_consolidated=False)["feature"][start:stop]
                np.testing.assert_array_equal(values[layer.id], kept)


def contents(made):
    """Digest of every file of the stage that holds results."""
    files = [path for network in ("cnn", "vit") for path in (made.results / "scenes" / network).rglob("*")]
    return {
        path.relative_to(made.results).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.is_file() and any("probe" in part for part in path.parts[-6:]) and path.suffix not in (".ledger",)
        and not {"done", "logs"} & set(path.parts)
    }  # fmt: skip


def features_made(made, network):
    ledgers = sorted((made.results / "scenes" / network / "probe-features").glob("*.ledger"))
    return [len(lines(ledger)) for ledger in ledgers]


def test_the_same_bits_for_any_workers_and_after_a_cut(made, tmp_path, monkeypatch, two_workers):
    raw = copied(made, experiment(made.results.parent), tmp_path)
    made = run(raw, *STAGES)
    before = contents(made)
    assert any("probes.csv" in name for name in before) and any("probe-features" in name for name in before)
    shards = 24  # of eight images
    assert features_made(made, "vit") == [shards, shards]
    (made.results / made.step("probes", "scenes", "vit").manifest).unlink()
    ledger = next((made.results / "scenes/vit/probe-features").glob("*.ledger"))
    whole = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(whole[:20]) + whole[20][: len(whole[20]) // 2])
    results = made.results / "scenes/vit/probes.ledger"
    kept = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(b"".join(kept[:-2]))
    run(raw, *STAGES)
    assert contents(made) == before
    assert len(lines(results)) == 6, "two of six kinds of probes were made again"
    good = [line for line in ledger.read_bytes().splitlines() if line.rpartition(b"\t")[2].isdigit()]
    assert len(good) == shards, "four shards were made again"

    for network in ("cnn", "vit"):
        for path in STAGE.made(job(made, "probes", "scenes", network)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (made.results / made.step("probes", "scenes", network).manifest).unlink()
    monkeypatch.setenv(client.ADDRESS, two_workers)
    run(raw, *STAGES)
    assert contents(made) == before


def test_other_probes_cost_no_forward(made, tmp_path):
    raw = copied(made, experiment(made.results.parent), tmp_path)
    made = run(raw, *STAGES)
    before = [features_made(made, network) for network in ("cnn", "vit")]
    old = opened(made, "vit").accuracy.load()
    raw["probes"] |= {"draws": 2, "shots": [1, 2, 3], "penalties": [1e-3, 0.1], "seed": 4}
    made = run(raw, *STAGES)
    assert [features_made(made, network) for network in ("cnn", "vit")] == before
    assert opened(made, "vit").shots.values.tolist() == ["1", "2", "3", "full"]
    assert not np.array_equal(opened(made, "vit").accuracy.sel(shots=["1", "2", "full"]), old, equal_nan=True)
    # Other weights: of this network alone.
    raw["networks"]["vit"]["seed"] = 2
    assert STAGE.pending(job(made, "probes", "scenes", "vit")) == (0, 24)
    made = run(raw, *STAGES)
    assert features_made(made, "cnn") == before[0] and len(features_made(made, "vit")) == 4
    assert len({layer.stem for layer in (made.results / "scenes/vit/probe-features").glob("*.zarr")}) == 4
    from pipeline.upkeep.unreferenced import folders

    left = [path for path in folders(made.results) if "probe-features" in path.parts]
    assert len(left) == 2, "those of the weights that were replaced"


def test_a_changed_image_costs_its_shard(tmp_path):
    labelled_images(tmp_path, [f"{town}/{i}" for town in ("a", "b") for i in range(16)])
    raw = segmentation(tmp_path)
    raw["datasets"]["photos"]["labels"] = str(tmp_path / "labels.csv")
    rows = [f"{town}/{i}.png,{town}" for town in ("a", "b") for i in range(16)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    raw["networks"]["tiny"]["arguments"] = {"classes": 2}
    raw["probes"] = {"fit": "validation", "draws": 2, "shots": [1, 2], "grid": 1}
    made = run(raw, *STAGES)
    ledgers = sorted((made.results / "photos/tiny/probe-features").glob("*.ledger"))
    assert [len(lines(ledger)) for ledger in ledgers] == [8, 8]
    counted = opened(made, "tiny", "photos").attrs["counted"]
    assert sum(counted.values()) == 32 and min(counted.values()) > 0, "one split, divided"
    write_image(tmp_path, "a/3", np.full((16, 16, 3), 90, np.uint8))
    run(raw, *STAGES)
    assert [len(lines(ledger)) for ledger in ledgers] == [9, 9]
    for path in (tmp_path / "images").rglob("*.png"):
        os.utime(path)
    run(raw, *STAGES)
    assert [len(lines(ledger)) for ledger in ledgers] == [9, 9]


def test_a_split_with_two_purposes_is_divided_by_the_ids_alone():
    names = [f"image {i}" for i in range(4000)]
    place = ranks(names, 0, "part")
    np.testing.assert_array_equal(ranks(names[::-1], 0, "part")[::-1], place)
    assert abs((place < 2.0**64 * 0.2).mean() - 0.2) < 0.03
    assert (ranks(names, 1, "part") != place).all()
    label = np.arange(4000) % 7
    slots = np.arange(10, 4010)
    picked = picks(slots, label, names, 8, 5, 3, 0)
    assert picked.shape == (3, 8, 5) and (picked[:, 7] == -1).all(), "a class without images"
    for draw in picked:
        assert len(np.unique(draw[:7])) == 35 and (label[draw[:7] - 10] == np.arange(7)[:, None]).all()
    assert (picked[0] != picked[1]).any()
    np.testing.assert_array_equal(picks(slots, label, names, 8, 2, 3, 0), picked[..., :2])


def test_where_single_positions_are():
    assert tasks.spread(8, 2) == [2, 6] and tasks.spread(7, 3) == [1, 3, 5]
    assert tasks.spread(2, 3) == [0, 1] and tasks.spread(5, 1) == [2]


def test_controls_pooled_layers_and_a_split_that_chooses(tmp_path):
    raw = experiment(tmp_path, networks=["cnn", "cnn-untrained"], choose="validation", test="test")
    for split in ("train", "validation", "test"):
        labelled_images(tmp_path, [f"{split}/{label}/{i}" for label in "ab" for i in range(8)])
    raw["datasets"] = {
        "photos": {
            "kind": "imagefolder", "root": str(tmp_path / "images"), "split": {"folders": True}, "shard_images": 4,
        }
    }  # fmt: skip
    weights = tmp_path / "cnn.pt"
    network = raw["networks"]["cnn"] | {"arguments": {"classes": 2}}
    torch.save(load(made_of(network)).state_dict(), weights)
    raw["networks"] = {"cnn": network | {"weights": str(weights), "store": {"a": "pooled"}, "seed": 9}}
    made = run(raw, *STAGES)
    assert [step.network for step in made.of_stage("probes")] == ["cnn", "cnn-untrained"]
    for name in ("cnn", "cnn-untrained"):
        found = opened(made, name, "photos")
        assert found.attrs["counted"] == {"fit": 16, "choose": 16, "test": 16}
        assert (found.attrs["fit"], found.attrs["choose"], found.attrs["test"]) == ("train", "validation", "test")
        assert np.isfinite(found.accuracy.sel(features="spatial", layer=["a", "b"], shots=FILLED)).all()
        assert found.attrs["network_accuracy"] is None, "logits of the images that judge are not stored"


def made_of(network):
    from pipeline.config.networks import NetworkSpec

    return NetworkSpec(**{key: network[key] for key in ("module", "weights", "arguments", "seed")})


def test_classes_with_few_images(tmp_path):
    names = [
        f"{split}/{label}/{i}"
        for split, count in (("train", 9), ("validation", 4))
        for label in "ab"
        for i in range(count)
    ]
    labelled_images(tmp_path, [*names, "validation/c/0", "train/d/0", "train/d/1", "train/d/2"])
    raw = experiment(tmp_path, shots=[1, 5, 40], share=0.3, networks=["cnn"])
    raw["datasets"] = {"photos": {"kind": "imagefolder", "root": str(tmp_path / "images"), "split": {"folders": True}}}
    raw["networks"]["cnn"]["arguments"] = {"classes": 4}
    made = run(raw, *STAGES)
    found = opened(made, "cnn", "photos")
    assert "class 'c' has no image to fit on, and is never predicted" in found.attrs["notes"]
    assert any(
        note.startswith("probes of 5, 40 images a class are left out: class 'd' has ") for note in found.attrs["notes"]
    )
    pooled = found.accuracy.sel(features="pooled").values
    assert np.isfinite(pooled[:, [0, 3]]).all() and np.isnan(pooled[:, 1:3]).all()
    # One class alone.
    shutil.rmtree(tmp_path / "images/train/b")
    shutil.rmtree(tmp_path / "images/train/d")
    with pytest.raises(MicrotomeError, match=r"images to fit on are all of class 'a', and a probe takes two"):
        run(raw, *STAGES)


def test_values_that_are_not_finite_are_refused(tmp_path):
    """On images that are not extracted, which no other stage has looked at."""
    raw = experiment(tmp_path, networks=["cnn"])
    raw["datasets"]["scenes"]["images"] = {"train": 40, "validation": 12}
    raw["networks"]["cnn"] |= {
        "module": f"{tmp_path / 'network.py'}:wide", "arguments": {"huge": 3e4, "minute": 1.0}, "layers": ["huge"],
    }  # fmt: skip
    made = run(raw, *STAGES)
    filled = opened(made, "cnn").accuracy.sel(features="pooled", shots=FILLED)
    assert np.isfinite(filled).all(), "beyond float16, with a scale"
    bad = experiment(tmp_path, networks=["cnn"])
    bad["results"] = str(tmp_path / "bad")
    with pytest.raises(
        MicrotomeError, match=r"network 'cnn', layer 'huge': unit 0: its output for image .* is not finite"
    ):
        bad["networks"]["cnn"] |= {
            "module": f"{tmp_path / 'network.py'}:wide", "arguments": {"huge": 3e38, "minute": 1.0},
            "layers": ["huge"],
        }  # fmt: skip
        run(bad, *STAGES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"networks": ["cnn", "vot"]}, r"probes: no network 'vot'.*vit"),
        ({"networks": ["cnn-untrained"]}, r"probes: no network 'cnn-untrained'"),
        ({"datasets": ["scene"]}, r"probes: no data set 'scene'.*scenes"),
        ({"shots": [0]}, r"probes.shots"),
        ({"shots": [5, 5]}, r"shots: 5 is named twice"),
        ({"penalties": [0.0]}, r"probes.penalties"),
        ({"penalties": []}, r"probes.penalties"),
        ({"features": ["whole"]}, r"probes.features"),
        ({"share": 0.5}, r"probes.share"),
        ({"choose": "train"}, r"choose: split 'train' is fitted on"),
        ({"choose": "a", "test": "a"}, r"choose: split 'a' is judged on"),
        ({"grids": 2}, r"probes.grids: unknown key.*grid"),
    ],
)
def test_configurations_that_are_refused(tmp_path, change, message):
    with pytest.raises(MicrotomeError, match=message):
        run_experiment.parse(experiment(tmp_path, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fit": "trian"}, r"probes.fit: data set 'scenes' has no split 'trian'.*its images are divided"),
        ({"choose": "validation"}, r"probes.choose, data set 'scenes': split 'validation' is judged on"),
        ({"test": "text"}, r"probes.test: data set 'scenes' has no split 'text'"),
    ],
)
def test_splits_that_are_not_there(tmp_path, change, message):
    with pytest.raises(MicrotomeError, match=message):
        planner.make(run_experiment.parse(experiment(tmp_path, **change)))


def test_images_without_classes(tmp_path):
    labelled_images(tmp_path, [f"town/{i}" for i in range(4)])
    raw = segmentation(tmp_path) | {"probes": {}}
    with pytest.raises(MicrotomeError, match=r"probes: the images of data set 'photos' have no classes"):
        planner.make(run_experiment.parse(raw))


def test_features_that_no_layer_has(tmp_path):
    raw = experiment(tmp_path, features=["class_token"])
    with pytest.raises(MicrotomeError, match=r"probes scenes cnn: none of its layers has a class_token"):
        run(raw, *STAGES)


def test_other_steps_keep_their_ids_and_only_narrows(tmp_path):
    raw = experiment(tmp_path, networks=["cnn", "vit"])
    made = planner.make(run_experiment.parse(raw))
    kept = run_experiment.parse(raw | {"only": "vit"})
    assert kept.probes is not None and kept.probes.networks == ["vit"]
    assert run_experiment.parse(json.loads(kept.model_dump_json())) == kept
    del raw["probes"]
    plain = planner.make(run_experiment.parse(raw))
    assert {path for path, step in plain.steps.items() if step.stage != "report"} < set(made.steps)
    assert made.step("probes", "scenes", "vit").manifest.startswith("scenes/vit/done/probes.")


def test_the_page_of_the_report(made, tmp_path):
    from pipeline.report.experiment import Experiment
    from pipeline.stages.probes import page
    from pipeline.stages.report.site import render

    probed = shown(made, "probes", tmp_path / "report")
    (found,) = page.pages(probed)
    for network in ("cnn", "vit"):
        values = opened(made, network)
        last = values.accuracy.isel(layer=-1).sel(shots="full")
        kind = str(last.features.values[int(np.nanargmax(last))])
        said = next(
            each for each in found.findings if each.startswith(f"A linear probe of the last layer of {network}")
        )
        percent = f"{100 * float(last.sel(features=kind)):.1f}"
        assert f"({page.TITLES[kind]}), tells the class of {percent}" in said
        assert f"{network} itself tells {100 * values.attrs['network_accuracy']:.1f}" in said
    assert sum(each.startswith("Fitted on 2 images of each class in place of ") for each in found.findings) == 2
    assert [figure.kind for figure in found.figures] == ["probes", "probes-shots"]
    for figure in found.figures:
        assert all((tmp_path / "report" / file).stat().st_size for file in figure.written)
    with (tmp_path / "report" / found.figures[0].files["csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["shots"] for row in rows} == {"1", "2", "full", ""}, "what was left out is not shown"
    assert sum(row["features"] == "network itself" for row in rows) == 2
    html = render(probed, found, [found])
    assert html.count("<figure>") == 2 and "probes of 30 images a class are left out" in html
    assert page.pages(Experiment(made.results, tmp_path / "report", "None", ())) == []
