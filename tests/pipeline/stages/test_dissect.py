"""Dissection against plain definitions in float64, and what it says, shares and does again."""

import csv
import itertools
import json
from decimal import Decimal

import numpy as np
import pytest
import xarray as xr
import zarr
from experiments import SIZE, job, labelled_images, lines, run, scenes, segmentation, tiny, write_image, write_label_map

from kernels.dissection.counts import Counts
from pipeline.config.datasets import PRESETS
from pipeline.data.listing import derangement, group
from pipeline.errors import MicrotomeError
from pipeline.stages.concepts.results import Labelled
from pipeline.stages.dissect import intersections, thresholds, work
from pipeline.stages.dissect.intersections import joined
from pipeline.stages.dissect.results import UNIT_COLUMNS, earlier_counts, write_layer
from pipeline.stages.dissect.settings import Method
from pipeline.stages.dissect.work import Concepts, LayerResult, LayerSource, Threshold
from pipeline.stages.extract.results import Extracted
from pipeline.storage.store import StoreRef
from pipeline.upkeep import damage
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
NAMES = [f"street/{k:02}" for k in range(14)]
STAGES = ("ingest", "concepts", "network", "extract", "dissect")


def opened(path):
    return zarr.open_group(path, mode="r", use_consolidated=False)


def text(array):
    return array[:].astype(object).tolist()


def layers_of(plan, network="tiny"):
    """The entries of layers.json, with paths that can be opened."""
    (dataset,) = plan.config.datasets
    folder = plan.results / dataset
    entries = json.loads((folder / network / "layers.json").read_text())
    paths = ("activations", "thresholds", "iou")
    return {name: {key: folder / entry[key] for key in paths} for name, entry in entries.items()}


def units_of(plan, name="units.csv", network="tiny"):
    (dataset,) = plan.config.datasets
    with (plan.results / dataset / network / name).open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == UNIT_COLUMNS
        return list(reader)


# The definitions, slow and plain --------------------------------------------------------------------------------------


def bilinear(maps, size, border):
    """Maps (n, unit, h, w) at `size`, half-pixel centres, by weights for every output; float64, rounded to float16."""
    padded = np.pad(
        maps.astype(np.float64), ((0, 0), (0, 0), (1, 1), (1, 1)), "edge" if border == "edge" else "constant"
    )

    def weights(length, wanted):
        position = (np.arange(wanted) + 0.5) * length / wanted - 0.5 + 1
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(length + 2)))

    rows, columns = weights(maps.shape[2], size[0]), weights(maps.shape[3], size[1])
    return np.einsum("Yy,nuyx,Xx->nuYX", rows, padded, columns).astype(np.float16)


def top_quantile(values, quantile):
    """The smallest value that at most floor(quantile * n) values exceed."""
    ordered = np.sort(values.ravel())
    allowed = int(Decimal(repr(quantile)) * len(ordered))
    return next(t for t in np.unique(ordered) if (ordered > t).sum() <= allowed)


