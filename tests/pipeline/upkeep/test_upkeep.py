"""Damage is found and only that is made again; what nothing refers to goes; why says what a run would do."""

import json
import os
import shutil

import pytest
from experiments import job, labelled_images, lines, run, scenes, segmentation, tiny

from pipeline.errors import MicrotomeError
from pipeline.plan.job import UNFINISHED
from pipeline.plan.stage import nothing
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages import registry
from pipeline.storage.lock import RunLock
from pipeline.storage.store import remove_partials
from pipeline.upkeep import damage, unreferenced
from pipeline.upkeep.__main__ import main
from pipeline.upkeep.recompute import discard
from pipeline.upkeep.why import explain

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "concepts", "network", "extract", "dissect")
NAMES = [f"town/{i}" for i in range(6)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, workers):
    """A finished experiment and its configuration."""
    folder = tmp_path_factory.mktemp("finished")
    labelled_images(folder, NAMES)
    raw = segmentation(folder)
    run(raw, *STAGES)
    return folder, raw


@pytest.fixture
def experiment(finished, tmp_path):
    """A copy of it, whose images are those of the first."""
    folder, raw = finished
    shutil.copytree(folder / "results", tmp_path / "results")
    return raw | {"results": str(tmp_path / "results")}, tmp_path / "results"


def flip(path, at=-1):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def layer_store(results):
    return sorted(results.glob("photos/layers/*/activations.zarr"))[0]


def stamps(results):
    """Inode and time of every chunk file."""
    return {
        path.relative_to(results).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in results.rglob("c/**/*")
        if path.is_file()
    }


