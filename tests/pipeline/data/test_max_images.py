"""`max_images`: a subset before the long run, whose shards the long run takes over, and back again."""

import json
from pathlib import Path

import numpy as np
import pytest
import zarr
from experiments import labelled_images, lines, run, scenes, segmentation, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data import kinds as datasets
from pipeline.data.listing import STRINGS, Fixed, Listing, bounded, list_imagefolder, slots
from pipeline.run import experiment as run_experiment
from pipeline.run import planner

STAGES = ("ingest", "concepts", "network", "extract", "dissect")
NAMES = [f"{k:02}" for k in range(28)]  # 12 of them to train on


@pytest.fixture
def photos(tmp_path) -> Path:
    labelled_images(tmp_path, NAMES)
    rows = [f"{name}.png,{'train' if k < 12 else 'validation'}" for k, name in enumerate(NAMES)]
    (tmp_path / "splits.csv").write_text("\n".join(["image,split", *rows]) + "\n")
    return tmp_path


def experiment(folder: Path, most: int | None = None):
    return segmentation(folder, split={"csv": str(folder / "splits.csv")}, max_images=most)


def made(folder: Path) -> dict[str, list[str]]:
    """The shards made so far, by store."""
    results = folder / "results"
    found = {path.stem: path for path in (*results.glob("photos/*.ledger"), results / "photos/tiny/logits.ledger")}
    found |= {f"layer {at}": path for at, path in enumerate(sorted(results.glob("photos/layers/*/*.ledger")))}
    return {name: [entry["shard"] for entry in lines(path)] for name, path in found.items() if path.exists()}


def stored(folder: Path) -> zarr.Group:
    return zarr.open_group(folder / "results/photos/images.zarr", mode="r", use_consolidated=False)


def used(folder: Path) -> dict[str, str]:
    """Image id -> split of the images that are valid."""
    group = stored(folder)
    valid = group["valid"][:]
    ids, split = group["image_id"][:].astype(object)[valid], group["split"][:].astype(object)[valid]
    return dict(zip(ids, split, strict=True))


def units(folder: Path) -> str:
    return (folder / "results/photos/tiny/units.csv").read_text()


@pytest.mark.usefixtures("workers")
def test_a_bound_that_is_lifted_and_set_again(photos):
    run(experiment(photos, 6), *STAGES)
    few, few_units = used(photos), units(photos)
    assert sorted(few.values()) == ["train"] * 6 + ["validation"] * 6
    first = made(photos)
    assert first["images"] == ["0", "1", "2"] and first["layer 0"] == ["1", "2"]  # those with validation images
    assert stored(photos)["image"].shape[0] == 12

    run(experiment(photos), *STAGES)
    assert len(used(photos)) == 28 and few.items() <= used(photos).items()
    second = made(photos)
    assert sorted(second["images"][3:]) == ["3", "4", "5", "6"]
    assert sorted(second["layer 0"][2:]) == sorted(second["layer 1"][2:]) == ["4", "5", "6"]
    assert sorted(second["logits"][2:]) == ["4", "5", "6"]
    whole_units = units(photos)
    assert whole_units != few_units

    run(experiment(photos, 6), *STAGES)
    assert used(photos) == few and units(photos) == few_units
    run(experiment(photos), *STAGES)
    assert len(used(photos)) == 28 and units(photos) == whole_units
    assert made(photos) == second  # neither decoded an image nor extracted one


@pytest.mark.usefixtures("workers")
def test_only_the_shard_at_the_bound_is_filled_up(photos):
    run(experiment(photos, 5), "ingest")
    run(experiment(photos, 8), "ingest")
    assert made(photos)["images"] == ["0", "1", "2", "2", "3"]
    group = stored(photos)
    assert group["image_id"].shape == (16,) and group["valid"][:].all()
    run(experiment(photos, 5), "ingest")
    assert len(used(photos)) == 10
    assert made(photos)["images"] == ["0", "1", "2", "2", "3"]
    manifest = planner.make(run_experiment.parse(experiment(photos, 5))).step("ingest", "photos")
    result = json.loads((photos / "results" / manifest.manifest).read_text())["manifest"]["result"]
    assert [content is None for content in result["contents"]] == [False, False, False, True]