class Brute:
    """A data set dissected by the definitions, from its stores and the configuration alone."""

    def __init__(self, plan, how, layer, permuted=False):
        folder = plan.results / "photos"
        images, concepts = opened(folder / "images.zarr"), opened(folder / "concepts.zarr")
        ids = np.array(text(images["image_id"]), object)
        refused = {line.split(",")[0] for line in (folder / "concepts-quarantine.csv").read_text().splitlines()[1:]}
        counts = images["valid"][:] & (np.array(text(images["split"]), object) == how["split"])
        counts &= ~np.isin(ids, list(refused))
        maps = opened(layer["activations"])["activation"][:]
        labels = concepts["label_map"][:].astype(np.int64)
        self.table = {int(k): v for k, v in concepts.attrs["concepts"].items()}
        self.categories = text(concepts["category"])
        self.rows = np.flatnonzero(counts)
        met = {}
        for start in range(0, len(ids), 4):
            own = self.rows[(self.rows >= start) & (self.rows < start + 4)]
            if permuted:
                own = own if len(own) > 1 else own[:0]
                met |= dict(zip(own, own[derangement(ids[own])], strict=True)) if len(own) else {}
            else:
                met |= dict(zip(own, own, strict=True))
        large = bilinear(maps, (SIZE, SIZE), how["border"])
        counted = large if how["positions"] == "upsampled" else maps
        units = maps.shape[1]
        self.threshold = np.array([top_quantile(counted[self.rows, u], how["quantile"]) for u in range(units)])
        self.active_count = [int((counted[self.rows, u] > self.threshold[u]).sum()) for u in range(units)]
        self.rows = np.array(sorted(met))
        self.active = large[self.rows] > self.threshold[:, None, None]
        self.labels = labels[[met[row] for row in self.rows]]
        self.group = group(ids[self.rows])
        self.union = how["union"]

    def counts(self, unit, number, chosen=slice(None)):
        """Intersection, area of the unit, of the concept, and IoU, over some of the images."""
        category = self.categories.index(self.table[number]["category"])
        active, labels = self.active[chosen, unit], self.labels[chosen, category]
        concept = labels == number
        both = int((active & concept).sum())
        within = np.ones(len(labels), bool) if self.union == "all" else (labels > 0).any((1, 2))
        either = int((active | concept)[within].sum())
        return both, int(active.sum()), int(concept.sum()), both / either if either else 0.0


def hard_images(folder):
    """Images of two splits, one of them broken, one without a usable label map, and some that show nothing."""
    labelled_images(folder, NAMES)
    splits = [f"{name}.png,{'train' if k % 5 == 4 else 'validation'}" for k, name in enumerate(NAMES)]
    (folder / "splits.csv").write_text("\n".join(["image,split", *splits]))
    write_label_map(folder, NAMES[0], np.full((SIZE, SIZE), 9, np.uint8))
    (folder / f"images/{NAMES[1]}.png").write_bytes(b"broken")
    for name in NAMES[2:4]:
        write_label_map(folder, name, np.zeros((SIZE, SIZE), np.uint8))
    return {"split": {"csv": str(folder / "splits.csv")}, "concepts": ["pixels", "truth"]}


