"""The plan: which steps, what their ids depend on, and which manifests settling sets aside."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from experiments import SIZE, labelled_images, scenes, segmentation, tiny

from pipeline.errors import MicrotomeError
from pipeline.plan.settle import settle
from pipeline.plan.step import Plan
from pipeline.run import experiment, planner
from pipeline.stages.calibrate.settings import Calibration
from pipeline.storage.manifest import Manifest

ROOT = Path(__file__).parents[3]


def made(raw) -> Plan:
    return planner.make(experiment.parse(raw))


def trained(folder):
    """Scenes, and a network that is trained on them, with its control."""
    raw = scenes(folder)
    raw["networks"]["tiny"] |= {"weights": "train", "train": {"dataset": "scenes", "recipe": {"steps": 3}}}
    return raw


def test_a_plan_says_what_is_read_and_what_is_not(tmp_path):
    labelled_images(tmp_path, ["a", "b"])
    raw = segmentation(tmp_path)
    (name,) = raw["datasets"]
    (tmp_path / "labels.csv").write_text("image,label,notes\na.png,3,\nb.png,0,\n")
    raw["datasets"][name]["labels"] = str(tmp_path / "labels.csv")
    plan = made(raw)
    classes, concepts = plan.described
    assert classes.startswith(f"{name}: 4 classes (0 → 0, 1 → 1, 2 → 2, ...); images: ")
    assert "2 concepts (1 → left side, 2 → blob)" in concepts
    assert plan.notices == (f"{name}: labels.csv: not used: notes",)


def test_the_entry_of_a_checkpoint_is_in_the_id_only_where_it_is_named(tmp_path):
    raw = scenes(tmp_path)
    (tmp_path / "w.pt").write_bytes(b"weights")

    def network_step(**said):
        raw["networks"]["tiny"] |= {"weights": str(tmp_path / "w.pt")} | said
        plan = made(raw)
        return next(step for step in plan.steps.values() if step.stage == "network" and step.network == "tiny")

    plain = network_step()
    assert "within" not in plain.settings
    ema = network_step(within="ema")
    assert ema.settings == plain.settings | {"within": "ema"} and ema.id != plain.id
    for weights in ("random", "train"):
        with pytest.raises(MicrotomeError, match="`within` names an entry of a checkpoint of your own"):
            network_step(weights=weights, within="ema")


def everything(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_a_dry_run_writes_its_cache_alone_and_the_run_takes_it_over(tmp_path, monkeypatch):
    labelled_images(tmp_path, ["a", "b"])
    raw = segmentation(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = everything(tmp_path)
    plan = planner.make(experiment.parse(raw), dry=True)
    assert plan.scratch.parent == tmp_path / "cache/microtome"
    written = everything(plan.scratch)
    assert written and everything(tmp_path) - before == {
        "cache",
        "cache/microtome",
        *(path.relative_to(tmp_path).as_posix() for path in (plan.scratch, *plan.scratch.rglob("*"))),
    }
    real = made(raw)
    assert real.steps == plan.steps and not plan.scratch.exists()
    assert real.scratch == tmp_path / "results/.microtome" and written <= everything(real.scratch)
    assert planner.make(experiment.parse(raw), dry=True).scratch == real.scratch


def test_a_dry_run_of_results_that_cannot_be_written_and_one_without_a_home(tmp_path, monkeypatch):
    raw = scenes(tmp_path)
    (tmp_path / "results").mkdir()
    access = os.access
    monkeypatch.setattr("pipeline.storage.dry_cache.os.access", lambda path, mode: Path(path) != tmp_path / "results")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert planner.make(experiment.parse(raw), dry=True).scratch.parent == tmp_path / "cache/microtome"
    assert not list((tmp_path / "results").iterdir())

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert planner.make(experiment.parse(raw), dry=True).scratch.name.startswith("microtome-")
    monkeypatch.setattr("pipeline.storage.dry_cache.os.access", access)
    assert made(raw).scratch == tmp_path / "results/.microtome"
    with pytest.raises(MicrotomeError, match=r"results: there is no home folder for `~` in ~/x: give the whole path"):
        experiment.parse(raw | {"results": "~/x"})


def ids(raw) -> dict[str, str]:
    return {step.name: step.id for step in made(raw).steps.values()}


def test_the_steps_of_an_experiment(tmp_path):
    wanted = made(trained(tmp_path))
    assert [step.name for step in wanted.steps.values()] == [
        "ingest scenes",
        "concepts scenes",
        "network tiny",
        "network tiny-untrained",
        "extract scenes tiny",
        "extract scenes tiny-untrained",
        "dissect scenes tiny",
        "dissect scenes tiny-untrained",
        "report",
    ]
    done: set[str] = set()
    for path, step in wanted.steps.items():
        assert path == step.manifest and path.endswith(f"/done/{step.stage}.{step.id}.json")
        assert set(step.parents) <= done
        done.add(path)
    network = wanted.step("network", network="tiny")
    assert network.parents == (wanted.step("ingest", "scenes").manifest,)
    assert wanted.step("network", network="tiny-untrained").parents == ()


def test_a_random_network_is_its_own_control(tmp_path):
    assert list(made(scenes(tmp_path)).networks) == ["tiny"]


def test_a_network_on_some_data_sets_only(tmp_path):
    labelled_images(tmp_path, ["a"])
    raw = scenes(tmp_path)
    raw["datasets"] |= segmentation(tmp_path)["datasets"]
    raw["networks"]["tiny"]["datasets"] = ["photos"]
    assert {step.dataset for step in made(raw).of_stage("extract")} == {"photos"}
    assert {step.dataset for step in made(raw).of_stage("concepts")} == {"photos"}


def test_ids_do_not_depend_on_the_order_of_keys(tmp_path):
    def reverse(value):
        return {key: reverse(value[key]) for key in reversed(value)} if isinstance(value, dict) else value

    raw = trained(tmp_path)
    raw["networks"]["other"] = tiny(tmp_path, seed=3)
    one, other = ids(raw), ids(reverse(raw))
    del one["report"], other["report"]  # the page shows networks in the order in which they are listed
    assert one == other


def test_ids_are_the_same_in_another_process(tmp_path):
    raw = trained(tmp_path)
    code = "import json, sys; from pipeline.run import experiment, planner;"
    code += "p = planner.make(experiment.parse(json.load(sys.stdin)));"
    code += "assert 'torch' not in sys.modules; print(json.dumps({s.name: s.id for s in p.steps.values()}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "3"}
    output = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(raw), capture_output=True, text=True, env=environment, check=True
    )
    assert json.loads(output.stdout) == ids(raw)


EVERYTHING = {"ingest", "concepts", "network", "extract", "dissect", "report"}
CHANGES = {
    "datasets.scenes.seed": (1, EVERYTHING),
    "datasets.scenes.size": (SIZE + 1, EVERYTHING),
    "datasets.scenes.images.validation": (21, EVERYTHING),
    "datasets.scenes.shard_images": (16, EVERYTHING),
    "datasets.scenes.concepts": (["truth"], {"concepts", "dissect", "report"}),
    "datasets.scenes.dissect.quantile": (0.02, {"dissect", "report"}),
    "datasets.scenes.dissect.positions": ("native", {"dissect", "report"}),
    "datasets.scenes.dissect.border": ("zeros", {"dissect", "report"}),
    "datasets.scenes.dissect.union": ("category", {"dissect", "report"}),
    "datasets.scenes.dissect.min_iou": (0.1, {"dissect", "report"}),
    "datasets.scenes.dissect.method": ("pnas2020", {"dissect", "report"}),
    "datasets.scenes.dissect.split": ("train", {"concepts", "extract", "dissect", "report"}),
    "networks.tiny.seed": (1, {"network", "extract", "dissect", "report"}),
    "networks.tiny.arguments.units": (6, {"network", "extract", "dissect", "report"}),
    "networks.tiny.train.recipe.steps": (4, {"network", "extract", "dissect", "report"}),
    "networks.tiny.train.split": ("validation", {"network", "extract", "dissect", "report"}),
    "networks.tiny.preprocessing.mean": ([0, 0, 0], {"network", "extract", "dissect", "report"}),
    "networks.tiny.numerics.micro_batch": (8, {"extract", "dissect", "report"}),
    "networks.tiny.numerics.channels_last": (False, {"extract", "dissect", "report"}),
    "networks.tiny.layers": (["a"], {"extract", "dissect", "report"}),
    "networks.tiny.special_tokens": (1, {"extract", "dissect", "report"}),
    "networks.tiny.ablate.draws": (3, {"report"}),  # the section adds a step, and changes none
    "calibrate.share": (0.9, {"report"}),  # as before
    "sight.images": (64, {"report"}),  # as before
    "controls.images": (8, {"dissect", "report"}),
    "report.title": ("Another", {"report"}),
    "figures.width": ("one", {"report"}),
    "name": ("other", {"report"}),
    "results": ("elsewhere", set()),
    "cluster.workers": (2, set()),
}


@pytest.mark.parametrize("key", CHANGES)
def test_each_setting_changes_the_ids_of_what_depends_on_it_and_no_other(tmp_path, key):
    value, expected = CHANGES[key]
    raw = trained(tmp_path)
    before = ids(raw)
    *path, last = key.split(".")
    changed = copy.deepcopy(raw)
    section = changed
    for part in path:
        section = section.setdefault(part, {})
    section[last] = str(tmp_path / value) if key == "results" else value
    after = ids(changed)
    # the untrained control is another network: what belongs to training alone does not touch it
    names = [name for name in before if not name.endswith("-untrained")]
    assert {name.split()[0] for name in names if before[name] != after[name]} == expected


def test_settings_of_ablation_change_nothing_before_it(tmp_path):
    raw = trained(tmp_path)
    raw["networks"]["tiny"]["ablate"] = {}
    before = ids(raw)
    assert "ablate scenes tiny" in before and "ablate scenes tiny-untrained" not in before
    for key, value in {"replace": "mean", "rank": "validation", "images": 5, "sizes": [1], "layers": ["a"]}.items():
        raw["networks"]["tiny"]["ablate"] = {key: value}
        after = ids(raw)
        assert {name for name in before if before[name] != after[name]} == {"ablate scenes tiny", "report"}, key
    raw["networks"]["tiny"]["ablate"] = {
        "judge": "validation",
        "sizes": [1024, *[1, 2, 3, 4, 5, 20, 64, 128, 256, 512]],
    }
    assert ids(raw) == before  # what is the default already


def test_settings_of_calibration_change_nothing_before_it(tmp_path):
    raw = trained(tmp_path)
    raw["datasets"]["scenes"]["images"] = {"train": 6, "validation": 40}
    raw["calibrate"] = {}
    before = ids(raw)
    assert "calibrate scenes tiny" in before and "calibrate scenes tiny-untrained" not in before
    for key, value in {"splits": 3, "share": 0.6, "bins": 10, "penalty": 2, "methods": ["vector"]}.items():
        raw["calibrate"] = {key: value}
        after = ids(raw)
        assert {name for name in before if before[name] != after[name]} == {"calibrate scenes tiny", "report"}, key
    raw["calibrate"] = {"networks": ["tiny"], "datasets": ["scenes"], "methods": [*reversed(get_args(Calibration))]}
    assert ids(raw) == before  # what is the default already
    raw["calibrate"] = {"networks": []}
    assert "calibrate scenes tiny" not in ids(raw)


def test_training_does_not_touch_the_untrained_control(tmp_path):
    raw = trained(tmp_path)
    before = ids(raw)
    raw["networks"]["tiny"]["train"]["recipe"]["steps"] = 4
    after = ids(raw)
    assert {name for name in before if before[name] != after[name] and "untrained" in name} == set()


def test_the_bound_on_controls_bounds_the_untrained_network(tmp_path):
    raw = trained(tmp_path)
    before = ids(raw)
    after = ids(raw | {"controls": {"images": 8}})
    assert before["extract scenes tiny"] == after["extract scenes tiny"]
    assert before["extract scenes tiny-untrained"] != after["extract scenes tiny-untrained"]


def test_an_edited_module_or_checkpoint_is_another_network(tmp_path):
    raw = scenes(tmp_path)
    checkpoint = tmp_path / "weights.pt"
    checkpoint.write_bytes(b"one")
    raw["networks"]["tiny"]["weights"] = str(checkpoint)
    before = ids(raw)
    checkpoint.write_bytes(b"two")
    assert ids(raw)["network tiny"] != before["network tiny"]
    assert ids(raw)["network tiny-untrained"] == before["network tiny-untrained"]
    checkpoint.write_bytes(b"one")
    assert ids(raw) == before
    with (tmp_path / "network.py").open("a") as file:
        file.write("# edited\n")
    assert ids(raw)["network tiny-untrained"] != before["network tiny-untrained"]


def test_a_touched_or_changed_image_is_another_listing(tmp_path):
    labelled_images(tmp_path, ["a", "b"])
    before = ids(segmentation(tmp_path))
    assert ids(segmentation(tmp_path)) == before
    os.utime(tmp_path / "images/a.png", ns=(1, 1))
    assert ids(segmentation(tmp_path))["ingest photos"] != before["ingest photos"]
    labelled_images(tmp_path, ["c"])
    assert ids(segmentation(tmp_path))["ingest photos"] != before["ingest photos"]


def test_a_plan_is_read_as_it_was_saved(tmp_path):
    wanted = made(trained(tmp_path))
    path = planner.save(wanted)
    again = planner.read(path)
    assert again.config == wanted.config and list(again.steps) == list(wanted.steps)
    assert again == wanted
    assert planner.save(wanted) == path


def test_a_job_for_another_id_is_refused(tmp_path):
    wanted = made(scenes(tmp_path))
    step = wanted.step("ingest", "scenes")
    assert wanted.wanted("ingest", step.id, "scenes") is step
    with pytest.raises(MicrotomeError, match=f"ingest scenes: the configuration makes {step.id}, not {'0' * 20}"):
        wanted.wanted("ingest", "0" * 20, "scenes")
    with pytest.raises(MicrotomeError, match="no step ingest photos"):
        wanted.wanted("ingest", step.id, "photos")


# Settling -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """A plan of which every step has a manifest, and the extraction one of a shared layer."""
    wanted = made(trained(tmp_path))
    layer = "scenes/layers/aa/done/activations.bb.json"
    Manifest("activations", "bb", "layer").write(wanted.results / layer)
    for step in wanted.steps.values():
        parents = {path: wanted.manifest(wanted.steps[path]).digest for path in step.parents}
        includes = {layer: "layer"} if step.name == "extract scenes tiny" else {}
        manifest = Manifest(step.stage, step.id, f"output of {step.name}", parents, includes=includes)
        manifest.write(wanted.results / step.manifest)
    return wanted


def there(wanted: Plan) -> set[str]:
    return {step.name for step in wanted.steps.values() if (wanted.results / step.manifest).exists()}


def path_of(wanted: Plan, name: str) -> Path:
    return wanted.results / next(step.manifest for step in wanted.steps.values() if step.name == name)


def rewrite(wanted: Plan, name: str, **changes) -> None:
    path = path_of(wanted, name)
    Manifest(**(Manifest.read(path).__dict__ | changes)).write(path)


ALL = {
    "ingest scenes", "concepts scenes", "network tiny", "network tiny-untrained", "extract scenes tiny",
    "dissect scenes tiny", "extract scenes tiny-untrained", "dissect scenes tiny-untrained", "report",
}  # fmt: skip
OF_TINY = {"extract scenes tiny", "dissect scenes tiny", "report"}


def test_nothing_to_settle(finished):
    assert settle(finished) == []
    assert there(finished) == ALL


def test_a_missing_parent_takes_its_children_with_it(finished):
    path_of(finished, "network tiny").unlink()
    said = settle(finished)
    assert there(finished) == ALL - {"network tiny"} - OF_TINY
    assert [line.partition(":")[0] for line in said] == ["extract scenes tiny", "dissect scenes tiny", "report"]
    assert all("is not there" in line for line in said)
    aside = finished.scratch / "aside" / finished.step("extract", "scenes", "tiny").manifest
    assert Manifest.read(aside).stage == "extract"
    assert settle(finished) == []


def test_a_network_trained_again_with_another_output(finished):
    rewrite(finished, "network tiny", digest="other weights")
    said = settle(finished)
    assert there(finished) == ALL - OF_TINY
    assert "tiny/done/network." in said[0] and "has another output than the one that was read" in said[0]


def test_a_network_trained_again_with_the_same_output(finished):
    rewrite(finished, "network tiny", provenance={"began": 5})
    assert settle(finished) == [] and there(finished) == ALL


def test_a_damaged_manifest(finished):
    path = path_of(finished, "concepts scenes")
    path.write_bytes(path.read_bytes()[:-20])
    said = settle(finished)
    assert "concepts scenes: the manifest" in said[0] and "damaged" in said[0]
    assert there(finished) == ALL - {
        "concepts scenes",
        "dissect scenes tiny",
        "dissect scenes tiny-untrained",
        "report",
    }


@pytest.mark.parametrize("what", ["missing", "other"])
def test_a_shared_layer_that_is_not_what_it_was(finished, what):
    path = finished.results / "scenes/layers/aa/done/activations.bb.json"
    if what == "missing":
        path.unlink()
    else:
        Manifest("activations", "bb", "other").write(path)
    said = settle(finished)
    assert there(finished) == ALL - OF_TINY
    assert ("is not there" if what == "missing" else "another output than the one that was written") in said[0]


def test_a_dry_run_only_reports(finished):
    rewrite(finished, "ingest scenes", digest="other images")
    before = {path: path.read_bytes() for path in finished.results.rglob("*.json")}
    said = settle(finished, dry=True)
    assert len(said) == len(ALL) - 2  # all but the ingest itself and the untrained weights
    assert {path: path.read_bytes() for path in finished.results.rglob("*.json")} == before
    assert settle(finished) == said


def test_an_empty_results_folder(tmp_path):
    assert settle(made(scenes(tmp_path))) == []