@pytest.mark.usefixtures("workers")
def test_what_is_beyond_the_bound_and_gone_is_not_kept(photos):
    run(experiment(photos), "ingest")
    run(experiment(photos, 4), "ingest")
    beyond = [name for name in stored(photos)["image_id"][:].astype(object) if name not in used(photos)]
    slot = stored(photos)["image_id"][:].astype(object).tolist().index(beyond[-1])
    assert stored(photos)["image"][slot].any()
    (photos / "images" / beyond[-1]).unlink()
    rows = (photos / "splits.csv").read_text().splitlines()
    (photos / "splits.csv").write_text("\n".join(row for row in rows if not row.startswith(beyond[-1])) + "\n")
    run(experiment(photos, 3), "ingest")  # the next ingest, whatever it is made for
    assert not stored(photos)["image"][slot].any() and len(used(photos)) == 6


@pytest.mark.usefixtures("workers")
def test_refusals_are_counted_within_the_bound(photos):
    run(experiment(photos, 2), "ingest")
    few = set(used(photos))
    for name in NAMES:
        if f"{name}.png" not in few:
            (photos / f"images/{name}.png").write_bytes(b"broken")
    run(experiment(photos, 2), "ingest")
    assert set(used(photos)) == few
    assert (photos / "results/photos/quarantine.csv").read_text() == "image_id,path,reason\n"


def test_ids_with_a_bound(photos):
    def id_of(most):
        return planner.make(run_experiment.parse(experiment(photos, most))).step("ingest", "photos").id

    assert id_of(None) == id_of(16) == id_of(999)
    assert len({id_of(None), id_of(15), id_of(12), id_of(3)}) == 4
    before = id_of(3)
    listed = datasets.listing(run_experiment.parse(experiment(photos, 3)).datasets["photos"], photos / "scratch")
    beyond = str(listed.image_id[~listed.chosen][0])
    write_image(photos, beyond.removesuffix(".png"), np.full((16, 16, 3), 9, np.uint8))
    assert id_of(3) == before and id_of(None) != before


def test_scenes_have_bounds_too(tmp_path):
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"]["max_images"] = 5
    listed = datasets.listing(run_experiment.parse(raw).datasets["scenes"], tmp_path)
    assert listed.splits() == {"train": 5, "validation": 5}
    assert planner.make(run_experiment.parse(raw)).step("ingest", "scenes").settings["images"] == 10


@settings(deadline=None, max_examples=50)
@given(st.sets(st.integers(0, 99), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_a_smaller_bound_is_a_prefix(numbers, one, other):
    names = [f"{k:02}" for k in sorted(numbers)]
    absent = np.full(len(names), -1, np.int64)
    split = np.array(["train" if k % 3 else "validation" for k in sorted(numbers)], STRINGS)
    listing = Listing(Path(), np.array(names, STRINGS), absent, absent, absent, split, [])
    small, large = (bounded(listing, most) for most in sorted((one, other)))
    assert not (small.chosen & ~large.chosen).any()
    everything, _ = slots(listing)
    for split in listing.splits():
        of_split = [name for name in everything.tolist() if listing.split[names.index(name)] == split]
        chosen = [name for name in names if large.chosen[names.index(name)]]
        assert set(of_split[: max(one, other)]) == {n for n in chosen if listing.split[names.index(n)] == split}
    known, at = slots(small)
    assert len(known) == len(small.images) and sorted(known.tolist()) == sorted(small.image_id[small.images].tolist())
    assert slots(large, known)[0].tolist()[: len(known)] == known.tolist() and (at >= 0).all()


def test_no_bound_lists_all(tmp_path):
    write_image(tmp_path, "a", np.zeros((4, 4, 3), np.uint8))
    listing = list_imagefolder(tmp_path / "images", Fixed("train"))
    assert listing.chosen is None and listing.images.tolist() == [0]
    assert bounded(listing, 7).digest() == listing.digest()