SETTINGS = [{"method": method} for method in PRESETS] + [
    {"quantile": 0.1, "min_iou": 0.0},
    {"quantile": 0.3, "positions": "native", "border": "zeros", "min_iou": 0.2},
    {"quantile": 0.05, "union": "category", "split": "train"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_against_the_definitions(tmp_path, settings):
    plan = run(segmentation(tmp_path, **hard_images(tmp_path), dissect=settings), *STAGES)
    how = how_of(plan)
    for name, layer in layers_of(plan).items():
        check_layer(plan, how, layer, layer["iou"].parent, [row for row in units_of(plan) if row["layer"] == name])
        (permuted,) = set(layer["iou"].parent.parent.glob("dissect-*")) - {layer["iou"].parent}
        rows = [row for row in units_of(plan, "units-permuted.csv") if row["layer"] == name]
        check_layer(plan, how, layer, permuted, rows, permuted=True)


def how_of(plan):
    """The settings of the dissection, with those of its method."""
    return plan.config.datasets["photos"].dissect.resolved().model_dump()


def check_layer(plan, how, layer, folder, rows, permuted=False):
    """Compare the stores in one folder and rows of a table with the definitions."""
    brute = Brute(plan, how, layer, permuted)
    found, thresholds = opened(folder / "iou.zarr"), opened(folder / "thresholds.zarr")
    np.testing.assert_array_equal(thresholds["threshold"][:], brute.threshold.astype(np.float32))
    assert thresholds["active"][:].tolist() == brute.active_count
    assert how.items() <= dict(thresholds.attrs).items() and how.items() <= dict(found.attrs).items()
    assert found.attrs["images"] == len(brute.rows)
    assert found.attrs["labels"] == ("permuted" if permuted else "true")
    assert found.attrs["pixels"] == len(brute.rows) * SIZE * SIZE
    numbers = found["concept_id"][:].tolist()
    assert sorted(numbers) == sorted(brute.table)
    assert text(found["concept"]) == [brute.table[number]["name"] for number in numbers]
    assert text(found["category"]) == [brute.table[number]["category"] for number in numbers]
    for unit, row in enumerate(rows):
        plain = [brute.counts(unit, number) for number in numbers]
        assert found["intersection"][unit].tolist() == [both for both, *_ in plain]
        assert found["unit_area"][unit] == plain[0][1]
        assert found["concept_area"][:].tolist() == [area for _, _, area, _ in plain]
        iou = np.array([value for *_, value in plain])
        np.testing.assert_allclose(found["iou"][unit], iou, rtol=1e-6)
        check_row(row, brute, unit, numbers, iou, how)
    assert len(rows) == len(brute.threshold)


def check_row(row, brute, unit, numbers, iou, how):
    best = int(iou.argmax())
    assert row["unit"] == str(unit)
    assert float(row["iou"]) == pytest.approx(iou[best], rel=1e-6)
    kept = iou[best] > how["min_iou"]
    entry = brute.table[numbers[best]]
    assert (row["concept"], row["category"]) == ((entry["name"], entry["category"]) if kept else ("", ""))
    assert float(row["threshold"]) == pytest.approx(float(brute.threshold[unit]), rel=1e-6)
    assert float(row["activation_rate"]) == pytest.approx(brute.active[:, unit].mean(), rel=1e-6, abs=1e-12)
    even, odd = brute.group % 2 == 0, brute.group % 2 == 1
    chosen = [brute.counts(unit, number, even)[3] for number in numbers]
    if max(chosen) > 0 and odd.any():
        held_out = brute.counts(unit, numbers[int(np.argmax(chosen))], odd)[3]
        assert float(row["iou_held_out"]) == pytest.approx(held_out, rel=1e-6)
    else:
        assert row["iou_held_out"] == ""
    if iou[best] > 0 and len(set(brute.group)) > 1:
        assert 0 <= float(row["ci_low"]) <= iou[best] * (1 + 1e-6) and float(row["ci_high"]) >= iou[best] * (1 - 1e-6)
        assert iou[best] <= float(row["iou_ceiling"]) * (1 + 1e-6) <= 1 + 1e-6


def test_a_derangement_is_one():
    for count in range(2, 40):
        ids = [f"image {k}" for k in range(count)]
        partner = derangement(ids)
        assert sorted(partner) == list(range(count)) and (partner != np.arange(count)).all()
        order = np.random.default_rng(count).permutation(count)
        again = derangement([ids[k] for k in order])
        assert all(order[again[at]] == partner[order[at]] for at in range(count))
    assert derangement(["alone"]).tolist() == [0]


# Orders, resuming, sharing --------------------------------------------------------------------------------------------


def test_the_same_counts_in_any_order_and_cut_into_any_runs(tmp_path):
    plan = run(segmentation(tmp_path, **hard_images(tmp_path)), *STAGES)
    own = job(plan, "dissect", "photos", "tiny")
    images, extracted, labels = own.images, Extracted.of(own.parent("extract")), own.parent("concepts")
    labelled, how = Labelled.of(labels), own.identity["dissect"]
    folder = plan.results / "photos"
    concepts = work.concepts_of(StoreRef.of_manifest(folder, "concepts.zarr", labels.files), labelled)
    layer = work.layer_of(plan.results, folder, extracted.layers[0], own.settings.dissect)
    counted = work.counted_images(images, how["split"], extracted.shards, labelled.refused)
    threshold = opened(layers_of(plan)[layer.name]["thresholds"])["threshold"][:].astype(np.float16)
    wanted = [(layer, permuted, {one.shard for one in counted}, threshold) for permuted in (False, True)]
    results = []
    for order in list(itertools.permutations(counted))[::5]:
        for length in (1, 2, 4):
            total = {}
            for at in range(0, len(order), length):
                part = intersections.count_run(wanted, list(order[at : at + length]), concepts, how["border"])
                total = {key: intersections.add(total[key], one) if key in total else one for key, one in part.items()}
            results.append(total)
    for other in results[1:]:
        for key, counts in results[0].items():
            for name, values in vars(counts).items():
                np.testing.assert_array_equal(getattr(other[key], name), values)
    stored = opened(layers_of(plan)[layer.name]["iou"])
    np.testing.assert_array_equal(results[0][layer.id, False].intersection.sum(0), stored["intersection"][:])


def everything(plan):
    """All that a dissection gives, to compare with another."""
    found = {name: (plan.results / "photos/tiny" / name).read_text() for name in ("units.csv", "units-permuted.csv")}
    for name, layer in layers_of(plan).items():
        found |= {f"{name} {key}": opened(layer["thresholds"])[key][:].tolist() for key in ("threshold", "active")}
        iou = opened(layer["iou"])
        found |= {f"{name} {key}": iou[key][:].tolist() for key in ("intersection", "unit_area", "concept_area")}
    return found


def without_order(found):
    """Permuted labels follow the slots of images, which are other ones in a fresh store."""
    return {key: value for key, value in found.items() if key != "units-permuted.csv"}


@pytest.mark.parametrize("change", ["append", "remove", "change an image", "change a label map"])
def test_after_a_change_the_numbers_are_those_of_a_fresh_run(tmp_path, change):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    plan = run(raw, *STAGES)
    before = everything(plan)
    forwards = count_forwards(plan)
    match change:
        case "append":
            labelled_images(tmp_path, [f"more/{k}" for k in range(5)])
        case "remove":
            (tmp_path / f"images/{NAMES[2]}.png").unlink()
        case "change an image":
            write_image(tmp_path, NAMES[2], np.full((SIZE, SIZE, 3), (255, 30, 0), np.uint8))
        case "change a label map":
            write_label_map(tmp_path, NAMES[2], np.full((SIZE, SIZE), 2, np.uint8))
    plan = run(raw, *STAGES)
    after = everything(plan)
    assert after != before
    assert damage.verify(plan.results) == []
    made = {"append": 2, "remove": 1, "change an image": 1, "change a label map": 0}[change]
    assert count_forwards(plan) - forwards == made
    fresh = run(raw | {"results": str(tmp_path / "fresh")}, *STAGES)
    assert without_order(everything(fresh)) == without_order(after)


def count_forwards(plan):
    layer = next(iter(layers_of(plan).values()))
    return len(lines(layer["activations"].with_suffix(".ledger")))


def test_the_same_settings_again_count_nothing(tmp_path, monkeypatch):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    plan = run(raw, *STAGES)
    before = everything(plan)
    (plan.results / next(plan.of_stage("dissect")).manifest).unlink()
    run(segmentation(tmp_path, dissect={"quantile": 0.2}), *STAGES)
    monkeypatch.setattr(client, "client", None)  # no worker is needed
    plan = run(raw, *STAGES)
    assert everything(plan) == before


def test_another_least_iou_costs_no_pass_over_the_activations(tmp_path, monkeypatch):
    labelled_images(tmp_path, NAMES)
    before = units_of(run(segmentation(tmp_path, dissect={"quantile": 0.2, "min_iou": 0.0}), *STAGES))
    original, tasks = intersections.run_tasks, []

    def noted(client, function, todo, total, label):
        tasks.extend(todo := list(todo))
        return original(client, function, todo, total, label)

    for module in (intersections, thresholds):
        monkeypatch.setattr(module, "run_tasks", noted)
    after = units_of(run(segmentation(tmp_path, dissect={"quantile": 0.2, "min_iou": 0.2}), *STAGES))
    assert tasks == []
    assert [row["iou"] for row in after] == [row["iou"] for row in before]
    assert all(bool(row["concept"]) == (float(row["iou"]) > 0.2) for row in after)
    assert {row["concept"] for row in before} != {row["concept"] for row in after}


def test_earlier_counts_are_taken_over_whatever_the_order_of_the_categories(tmp_path):
    random = np.random.default_rng(0)
    nowhere = StoreRef(tmp_path, {})
    concepts = Concepts(nowhere, ("truth/part", "truth/object"), (0, 1), ("a", "b", "c"), (1, 2, 3), (0, 0, 1))
    shapes = ((2, 4, 3), (2, 4), (2, 4, 2), (2, 3), (2,), (2, 2))
    counts = Counts(*(random.integers(1, 99, shape) for shape in shapes))
    layer = LayerSource("conv", "id", StoreRef(tmp_path / "activations.zarr", {}), (4, 1, 1), 1.0, "digest")
    one = LayerResult(layer, False, (), "thresholds", {"truth/part": "p", "truth/object": "o"}, "id")
    how = Method.read(PRESETS["standard"] | {"method": "standard", "min_iou": 0.04, "split": "validation"})
    write_layer(
        one, Threshold(np.zeros(4, np.float16), np.zeros(4, np.int64), 1), counts, concepts, how, list(one.labels)
    )
    again = joined(concepts, earlier_counts(one, concepts))
    for name in vars(counts):
        np.testing.assert_array_equal(getattr(again, name), getattr(counts, name), err_msg=name)


def test_another_source_of_concepts_is_counted_beside_the_first(tmp_path):
    labelled_images(tmp_path, NAMES)
    before = run(segmentation(tmp_path, dissect={"quantile": 0.2}), *STAGES)
    first = opened(layers_of(before)["b"]["iou"])["intersection"][:]
    raw = segmentation(tmp_path, dissect={"quantile": 0.2}, concepts=["truth", "pixels"])
    plan = run(raw, *STAGES)
    how = how_of(plan)
    for name, layer in layers_of(plan).items():
        rows = [row for row in units_of(plan) if row["layer"] == name]
        check_layer(plan, how, layer, layer["iou"].parent, rows)
    np.testing.assert_array_equal(opened(layers_of(plan)["b"]["iou"])["intersection"][:, :2], first)
    fresh = run(raw | {"results": str(tmp_path / "fresh")}, *STAGES)
    assert everything(fresh) == everything(plan)


def test_two_names_of_one_layer(tmp_path):
    """`b` and its last part `b.1` have one output, so one id and one store."""
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    raw["networks"]["tiny"]["layers"] = ["b", "b.1"]
    plan = run(raw, *STAGES)
    alone = segmentation(tmp_path) | {"results": str(tmp_path / "alone")}
    alone["networks"]["tiny"]["layers"] = ["b"]
    reference = layers_of(run(alone, *STAGES))["b"]
    layers = layers_of(plan)
    assert sorted(layers) == ["b", "b.1"] and layers["b"]["iou"] == layers["b.1"]["iou"]
    for key in ("intersection", "unit_area", "concept_area"):
        np.testing.assert_array_equal(opened(layers["b"]["iou"])[key][:], opened(reference["iou"])[key][:])
    assert [row["layer"] for row in units_of(plan)].count("b.1") == 5
    assert count_forwards(plan) == 4


def test_a_network_that_shares_layers_shares_their_dissection(tmp_path, monkeypatch):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path)
    run(raw, *STAGES)
    raw["networks"]["twin"] = tiny(tmp_path)
    run(raw, "ingest", "concepts", "network", "extract")
    monkeypatch.setattr(client, "client", None)
    plan = run(raw, *STAGES)
    assert layers_of(plan, "twin") == layers_of(plan)
    assert units_of(plan, network="twin") == units_of(plan)


# Bounds and corners ---------------------------------------------------------------------------------------------------


def test_controls_of_fewer_images(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path) | {"controls": {"images": 5}}, *STAGES)
    manifest = plan.manifest(next(plan.of_stage("dissect")))
    assert manifest.result == {"images": 14, "control_images": 8}
    layer = layers_of(plan)["a"]
    images = {
        opened(path / "iou.zarr").attrs["labels"]: opened(path / "iou.zarr").attrs["images"]
        for path in layer["iou"].parent.parent.glob("dissect-*")
    }
    assert images == {"true": 14, "permuted": 8}