DAMAGE = {
    "flipped": lambda path, other: flip(path),
    "truncated": lambda path, other: path.write_bytes(path.read_bytes()[:-3]),
    "emptied": lambda path, other: path.write_bytes(b""),
    "deleted": lambda path, other: path.unlink(),
    "swapped": lambda path, other: path.write_bytes(other.read_bytes()),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_chunk_is_found_and_alone_made_again(experiment, what):
    raw, results = experiment
    store = layer_store(results)
    chunk, other = store / "activation/c/0/0/0/0", store / "activation/c/1/0/0/0"
    original, before = chunk.read_bytes(), stamps(results)
    DAMAGE[what](chunk, other)
    found = damage.verify(results)
    assert [one.file for one in found] == [chunk]
    assert f"{store.parent.name}/activations.zarr/activation/c/0/0/0/0: " in str(found[0])

    damage.repair(results)
    run(raw, *STAGES)
    assert chunk.read_bytes() == original
    assert damage.verify(results) == []
    after = stamps(results)
    own = {name for name in before if store.name in name and store.parent.name in name and "/c/0/" in name}
    # The shard's other arrays are written with it; nothing else is, down to the results of the layer.
    assert {name for name in before if after.get(name) != before[name]} <= own


@pytest.mark.parametrize("then", ["removed", "written again", "folder removed"])
def test_what_a_run_changes_meanwhile_is_told_and_no_damage(experiment, monkeypatch, capsys, then):
    """A run first removes the manifests of what it rewrites; a ledger grows with each shard."""
    _, results = experiment
    flip(next(path for path in layer_store(results).glob("activation/c/0/**/*") if path.is_file()))
    (real,) = damage.verify(results)
    assert main(["verify", str(results)]) == 1
    compare = damage._compare

    def meanwhile(folder, name, *recorded):
        found = compare(folder, name, *recorded)
        if found is not None:
            match then:
                case "removed":
                    real.record.unlink()
                case "written again":
                    real.record.write_bytes(real.record.read_bytes() + b"\n")
                case "folder removed":
                    shutil.rmtree(results / "photos" / "tiny")
                    real.record.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(damage, "_compare", meanwhile)
    capsys.readouterr()
    assert main(["verify", str(results)]) == 0
    assert f"{real.record}: what it records changed while this looked" in capsys.readouterr().out


def test_damaged_metadata_costs_no_chunk(experiment):
    raw, results = experiment
    before = stamps(results)
    files = [layer_store(results) / "zarr.json", results / "photos/images.zarr/zarr.json"]
    files += [results / "photos/concepts.zarr/label_map/zarr.json", results / "photos/concepts.zarr/zarr.json"]
    originals = [file.read_bytes() for file in files]
    for file in files:
        file.write_text("{")
    assert {one.file for one in damage.verify(results)} == set(files)
    damage.repair(results)
    run(raw, *STAGES)
    assert [file.read_bytes() for file in files] == originals
    arrays = ("/activation/", "/image/", "/label_map/")
    kept = {name: stamp for name, stamp in before.items() if any(array in name for array in arrays)}
    after = stamps(results)
    assert {name: after[name] for name in kept} == kept


def test_a_damaged_manifest_is_found_and_the_step_done_again_without_work(experiment):
    raw, results = experiment
    (manifest,) = results.glob("photos/tiny/done/extract.*.json")
    flip(manifest, 200)
    (found,) = damage.verify(results)
    assert found.file == manifest and "damaged" in found.what
    before = stamps(results)
    damage.repair(results)
    run(raw, *STAGES)
    assert manifest.exists() and stamps(results) == before


def test_shards_of_an_unfinished_step_are_verified_too(experiment):
    _, results = experiment
    store = layer_store(results)
    for manifest in [*results.glob("photos/tiny/done/*.json"), *results.glob("photos/layers/*/done/*.json")]:
        manifest.unlink()
    assert damage.verify(results) == []
    flip(store / "activation/c/1/0/0/0")
    (found,) = damage.verify(results)
    assert found.file == store / "activation/c/1/0/0/0" and found.record.suffix == ".ledger"


def test_a_smaller_data_set_under_the_same_name_is_no_damage(tmp_path):
    """Ledgers remember shards of the larger one, whose chunks went with it."""
    for count in (20, 9):
        raw = scenes(tmp_path)
        raw["datasets"]["scenes"] |= {"images": {"train": 0, "validation": count}, "seed": count}
        made = run(raw, "ingest", "concepts")
        assert damage.verify(made.results) == []
    flip(made.results / "scenes/concepts.zarr/label_map/c/1/0/0/0")
    assert len(damage.verify(made.results)) == 1


def test_upkeep_holds_the_lock(experiment, capsys):
    """And leaves no sign of a run that was cut short, unless one was there."""
    _, results = experiment
    lock = RunLock(results)
    with lock:
        for command in ("repair", "gc"):
            with pytest.raises(MicrotomeError, match="another run works on"):
                main([command, str(results)])
    assert main(["gc", str(results)]) == main(["repair", str(results)]) == 0
    lock.acquire()
    assert not lock.left_open
    lock.file.close()  # as a killed run leaves it
    assert main(["repair", str(results)]) == 0
    after = RunLock(results)
    after.acquire()
    assert after.left_open
    after.release()


def test_nothing_is_swept_up_that_is_referred_to(experiment):
    _, results = experiment
    assert unreferenced.folders(results) == []


def test_what_is_no_longer_referred_to(experiment, capsys):
    raw, results = experiment
    once = sorted(results.glob("photos/layers/*/"))
    run(raw | {"networks": {"tiny": raw["networks"]["tiny"] | {"layers": ["b"], "seed": 4}}}, *STAGES)
    found = unreferenced.folders(results)
    assert sorted(found) == once, "the layers of the weights that were there before"
    assert main(["gc", str(results)]) == 0
    assert all(folder.is_dir() for folder in once)
    assert "YES=1" in capsys.readouterr().out
    assert main(["gc", str(results), "--yes"]) == 0
    assert not [folder for folder in once if folder.exists()]
    assert unreferenced.folders(results) == []
    assert damage.verify(results) == []


def test_what_a_person_keeps_beside_results_is_left_alone(experiment, tmp_path, capsys):
    """Folders and files without an id of ours, and what links lead to, whatever they are called."""
    raw, results = experiment
    old = sorted(results.glob("photos/layers/*/"))[0]
    kept = [
        results / "photos/layers/important",
        results / "networks/tiny/training-notes",
        results / "photos/tiny/before/mine",
        results / "randomization/mine/runs/thesis",
        results / "photos/layers/0123456789abcdef0123-copy",
        old / "dissect-by-hand",
        old / "tails-mine.zarr",
    ]
    outside = tmp_path / "outside" / old.name
    for folder in [*kept, outside]:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
    (results / "photos/layers/00000000000000000000").symlink_to(outside)
    (results / "elsewhere").symlink_to(tmp_path / "outside")
    (tmp_path / "outside/layers/11111111111111111111").mkdir(parents=True)
    for name in ("notes.json", "ingest.json", ".extract.00000000000000000000.json"):
        (results / "photos/done" / name).write_text("mine")
    for name in results.glob("networks/tiny/done/network.*.json"):
        (results / "photos/done/network.00000000000000000000.json").symlink_to(name)
    assert unreferenced.folders(results) == [] and damage.verify(results) == []
    assert main(["gc", str(results), "--yes"]) == main(["repair", str(results)]) == 0
    assert all((folder / "notes.txt").read_text() == "mine" for folder in [*kept, outside])
    assert (results / "photos/done/notes.json").read_text() == "mine"
    assert (tmp_path / "outside/layers/11111111111111111111").is_dir()
    # What is ours goes beside them.
    run(raw | {"networks": {"tiny": raw["networks"]["tiny"] | {"layers": ["b"], "seed": 4}}}, *STAGES)
    assert len(unreferenced.folders(results)) == 2


@pytest.mark.parametrize("command", ["verify", "repair", "gc"])
def test_no_other_folder_is_touched(tmp_path, command):
    (tmp_path / "layers/0123456789abcdef0123").mkdir(parents=True)
    for folder, said in ((tmp_path, "is no results folder"), (tmp_path / "none", "no such results folder")):
        with pytest.raises(MicrotomeError, match=said):
            main([command, str(folder)])
    assert (tmp_path / "layers/0123456789abcdef0123").is_dir()


def test_another_quantile_leaves_results_behind(experiment):
    raw, results = experiment
    before = set(results.glob("photos/layers/*/dissect-*/"))
    dataset = raw["datasets"]["photos"] | {"dissect": {"quantile": 0.05}}
    run(raw | {"datasets": {"photos": dataset}}, *STAGES)
    assert set(unreferenced.folders(results)) == before
    assert before
    for folder in before:
        unreferenced.remove(folder)
    assert damage.verify(results) == []


def test_the_layers_of_an_interrupted_extraction_are_spared(experiment, monkeypatch):
    raw, results = experiment
    other = raw | {"networks": {"tiny": raw["networks"]["tiny"] | {"seed": 5}}}
    before = set(results.glob("photos/layers/*/"))
    monkeypatch.setattr("pipeline.stages.extract.stage.finish_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(other, *STAGES)
    monkeypatch.undo()
    begun = set(results.glob("photos/layers/*/")) - before
    assert len(begun) == 2
    assert not begun & set(unreferenced.folders(results))
    run(other, *STAGES)
    assert [len(lines(folder / "activations.ledger")) for folder in begun] == [2, 2], "each shard was made once"
    assert before <= set(unreferenced.folders(results))


def test_the_results_of_an_interrupted_dissection_are_spared(experiment, monkeypatch):
    raw, results = experiment
    dataset = raw["datasets"]["photos"] | {"dissect": {"quantile": 0.05}}
    before = set(results.glob("photos/layers/*/dissect-*/"))
    monkeypatch.setattr("pipeline.stages.dissect.stage.unit_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(raw | {"datasets": {"photos": dataset}}, *STAGES)
    monkeypatch.undo()
    begun = set(results.glob("photos/layers/*/dissect-*/")) - before
    assert begun and not begun & set(unreferenced.folders(results))


def test_a_folder_that_was_being_written_is_cleared_away(tmp_path):
    """`replaced.keep` fills one before it gives it its name."""
    (tmp_path / "net/before/.abc.partial").mkdir(parents=True)
    (tmp_path / "net/before/.abc.partial/units.csv").write_text("half")
    (tmp_path / "net/.x.partial").write_text("half")
    remove_partials(tmp_path)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "net", tmp_path / "net/before"]


@pytest.mark.parametrize("command", ["gc", "repair"])
def test_a_folder_that_holds_no_results_is_left_alone(tmp_path, command):
    with pytest.raises(MicrotomeError, match="is no results folder"):
        main([command, str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_a_results_folder_without_its_scratch_folder_is_repaired(experiment):
    _, results = experiment
    shutil.rmtree(results / ".microtome")
    path = next(path for path in layer_store(results).glob("activation/c/**/*") if path.is_file())
    flip(path)
    assert main(["repair", str(results)]) == 0
    assert not path.exists()


@pytest.mark.parametrize("name", registry.STAGES)
def test_every_stage_says_what_it_made(name):
    made = registry.STAGES[name].made
    assert callable(made) and made is not nothing


def interrupt(*_):
    raise KeyboardInterrupt


def why(raw):
    return explain(run_experiment.parse(raw))


def test_why_nothing_would_run(experiment):
    raw, _ = experiment
    assert [line for line in why(raw) if not line.startswith(" ")] == ["report", "1 steps and 1 that were never timed"]


def test_why_a_setting_changes_something(experiment):
    raw, _ = experiment
    dataset = raw["datasets"]["photos"] | {"dissect": {"quantile": 0.05}}
    said = "\n".join(why(raw | {"datasets": {"photos": dataset}}))
    assert (
        "dissect photos tiny\n    dissect.quantile: 0.01 → 0.05\n    → counted from the stores, without a forward"
        in said
    )
    assert "ingest" not in said and "extract" not in said


def test_why_says_how_much_would_be_made(experiment, finished):
    raw, results = experiment
    folder, _ = finished
    image = folder / "images/town/3.png"
    before = image.stat()
    try:
        os.utime(image)
        said = "\n".join(why(raw))
    finally:
        os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert "ingest photos\n    listing changed\n    → 1 of 2 shards of images to decode, about" in said
    assert "at most 1 shards to put through the network" in said

    store = layer_store(results)
    (store / "activation/c/1/0/0/0").unlink()
    for manifest in [*results.glob("photos/tiny/done/*.json"), *store.parent.glob("done/activations.*.json")]:
        if "extract" not in manifest.name:
            manifest.unlink()
    said = "\n".join(why(raw))
    assert (
        "extract photos tiny\n" in said
        and "is not there\n    → 1 of 2 shards to put through the network, about" in said
    )


def test_why_for_weights_that_changed(experiment):
    raw, _ = experiment
    said = "\n".join(why(raw | {"networks": {"tiny": raw["networks"]["tiny"] | {"seed": 9}}}))
    assert "network tiny\n    random: 0 → 9" in said
    assert "reads network tiny, whose inputs change\n    → at most 2 shards" in said


def test_why_from_the_shell(experiment, tmp_path, capsys):
    import yaml

    raw, _ = experiment
    (tmp_path / "mini.yaml").write_text(yaml.safe_dump(raw))
    assert main(["why", str(tmp_path / "mini.yaml"), "--only", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("report\n")
    with pytest.raises(MicrotomeError, match="no network or data set has this name; nearest: tiny"):
        main(["why", str(tmp_path / "mini.yaml"), "--only", "tinny"])


@pytest.mark.parametrize("name", STAGES)
def test_recompute_throws_away_what_a_stage_made_and_no_more(experiment, name):
    raw, results = experiment
    before = stamps(results)
    removed = discard(run_experiment.parse(raw), name)
    assert removed
    run(raw, *STAGES)
    after = stamps(results)
    coordinate = "photos/concepts.zarr/category/c/0"  # written by each run of its stage, since it is small
    again = {path for path in before if after[path] != before[path] and path != coordinate}
    of_stage = {
        "ingest": lambda path: "images.zarr" in path,
        "concepts": lambda path: "concepts.zarr" in path,
        "network": lambda path: False,
        "extract": lambda path: "activations.zarr" in path or "logits.zarr" in path,
        "dissect": lambda path: "/dissect-" in path,
    }[name]
    assert again == {path for path in before if of_stage(path) and path != coordinate}
    assert damage.verify(results) == []


def test_recompute_of_an_unknown_stage(experiment):
    raw, _ = experiment
    with pytest.raises(MicrotomeError, match="no stage 'extrakt'; nearest: extract"):
        discard(run_experiment.parse(raw), "extrakt")


def test_recompute_of_a_trained_network(tmp_path):
    network = tiny(tmp_path, weights="train", train={"dataset": "scenes", "recipe": {"steps": 2, "batch_size": 4}})
    raw = scenes(tmp_path, networks={"tiny": network | {"arguments": {"classes": 12}}})
    made = run(raw, "ingest", "network")
    home = made.results / "networks/tiny"
    before = (home / "model.safetensors").read_bytes()
    (training,) = home.glob("training-*")
    written = (training / "checkpoint.pt").stat().st_mtime_ns
    assert unreferenced.folders(made.results) == []
    discard(run_experiment.parse(raw), "network")
    assert not training.exists()
    run(raw, "network")
    assert (home / "model.safetensors").read_bytes() == before
    assert (training / "checkpoint.pt").stat().st_mtime_ns > written


def test_a_note_of_what_a_step_fills_goes_when_it_is_finished(experiment):
    raw, results = experiment
    made = planner.make(run_experiment.parse(raw))
    extraction = job(made, "extract", "photos", "tiny")
    extraction.refers_to([results / "photos/layers/x"])
    notes = list((results / ".microtome" / UNFINISHED).glob("*.json"))
    assert len(notes) == 1 and extraction.noted() == ["photos/layers/x"]
    assert json.loads(notes[0].read_text()) == {"step": "extract photos tiny", "folders": ["photos/layers/x"]}
    extraction.manifest.unlink()
    extraction.stage.run(extraction)
    assert not list((results / ".microtome" / UNFINISHED).glob("*.json")) and extraction.noted() == []


@pytest.mark.parametrize("text", [b'{"step": "extract', b"", b"\xff", b"[]", b'{"step": "a"}', b'{"folders": "a"}'])
def test_a_damaged_note_of_what_a_step_fills_stops_gc(tmp_path, text):
    raw = scenes(tmp_path)
    extraction = job(planner.make(run_experiment.parse(raw)), "extract", "scenes", "tiny")
    extraction.refers_to([extraction.results / "scenes/layers/x"])
    assert unreferenced.folders(extraction.results) == []
    (note,) = (extraction.scratch / UNFINISHED).glob("*.json")
    note.write_bytes(text)
    with pytest.raises(MicrotomeError, match=f"{note.name} is damaged.*remove"):
        unreferenced.folders(extraction.results)
    assert extraction.noted() == []
