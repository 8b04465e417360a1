"""`store: none`: layers that are counted in two forward passes give what stored layers give, to the bit."""

import contextlib
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from experiments import SIZE, VIT, job, labelled_images, lines, run, segmentation, tiny, write_image, write_label_map

from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks import forward
from pipeline.networks.build import load
from pipeline.plan.step import Plan
from pipeline.stages.concepts import stage as concepts
from pipeline.stages.dissect import cards, intersections, streamed, thresholds
from pipeline.stages.dissect.found import read_dissection
from pipeline.stages.extract import counting, pictures
from pipeline.stages.extract import stage as extract
from pipeline.stages.extract import streaming as stream
from pipeline.stages.extract import tasks as extract_tasks
from pipeline.stages.network import stage as network
from pipeline.storage.store import DamagedStoreError
from pipeline.upkeep import damage, unreferenced, why
from pipeline.workers import client, resumable

STAGES = ("ingest", "concepts", "network", "extract", "dissect")
NAMES = [f"street/{k:02}" for k in range(22)]  # six shards, the last one smaller
STORES = ("thresholds.zarr", "iou.zarr", "counts.zarr")
OTHER = {"positions": "native", "border": "zeros", "union": "category", "quantile": 0.3}


class Here:
    """Tasks run in this process, the last one first; what was forwarded is counted, and tasks can be cut short.

    Attributes
    ----------
    images : that went through a network, by its name.
    tasks : by the function's name.
    cut : tasks of a function's name that run before all end with an error.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.images: Counter[str] = Counter()
        self.tasks: Counter[str] = Counter()
        self.cut: dict[str, int] = {}
        own = forward.forward_in_batches

        def counted(model, pixels, names, take, stop_early=False):
            self.images[model.name] += len(pixels)
            return own(model, pixels, names, take, stop_early)

        for module in (resumable, concepts, network, extract, counting, thresholds, intersections, streamed):
            patch.setattr(module, "run_tasks", self.run_tasks)
        patch.setattr(client, "client", self.client)
        for module in (extract_tasks, stream):
            patch.setattr(module, "forward_in_batches", counted)
        patch.setattr(stream, "BLOCKS", 3)

    @contextlib.contextmanager
    def client(self, *_):
        yield self

    def scheduler_info(self, n_workers=-1):
        return {}

    def run_tasks(self, client, function, tasks, total, label, remedy=""):
        for task in reversed(list(tasks)):
            name = function.__name__
            if self.cut.get(name) == 0:
                raise RuntimeError("cut short")
            if name in self.cut:
                self.cut[name] -= 1
            self.tasks[name] += 1
            yield function(*task)


@pytest.fixture
def here(monkeypatch) -> Here:
    return Here(monkeypatch)


def hard_images(folder: Path) -> None:
    """Images of two splits, one broken, two without a usable label map, one so bright that it overflows a layer."""
    labelled_images(folder, NAMES)
    splits = [f"{name}.png,{'train' if k % 5 == 4 else 'validation'}" for k, name in enumerate(NAMES)]
    (folder / "splits.csv").write_text("\n".join(["image,split", *splits]))
    for name in (NAMES[0], NAMES[12]):
        write_label_map(folder, name, np.full((SIZE, SIZE), 9, np.uint8))
    (folder / f"images/{NAMES[1]}.png").write_bytes(b"broken")
    write_image(folder, NAMES[7], np.full((SIZE, SIZE, 3), 255, np.uint8))
    torch.save(load(Network.model_validate(tiny(folder, seed=1))).state_dict(), folder / "tiny.pt")
    (folder / "vit.py").write_text(VIT)


def experiment(folder: Path, store, results: str, names=("tiny", "vit", "wide"), **how) -> dict:
    """A CNN with its untrained control, a vision transformer, and a network that overflows float16 on one image."""
    raw = segmentation(
        folder,
        split={"csv": str(folder / "splits.csv")},
        concepts=["pixels", "truth"],
        dissect={"quantile": 0.1, "min_iou": 0.0} | how,
    )
    module = tiny(folder)["module"].rpartition(":")[0]
    wide = {"module": f"{module}:bright", "arguments": {"value": 1e6}, "weights": "random", "layers": ["bright"]}
    networks = {
        "tiny": tiny(folder, weights=str(folder / "tiny.pt")),
        "vit": {"module": f"{folder / 'vit.py'}:vit", "weights": "random", "numerics": {"micro_batch": 3}},
        "wide": wide | {"preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]}},
    }
    raw["networks"] = {name: networks[name] | {"store": store} for name in names}
    return raw | {"results": str(folder / results), "controls": {"images": 8}}


def outputs(plan: Plan) -> dict[str, bytes]:
    """The files that a dissection wrote, by network and name, or layer, labels, store and file."""
    found = {}
    for step in plan.of_stage("dissect"):
        home = plan.results / "photos" / step.network
        for name in ("units.csv", "units-permuted.csv"):
            if (home / name).exists():
                found[f"{step.network}/{name}"] = (home / name).read_bytes()
        for manifest in plan.manifest(step).includes:
            path = plan.results / manifest
            folder = path.parent.parent / path.stem.replace(".", "-", 1)
            labels = zarr.open_group(folder / "iou.zarr", mode="r").attrs["labels"]
            for store in STORES:
                for file in sorted((folder / store).rglob("*")):
                    if file.is_file():
                        name = file.relative_to(folder)
                        found[f"{step.network}/{path.parent.parent.name}/{labels}/{name}"] = file.read_bytes()
    return found


def different(plan: Plan, other: Plan) -> list[str]:
    mine, its = outputs(plan), outputs(other)
    assert mine.keys() == its.keys() and len(mine) > 50
    return [name for name in mine if mine[name] != its[name]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    hard_images(made)
    return made


@pytest.fixture(scope="module")
def stored(folder) -> Plan:
    """Dissected with every layer stored."""
    with pytest.MonkeyPatch.context() as patch:
        Here(patch)
        return run(experiment(folder, "full", "stored"), *STAGES)


def images_of(plan: Plan) -> int:
    """Images of the shards that are extracted."""
    shards = plan.manifest(plan.step("extract", "photos", "tiny")).result["shards"]
    return sum(min(4, len(NAMES) - 4 * shard) for shard in shards)


def fresh(folder: Path, name: str) -> str:
    shutil.rmtree(folder / name, ignore_errors=True)
    return name


def test_the_results_of_stored_layers_in_two_passes(folder, stored, here):
    plan = run(experiment(folder, "none", fresh(folder, "none")), *STAGES)
    assert different(plan, stored) == []
    names = [name.split("/")[::2] for name in outputs(plan)]
    assert {name for name, *_ in names} == {"tiny", "tiny-untrained", "vit", "wide"}
    assert ["tiny", "permuted"] in [name[:2] for name in names]
    for layer in (plan.results / "photos/layers").iterdir():
        assert not list(layer.glob("activations.zarr/activation/c/**/*")) and list(layer.glob("tails-*.zarr"))
    # Two passes over all images, a sample of at most four shards, and the two shards that hold refused label maps.
    images = images_of(plan)
    for name in ("tiny", "vit"):
        assert 8 < here.images[name] - 2 * images - 2 * 4 <= 16, here.images
    (entry,) = plan.manifest(plan.step("extract", "photos", "wide")).result["layers"]
    assert entry["scale"] == 32.0
    assert damage.verify(plan.results) == [] and not list((plan.scratch / "blocks").glob("*"))
    assert unreferenced.folders(plan.results) == []
    # Nothing is left to do, and what was refused stays refused.
    here.images.clear()
    run(experiment(folder, "none", "none"), *STAGES)
    assert here.images == {}


def test_other_settings_and_brackets_that_miss(folder, here, monkeypatch):
    wanted = run(experiment(folder, "full", fresh(folder, "stored-other"), ("tiny", "vit"), **OTHER), *STAGES)
    monkeypatch.setattr(stream, "BINS", 4)  # a bin of many codes proves nothing
    monkeypatch.setattr(stream, "ERRORS", -20.0)  # nor does a bracket beside the threshold
    plan = run(experiment(folder, "none", fresh(folder, "other"), ("tiny", "vit"), **OTHER), *STAGES)
    assert different(plan, wanted) == []
    assert here.tasks["save_tails"] > 0, "units were counted again"
    assert not list((plan.scratch / "blocks").glob("*"))


def test_counted_in_torch_where_the_maps_are(folder, stored, here, monkeypatch):
    """As on a GPU: maps stay tensors, and the kernels of torch count them."""
    as_stored = stream.as_stored
    monkeypatch.setattr(stream, "as_stored", lambda *given: torch.from_numpy(as_stored(*given)))
    for module in (stream, streamed):
        monkeypatch.setattr(module, "device", lambda: "cpu:0")
    plan = run(experiment(folder, "none", fresh(folder, "torch"), ("tiny", "vit")), *STAGES)
    its = outputs(stored)
    assert [name for name, data in outputs(plan).items() if data != its[name]] == []


@pytest.mark.usefixtures("workers")
def test_on_workers(folder, stored):
    plan = run(experiment(folder, "none", fresh(folder, "workers"), ("tiny",)), *STAGES)
    its = outputs(stored)
    assert [name for name, data in outputs(plan).items() if data != its[name]] == []


def test_a_run_that_is_cut_short_goes_on_after_the_last_block(folder, stored, here, monkeypatch):
    raw = experiment(folder, "none", fresh(folder, "cut"), ("tiny",))
    raw["networks"]["tiny"]["weights"] = "random"
    wanted = outputs(run(raw, *STAGES))
    whole, tasks = here.images["tiny"], dict(here.tasks)
    raw["results"] = str(folder / fresh(folder, "cut"))
    here.images.clear()
    here.tasks.clear()
    for function in ("extract_block", "count_block"):
        for _ in range(2):
            here.cut = {function: 1}
            with pytest.raises(RuntimeError, match="cut short"):
                run(raw, *STAGES)
    here.cut = {}
    plan = run(raw, *STAGES)
    # What is not cut into blocks is counted again: the two shards of refused label maps, in each of three runs.
    again = here.tasks["tail_block"] - tasks["tail_block"]
    assert here.images["tiny"] == whole + 4 * again and again <= 4
    assert here.tasks["extract_block"] == tasks["extract_block"] and here.tasks["count_block"] == tasks["count_block"]
    assert wanted and outputs(plan) == wanted
    assert damage.verify(plan.results) == []


def test_units_that_are_counted_again_go_on_after_the_last_block(folder, here, monkeypatch):
    monkeypatch.setattr(stream, "BINS", 4)
    monkeypatch.setattr(stream, "ERRORS", -20.0)
    raw = experiment(folder, "none", fresh(folder, "cut-again"), ("tiny",))
    raw["networks"]["tiny"]["weights"] = "random"
    wanted, tasks = outputs(run(raw, *STAGES)), dict(here.tasks)
    fresh(folder, "cut-again")
    here.tasks.clear()
    here.cut = {"save_tails": 1}
    with pytest.raises(RuntimeError, match="cut short"):
        run(raw, *STAGES)
    here.cut = {}
    assert wanted and outputs(run(raw, *STAGES)) == wanted
    assert here.tasks["save_tails"] == tasks["save_tails"], "no block is counted twice"
    assert here.tasks["tail_block"] == tasks["tail_block"] + 2, "the two shards of refused label maps"


def test_what_a_change_costs(folder, here):
    raw = experiment(folder, "none", fresh(folder, "changes"), ("tiny",))
    raw["networks"]["tiny"]["weights"] = "random"
    own = folder / "changing"
    shutil.rmtree(own, ignore_errors=True)
    for name in ("images", "maps"):
        shutil.copytree(folder / name, own / name)
    raw["datasets"]["photos"]["root"] = str(own / "images")
    raw["datasets"]["photos"]["concepts"] = ["truth"]
    plan = run(raw, *STAGES)
    # Another source of concepts: one pass to count it, and no extraction.
    here.images.clear()
    raw["datasets"]["photos"]["concepts"] = ["pixels", "truth"]
    run(raw, *STAGES)
    assert here.images == {"tiny": images_of(plan)}
    # Other names for the same IoU: nothing at all.
    here.images.clear()
    raw["datasets"]["photos"]["dissect"]["min_iou"] = 0.2
    run(raw, *STAGES)
    assert here.images == {}
    # One image: its block in the first pass, with the bracket that is there; everything in the second.
    layer = plan.manifest(plan.step("extract", "photos", "tiny")).result["layers"][0]
    (ledger,) = (plan.results / "photos/layers" / layer["id"]).glob("tails-*.ledger")
    before = len(lines(ledger))
    here.tasks.clear()
    write_image(own, NAMES[5], np.full((SIZE, SIZE, 3), 77, np.uint8))
    said = "\n".join(why.explain(plan.config.model_validate(raw)))
    assert "streamed layers counted in a forward pass" in said
    run(raw, *STAGES)
    assert here.tasks["extract_block"] == 1 and here.tasks["sample"] == 0 and len(lines(ledger)) == before + 1
    # Another quantile: other tails, and those of before are swept up.
    raw["datasets"]["photos"]["dissect"]["quantile"] = 0.2
    plan = run(raw, *STAGES)
    swept = [path for path in unreferenced.folders(plan.results) if path.name.startswith("tails-")]
    assert ledger.with_suffix(".zarr") in swept and len(swept) == 2


def test_stored_after_all_and_back(folder, stored, here):
    raw = experiment(folder, {"a": "none"}, fresh(folder, "both"), ("tiny",))
    plan = run(raw, *STAGES)
    entries = {e["name"]: e for e in plan.manifest(plan.step("extract", "photos", "tiny")).result["layers"]}
    assert entries["a"]["store"] == "none" and "store" not in entries["b"]
    raw["networks"]["tiny"]["store"] = "full"
    plan = run(raw, *STAGES)
    mine, its = outputs(plan), outputs(stored)
    assert all(mine[name] == its[name] for name in mine)
    raw["networks"]["tiny"]["store"] = "none"
    plan = run(raw, *STAGES)
    assert all(data == its[name] for name, data in outputs(plan).items())


def test_damage_is_found_and_made_again(folder, here):
    raw = experiment(folder, "none", fresh(folder, "damaged"), ("tiny",))
    plan = run(raw, *STAGES)
    wanted = outputs(plan)
    layer = plan.manifest(plan.step("extract", "photos", "tiny")).result["layers"][0]
    (chunk,) = (plan.results / "photos/layers" / layer["id"]).glob("tails-*.zarr/count/c/1/0")
    data = bytearray(chunk.read_bytes())
    data[-1] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(DamagedStoreError, match="checksum"):
        wanted_again = job(plan, "dissect", "photos", "tiny")
        for manifest in wanted_again.read().includes:
            (plan.results / manifest).unlink()
        wanted_again.stage.run(wanted_again)
    assert [found.file for found in damage.repair(plan.results)] == [chunk]
    here.tasks.clear()
    plan = run(raw, *STAGES)
    assert here.tasks["extract_block"] == 1
    assert outputs(plan) == wanted and damage.verify(plan.results) == []


def test_pictures_are_those_of_stored_maps(folder, stored, here, monkeypatch):
    for module in (pictures, cards):
        monkeypatch.setattr(module, "SAMPLE", 9)
    plan = run(experiment(folder, "none", fresh(folder, "pictures")), *STAGES)
    for name in ("tiny", "vit", "wide"):
        found = []
        for made in (stored, plan):
            out = folder / "cards" / made.results.name / name
            out.mkdir(parents=True, exist_ok=True)
            layers = read_dissection(made.results, "photos", name).layers
            assert [layer.shown is not None for layer in layers] == [made is plan] * len(layers)
            images = made.results / "photos/images.zarr"
            units = [range(zarr.open_group(layer.thresholds, mode="r")["threshold"].shape[0]) for layer in layers]
            cards_of = [
                cards.draw_units(out, str(k), images, layer, own, 4)
                for k, (layer, own) in enumerate(zip(layers, units, strict=True))
            ]
            found.append((cards_of, {path.name: path.read_bytes() for path in sorted(out.iterdir())}))
        assert found[0] == found[1] and len(found[0][1]) >= 2


def test_what_is_not_finite_is_named(folder, here):
    raw = experiment(folder, "none", fresh(folder, "infinite"), ("wide",))
    raw["networks"]["wide"]["arguments"] = {"value": "inf"}
    with pytest.raises(MicrotomeError, match=r"layer 'bright'.*'street/07\.png'.*not finite"):
        run(raw, *STAGES)


def test_ids_of_stored_layers_know_nothing_of_it(folder):
    from pipeline.run import experiment as run_experiment
    from pipeline.run import planner

    raw = experiment(folder, "full", "ids", ("tiny",))
    full = planner.make(run_experiment.parse(raw))
    assert not {"tails", "store"} & set(full.step("extract", "photos", "tiny").settings)
    raw["networks"]["tiny"]["store"] = "pooled"
    pooled = planner.make(run_experiment.parse(raw)).step("extract", "photos", "tiny")
    raw["datasets"]["photos"]["dissect"]["quantile"] = 0.2
    assert planner.make(run_experiment.parse(raw)).step("extract", "photos", "tiny") == pooled
    raw["networks"]["tiny"]["store"] = "none"
    one = planner.make(run_experiment.parse(raw)).step("extract", "photos", "tiny")
    raw["datasets"]["photos"]["dissect"]["quantile"] = 0.1
    assert one.id not in (pooled.id, planner.make(run_experiment.parse(raw)).step("extract", "photos", "tiny").id)


@pytest.mark.parametrize(("total", "length"), [(1, 1), (64, 1), (65, 2), (128, 2), (129, 4), (20_019, 512)])
def test_blocks_of_shards(total, length):
    found = stream.blocks(range(total), total)
    assert len(found) <= stream.BLOCKS and max(map(len, found.values())) == min(length, total)
    assert [shard for block in sorted(found) for shard in found[block]] == list(range(total))
    assert stream.blocks([3, 1], 4) == {1: [1], 3: [3]}