def test_one_image(tmp_path):
    labelled_images(tmp_path, ["only"])
    plan = run(segmentation(tmp_path), *STAGES)
    assert len(units_of(plan)) == 9
    assert all(row["ci_low"] == row["iou_held_out"] == "" or row["concept"] for row in units_of(plan))
    assert not (plan.results / "photos/tiny/units-permuted.csv").exists()


def test_a_last_shard_of_one_image_has_no_part_in_the_permuted_control(tmp_path):
    labelled_images(tmp_path, NAMES[:5])
    plan = run(segmentation(tmp_path), *STAGES)
    manifest = plan.manifest(next(plan.of_stage("dissect")))
    assert manifest.result["images"] == 5
    layer = layers_of(plan)["a"]
    stores = [opened(path / "iou.zarr").attrs for path in layer["iou"].parent.parent.glob("dissect-*")]
    assert {attrs["labels"]: attrs["images"] for attrs in stores} == {"true": 5, "permuted": 4}


def test_no_image_left(tmp_path):
    labelled_images(tmp_path, NAMES[:2])
    for name in NAMES[:2]:
        write_label_map(tmp_path, name, np.full((SIZE, SIZE), 9, np.uint8))
    with pytest.raises(MicrotomeError, match="no image of split 'validation' is left to dissect"):
        run(segmentation(tmp_path, max_bad_fraction=1), *STAGES)


