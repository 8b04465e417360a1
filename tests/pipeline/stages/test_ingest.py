"""Ingest: what is decoded, what is refused, and what is done again when images come, change or go."""

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from experiments import SIZE, job, labelled_images, lines, run, scenes, segmentation, write_image
from PIL import Image

from pipeline.data import kinds
from pipeline.data.arrays import npz_image
from pipeline.data.decode import ChangedError
from pipeline.data.kinds import read_image
from pipeline.errors import MicrotomeError
from pipeline.plan.step import Plan
from pipeline.run import experiment, planner
from pipeline.stages.registry import STAGES
from pipeline.storage.store import Reader

pytestmark = pytest.mark.usefixtures("workers")
NAMES = [f"street/{k:02}" for k in range(10)]


def imagefolder(folder: Path, **changes):
    dataset = {"kind": "imagefolder", "root": str(folder / "images"), "shard_images": 4, "max_bad_fraction": 0.5}
    return segmentation(folder) | {"datasets": {"photos": dataset | changes}}


def stored(folder: Path, name: str):
    return zarr.open_group(folder / "results/photos/images.zarr", mode="r", use_consolidated=False)[name][:]


def made(folder: Path) -> list[str]:
    """The shards that were decoded so far, by number, in order."""
    return [entry["shard"] for entry in lines(folder / "results/photos/images.ledger")]


def ingest_manifest(plan: Plan):
    return plan.manifest(next(plan.of_stage("ingest")))


def test_scenes_as_they_are_drawn(tmp_path):
    plan = run(scenes(tmp_path), "ingest")
    facts = ingest_manifest(plan).result
    assert (facts["images"], facts["size"], facts["shard_images"], facts["refused"]) == (26, [SIZE, SIZE], 8, 0)
    store = plan.results / "scenes" / "images.zarr"
    group = zarr.open_group(store, mode="r", use_consolidated=False)
    ids = group["image_id"][:].astype(object)
    assert sorted(ids) == [*(f"train/{k:07}" for k in range(6)), *(f"validation/{k:07}" for k in range(20))]
    dataset = plan.config.datasets["scenes"]
    for slot in (0, 7, 25):
        np.testing.assert_array_equal(group["image"][slot], read_image(dataset, ids[slot], (SIZE, SIZE)))
    assert group["valid"][:].all()
    assert (group["split"][:] == [name.split("/")[0] for name in ids]).all()
    assert facts["splits"] == {"train": {"0": 6}, "validation": {"0": 2, "1": 8, "2": 8, "3": 2}}
    assert group.attrs["classes"] == facts["classes"]
    assert group["label"][:].min() >= 0 and group["label"][:].max() < len(facts["classes"])