def test_damaged_activations_are_refused_by_name(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), "ingest", "concepts", "network", "extract")
    entry = plan.manifest(next(plan.of_stage("extract"))).result["layers"][1]
    chunk = plan.results / "photos/layers" / entry["id"] / "activations.zarr/activation/c/1/0/0/0"
    raw = bytearray(chunk.read_bytes())
    raw[len(raw) // 2] ^= 1
    chunk.write_bytes(raw)
    with pytest.raises(
        MicrotomeError, match=rf"{entry['id']}/activations\.zarr: chunk activation/c/1/0/0/0 has checksum"
    ):
        run(segmentation(tmp_path), *STAGES)


def test_hostile_names_of_concepts_and_images(tmp_path):
    strange = ["<script>alert(1)<", 'a, "b"\n', "=1+1", "$(touch x)", "ünï"]
    labelled_images(tmp_path, strange)
    (tmp_path / "classes.txt").write_text('1 <b>"left", side</b>\n2 =$(id)\n')
    plan = run(segmentation(tmp_path, dissect={"min_iou": 0.0, "quantile": 0.3}), *STAGES)
    found = {row["concept"] for row in units_of(plan)}
    assert found <= {"", '<b>"left", side</b>', "'=$(id)"} and any(found)  # no spreadsheet takes it for a formula


def test_xarray_opens_every_store_without_a_warning(tmp_path):
    plan = run(scenes(tmp_path), *STAGES)
    stores = sorted(plan.results.rglob("*.zarr"))
    assert {path.name for path in stores} == {
        "images.zarr", "concepts.zarr", "activations.zarr", "logits.zarr", "thresholds.zarr", "iou.zarr", "counts.zarr",
    }  # fmt: skip
    for path in stores:
        data = xr.open_zarr(path).load()
        assert len(data.data_vars)
        metadata = json.loads((path / "zarr.json").read_text())
        assert metadata["zarr_format"] == 3
        for name, array in metadata["consolidated_metadata"]["metadata"].items():
            kind = data[name].dtype.kind
            assert kind in "OTU" if array["data_type"] == "string" else data[name].dtype == array["data_type"]