def test_files_as_they_are_decoded(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(imagefolder(tmp_path), "ingest")
    for image_id, pixels in zip(stored(tmp_path, "image_id"), stored(tmp_path, "image"), strict=True):
        with Image.open(tmp_path / "images" / str(image_id)) as image:
            np.testing.assert_array_equal(pixels, np.moveaxis(np.asarray(image), -1, 0))
    assert sorted(stored(tmp_path, "image_id").astype(object)) == [f"{name}.png" for name in NAMES]


def test_every_file_of_the_store_is_recorded(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(imagefolder(tmp_path), "ingest")
    folder = plan.results / "photos"
    files = {path.relative_to(folder).as_posix() for path in folder.glob("images.zarr/**/*") if path.is_file()}
    manifest = ingest_manifest(plan)
    assert set(manifest.files) == files | {"quarantine.csv"}
    assert all((folder / name).stat().st_size == size for name, (size, _) in manifest.files.items())
    reader = Reader(folder / "images.zarr", {k.removeprefix("images.zarr/"): v for k, v in manifest.files.items()})
    assert reader["image"][:].shape == (10, 3, SIZE, SIZE)


def test_new_images_are_appended_and_only_touched_shards_are_decoded(tmp_path):
    labelled_images(tmp_path, NAMES)
    first = ingest_manifest(run(imagefolder(tmp_path), "ingest"))
    before = stored(tmp_path, "image_id").astype(object).tolist()
    assert made(tmp_path) == ["0", "1", "2"]
    labelled_images(tmp_path, ["street/005x", "street/aa", "street/zz"])
    second = ingest_manifest(run(imagefolder(tmp_path), "ingest"))
    after = stored(tmp_path, "image_id").astype(object).tolist()
    assert after[:10] == before
    assert sorted(after[10:]) == ["street/005x.png", "street/aa.png", "street/zz.png"]
    assert sorted(made(tmp_path)[3:]) == ["2", "3"]  # the last one had two slots free
    assert second.result["contents"][:2] == first.result["contents"][:2]
    assert second.digest != first.digest


def test_a_removed_image_keeps_its_slot(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(imagefolder(tmp_path), "ingest")
    before = stored(tmp_path, "image_id").astype(object).tolist()
    gone = before[5]
    (tmp_path / "images" / gone).unlink()
    run(imagefolder(tmp_path), "ingest")
    assert stored(tmp_path, "image_id").astype(object).tolist() == before
    assert np.flatnonzero(~stored(tmp_path, "valid")).tolist() == [5]
    assert (stored(tmp_path, "image")[5] == 0).all()
    assert (stored(tmp_path, "label")[5], stored(tmp_path, "split")[5]) == (-1, "")
    assert made(tmp_path)[3:] == ["1"]

    write_image(tmp_path, gone.removesuffix(".png"), np.full((SIZE, SIZE, 3), 7, np.uint8))
    run(imagefolder(tmp_path), "ingest")
    assert stored(tmp_path, "image_id").astype(object).tolist() == before
    assert stored(tmp_path, "valid").all() and (stored(tmp_path, "image")[5] == 7).all()


def test_a_changed_image_changes_its_shard_alone_and_a_touched_one_no_content(tmp_path):
    labelled_images(tmp_path, NAMES)
    first = ingest_manifest(run(imagefolder(tmp_path), "ingest"))
    ids = stored(tmp_path, "image_id").astype(object)
    write_image(tmp_path, ids[9].removesuffix(".png"), np.full((SIZE, SIZE, 3), 99, np.uint8))
    second = ingest_manifest(run(imagefolder(tmp_path), "ingest"))
    assert made(tmp_path)[3:] == ["2"]
    assert [a == b for a, b in zip(first.result["contents"], second.result["contents"], strict=True)] == [1, 1, 0]

    touched = tmp_path / "images" / ids[0]
    shutil.copy(touched, copy := touched.with_suffix(".new"))
    copy.replace(touched)
    third = ingest_manifest(run(imagefolder(tmp_path), "ingest"))
    assert made(tmp_path)[4:] == ["0"]
    assert third.result["contents"] == second.result["contents"]
    assert third.digest == second.digest


def changed_meanwhile(monkeypatch, raw, change, *stages: str):
    """Run stages of a plan; the change comes after the last stage has listed the data set, before a worker reads it."""
    plan = planner.make(experiment.parse(raw))
    for stage in stages[:-1]:
        STAGES[stage].run(job(plan, stage, "photos"))
    listing = kinds.listing

    def listed(*given):
        found = listing(*given)
        change()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(kinds, "listing", listed)
        STAGES[stages[-1]].run(job(plan, stages[-1], "photos"))


@pytest.mark.parametrize("change", ["replaced", "touched", "truncated", "gone"])
@pytest.mark.parametrize("folder", ["images", "maps"])
def test_what_changes_after_it_was_listed_is_an_error_and_no_outcome(tmp_path, monkeypatch, change, folder):
    labelled_images(tmp_path, NAMES)
    path = tmp_path / folder / "street/05.png"
    content = path.read_bytes()

    def apply():
        match change:
            case "replaced":
                path.write_bytes((tmp_path / folder / "street/04.png").read_bytes())
            case "touched":
                os.utime(path, ns=(1, 1))
            case "truncated":
                path.write_bytes(content[:50])
            case "gone":
                path.rename(path.with_suffix(".away"))

    stages = ("ingest",) if folder == "images" else ("ingest", "concepts")
    raw = segmentation(tmp_path)
    with pytest.raises(MicrotomeError, match=r"05\.png (changed after the data set was listed|cannot be read now)"):
        changed_meanwhile(monkeypatch, raw, apply, *stages)
    assert not list((tmp_path / "results/photos/done").glob(f"{stages[-1]}.*"))
    path.with_suffix(".away").unlink(missing_ok=True)
    path.write_bytes(content)
    plan = run(raw, *stages)
    assert ingest_manifest(plan).result["refused"] == 0
    if folder == "maps":
        assert plan.manifest(next(plan.of_stage("concepts"))).result["refused"] == []


def test_arrays_that_change_after_they_were_listed(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", x=images)
    status = (tmp_path / "a.npz").stat()
    listed = (status.st_size, status.st_mtime_ns)
    np.testing.assert_array_equal(npz_image(tmp_path / "a.npz", "x", 1, listed), images[1].transpose(2, 0, 1))
    np.savez(tmp_path / "a.npz", x=images[::-1])
    os.utime(tmp_path / "a.npz", ns=(listed[1] + 1, listed[1] + 1))
    with pytest.raises(ChangedError, match=r"a\.npz changed after"):
        npz_image(tmp_path / "a.npz", "x", 1, listed)
    (tmp_path / "a.npz").unlink()
    with pytest.raises(ChangedError, match=r"a\.npz cannot be read now"):
        npz_image(tmp_path / "a.npz", "x", 1, listed)


def test_labels_and_splits_change_without_decoding(tmp_path):
    labelled_images(tmp_path, ["one/a", "one/b", "two/c"])
    table = tmp_path / "splits.csv"
    table.write_text("image,split\none/a.png,train\none/b.png,validation\ntwo/c.png,validation\n")
    raw = imagefolder(tmp_path, split={"csv": str(table)})
    first = ingest_manifest(run(raw, "ingest"))
    table.write_text("image,split\none/a.png,validation\none/b.png,validation\ntwo/c.png,train\n")
    second = ingest_manifest(run(raw, "ingest"))
    assert made(tmp_path) == ["0"]
    assert first.digest != second.digest
    split = dict(zip(stored(tmp_path, "image_id").astype(object), stored(tmp_path, "split"), strict=True))
    assert split == {"one/a.png": "validation", "one/b.png": "validation", "two/c.png": "train"}


def test_refused_images_are_listed_with_reasons_and_keep_their_slots(tmp_path):
    labelled_images(tmp_path, NAMES)
    (tmp_path / "images/street/empty.png").write_bytes(b"")
    (tmp_path / 'images/street/=cmd|calc, "x".png').write_text("no picture")
    write_image(tmp_path, "street/small", np.zeros((4, 5, 3), np.uint8))
    plan = run(imagefolder(tmp_path), "ingest")
    with (plan.results / "photos" / "quarantine.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["image_id"]: row["path"] for row in rows} == {
        name: str(tmp_path / "images" / name)
        for name in ("street/empty.png", 'street/=cmd|calc, "x".png', "street/small.png")
    }
    reasons = {row["image_id"]: row["reason"] for row in rows}
    assert "5x4 pixels, expected 16x16" in reasons["street/small.png"]
    assert "empty" in reasons["street/empty.png"]
    valid = dict(zip(stored(tmp_path, "image_id").astype(object), stored(tmp_path, "valid"), strict=True))
    assert {name for name, good in valid.items() if not good} == set(reasons)
    assert ingest_manifest(plan).result["refused"] == 3


def test_a_label_map_among_the_images_is_refused(tmp_path):
    labelled_images(tmp_path, NAMES)
    shutil.copytree(tmp_path / "images", tmp_path / "maps", dirs_exist_ok=True)
    with pytest.raises(MicrotomeError, match=r"label maps of 10 of 10 images were refused.*max_bad_fraction = 0.5"):
        run(segmentation(tmp_path), "ingest", "concepts")


def test_too_many_refused_images_fail_and_repaired_ones_are_taken_up(tmp_path):
    labelled_images(tmp_path, NAMES)
    for name in NAMES[:3]:
        (tmp_path / f"images/{name}.png").write_bytes(b"broken")
    raw = imagefolder(tmp_path, max_bad_fraction=0.25)
    with pytest.raises(
        MicrotomeError, match=r"3 of 10 images were refused, more than max_bad_fraction = 0.25.*street/00"
    ):
        run(raw, "ingest")
    assert not list((tmp_path / "results/photos").glob("done/*"))
    labelled_images(tmp_path, NAMES[:1])
    plan = run(raw, "ingest")
    assert ingest_manifest(plan).result["refused"] == 2
    assert len(stored(tmp_path, "image_id")) == 10


def test_an_ingest_cut_short_among_appended_images_keeps_all_slots(tmp_path, monkeypatch):
    labelled_images(tmp_path, NAMES)
    run(imagefolder(tmp_path), "ingest")
    before = stored(tmp_path, "image_id").astype(object).tolist()
    labelled_images(tmp_path, ["street/aa", "street/bb", "street/cc"])

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.workers.resumable.run_tasks", killed)
        with pytest.raises(KeyboardInterrupt):
            run(imagefolder(tmp_path), "ingest")
    run(imagefolder(tmp_path), "ingest")
    after = stored(tmp_path, "image_id").astype(object).tolist()
    assert after[:10] == before and len(after) == 13
    assert sorted(made(tmp_path)) == ["0", "1", "2", "2", "3"]


def test_not_one_usable_image(tmp_path):
    labelled_images(tmp_path, NAMES[:2])
    for name in NAMES[:2]:
        (tmp_path / f"images/{name}.png").write_bytes(b"broken")
    with pytest.raises(MicrotomeError, match="not one of 2 images can be read"):
        run(imagefolder(tmp_path, max_bad_fraction=1), "ingest")


def test_another_root_gets_new_slots(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(imagefolder(tmp_path), "ingest")
    shutil.copytree(tmp_path / "images", tmp_path / "copy")
    (tmp_path / "copy" / "street" / "00.png").unlink()
    run(imagefolder(tmp_path, root=str(tmp_path / "copy")), "ingest")
    assert len(stored(tmp_path, "image_id")) == 9 and stored(tmp_path, "valid").all()
