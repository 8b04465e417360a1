"""Label maps: numbers, sources, what is refused, and what is done again."""

import csv
import shutil

import numpy as np
import pytest
import zarr
from experiments import SIZE, labelled_images, lines, run, scenes, segmentation, write_image, write_label_map
from PIL import Image

from kernels.images.colour_names import COLOURS, colour_names
from pipeline.data.kinds import read_label_maps
from pipeline.data.scenes import CONCEPTS
from pipeline.errors import MicrotomeError
from pipeline.run.results import open_results

pytestmark = pytest.mark.usefixtures("workers")
NAMES = [f"street/{k:02}" for k in range(10)]


def stored(plan, dataset="photos"):
    return zarr.open_group(plan.results / dataset / "concepts.zarr", mode="r", use_consolidated=False)


def image_ids(plan, dataset="photos"):
    group = zarr.open_group(plan.results / dataset / "images.zarr", mode="r", use_consolidated=False)
    return group["image_id"][:].astype(object).tolist()


def manifest(plan):
    return plan.manifest(next(plan.of_stage("concepts")))


def made(folder) -> list[str]:
    return [entry["shard"] for entry in lines(folder / "results/photos/concepts.ledger")]


def test_scenes_and_colours(tmp_path):
    plan = run(scenes(tmp_path), "ingest", "concepts")
    group = stored(plan, "scenes")
    categories = group["category"][:].astype(object).tolist()
    assert categories == [*(f"truth/{name}" for name in CONCEPTS), "pixels/colour"]
    table = {int(number): entry for number, entry in group.attrs["concepts"].items()}
    assert sorted(table) == list(range(1, len(table) + 1))
    wanted = {(f"truth/{category}", name) for category, names in CONCEPTS.items() for name in names}
    wanted |= {("pixels/colour", name) for name in COLOURS}
    assert {(entry["category"], entry["name"]) for entry in table.values()} == wanted

    ids = image_ids(plan, "scenes")
    pixels = zarr.open_group(plan.results / "scenes/images.zarr", mode="r", use_consolidated=False)["image"]
    for slot in (8, 25):
        own = read_label_maps(plan.config.datasets["scenes"], ids[slot], {}, (SIZE, SIZE))
        for place, category in enumerate(categories[:-1]):
            names = list(CONCEPTS[category.partition("/")[2]])
            read = np.array(["", *(table[k]["name"] for k in sorted(table))], object)[group["label_map"][slot, place]]
            np.testing.assert_array_equal(read, np.array(["", *names], object)[own[category.partition("/")[2]]])
        colours = np.array(["", *(table[k]["name"] for k in sorted(table))], object)[group["label_map"][slot, -1]]
        expected = np.array(COLOURS, object)[colour_names(np.moveaxis(pixels[slot], 0, -1)[None])[0]]
        np.testing.assert_array_equal(colours, expected)


def test_files_as_they_are_numbered(tmp_path):
    labelled_images(tmp_path, NAMES)
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    group = stored(plan)
    assert group.attrs["concepts"] == {
        "1": {"name": "left side", "category": "truth/thing"},
        "2": {"name": "blob", "category": "truth/thing"},
    }
    for slot, name in enumerate(image_ids(plan)):
        with Image.open(tmp_path / "maps" / name) as file:
            np.testing.assert_array_equal(group["label_map"][slot, 0], np.asarray(file))
    assert group["label_map"].dtype == np.uint16
    assert manifest(plan).result["refused"] == []


def test_another_source_is_appended_and_leaves_the_first_as_it_is(tmp_path):
    labelled_images(tmp_path, NAMES)
    first = run(segmentation(tmp_path), "ingest", "concepts")
    before = stored(first)["label_map"][:]
    assert made(tmp_path) == [f"{shard} truth/thing" for shard in range(3)]
    second = run(segmentation(tmp_path, concepts=["pixels", "truth"]), "ingest", "concepts")
    assert made(tmp_path)[3:] == [f"{shard} pixels/colour" for shard in range(3)]
    np.testing.assert_array_equal(stored(second)["label_map"][:, :1], before)
    assert stored(second)["category"][:].astype(object).tolist() == ["truth/thing", "pixels/colour"]
    table = stored(second).attrs["concepts"]
    assert table["1"]["name"] == "left side" and table["3"] == {"name": COLOURS[0], "category": "pixels/colour"}
    assert [c["name"] for c in manifest(second).result["categories"]] == ["pixels/colour", "truth/thing"]
    run(segmentation(tmp_path), "ingest", "concepts")
    assert len(made(tmp_path)) == 6


def test_new_classes_get_new_numbers(tmp_path):
    labelled_images(tmp_path, NAMES[:4])
    run(segmentation(tmp_path), "ingest", "concepts")
    (tmp_path / "classes.txt").write_text("1 left side\n2 blob\n7 new\n")
    write_label_map(tmp_path, NAMES[0], np.full((SIZE, SIZE), 7, np.uint8))
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    assert {k: v["name"] for k, v in stored(plan).attrs["concepts"].items()} == {
        "1": "left side",
        "2": "blob",
        "3": "new",
    }
    slot = image_ids(plan).index(f"{NAMES[0]}.png")
    assert (stored(plan)["label_map"][slot, 0] == 3).all()


def test_a_changed_label_map_changes_its_shard_alone(tmp_path):
    labelled_images(tmp_path, NAMES)
    first = manifest(run(segmentation(tmp_path), "ingest", "concepts"))
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    write_label_map(tmp_path, image_ids(plan)[5].removesuffix(".png"), np.full((SIZE, SIZE), 2, np.uint8))
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    second = manifest(plan)
    assert made(tmp_path)[3:] == ["1 truth/thing"]
    contents = [m.result["categories"][0]["contents"] for m in (first, second)]
    assert [a == b for a, b in zip(*contents, strict=True)] == [True, False, True]
    assert first.digest != second.digest
    assert (stored(plan)["label_map"][5, 0] == 2).all()


def test_appended_images_get_label_maps(tmp_path):
    labelled_images(tmp_path, NAMES)
    run(segmentation(tmp_path), "ingest", "concepts")
    labelled_images(tmp_path, ["street/x", "street/y", "street/z"])
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    assert sorted(made(tmp_path)[3:]) == ["2 truth/thing", "3 truth/thing"]
    assert stored(plan)["label_map"].shape == (13, 1, SIZE, SIZE)
    assert (stored(plan)["label_map"][:] > 0).any((1, 2, 3)).all()


def test_refused_label_maps(tmp_path):
    labelled_images(tmp_path, NAMES)
    write_label_map(tmp_path, NAMES[0], np.full((SIZE, SIZE), 9, np.uint8))  # not in the class list
    write_label_map(tmp_path, NAMES[1], np.zeros((SIZE, SIZE, 3), np.uint8))  # colours
    write_label_map(tmp_path, NAMES[2], np.zeros((SIZE, 3 * SIZE), np.uint8))  # another shape
    (tmp_path / f"maps/{NAMES[3]}.png").write_bytes(b"")
    plan = run(segmentation(tmp_path), "ingest", "concepts")
    with (plan.results / "photos/concepts-quarantine.csv").open(newline="") as file:
        rows = {row["image_id"]: row for row in csv.DictReader(file)}
    assert sorted(rows) == [f"{name}.png" for name in NAMES[:4]] == manifest(plan).result["refused"]
    assert rows[f"{NAMES[0]}.png"]["path"] == str(tmp_path / f"images/{NAMES[0]}.png")
    assert "9" in rows[f"{NAMES[0]}.png"]["reason"]
    for name in NAMES[:4]:
        assert (stored(plan)["label_map"][image_ids(plan).index(f"{name}.png")] == 0).all()
    shutil.rmtree(plan.results / "photos" / "done")
    with pytest.raises(MicrotomeError, match=r"label maps of 4 of 10 images were refused, more than .* = 0.3 allows"):
        run(segmentation(tmp_path, max_bad_fraction=0.3), "ingest", "concepts")


def test_only_images_that_count_are_refused(tmp_path):
    labelled_images(tmp_path, NAMES)
    (tmp_path / f"images/{NAMES[0]}.png").write_bytes(b"broken")
    write_label_map(tmp_path, NAMES[1], np.full((SIZE, SIZE), 9, np.uint8))
    splits = [f"{name}.png,{'train' if name == NAMES[1] else 'validation'}" for name in NAMES]
    (tmp_path / "splits.csv").write_text("\n".join(["image,split", *splits]))
    raw = segmentation(tmp_path, split={"csv": str(tmp_path / "splits.csv")}, max_bad_fraction=0.1)
    plan = run(raw, "ingest", "concepts")
    assert manifest(plan).result["refused"] == []
    assert (plan.results / "photos/quarantine.csv").read_text().count("\n") == 2


def test_label_maps_of_the_wanted_split_alone(tmp_path):
    labelled_images(tmp_path, NAMES)
    splits = [f"{name}.png,{'train' if k < 5 else 'validation'}" for k, name in enumerate(NAMES)]
    (tmp_path / "splits.csv").write_text("\n".join(["image,split", *splits]))
    plan = run(segmentation(tmp_path, split={"csv": str(tmp_path / "splits.csv")}), "ingest", "concepts")
    shards = manifest(plan).result["shards"]
    assert shards == [1, 2] and made(tmp_path) == ["1 truth/thing", "2 truth/thing"]
    with pytest.raises(
        MicrotomeError, match=r"'photos' has no split 'test'; it has train \(5 images\), validation \(5 images\)"
    ):
        run(
            segmentation(tmp_path, split={"csv": str(tmp_path / "splits.csv")}, dissect={"split": "test"}),
            "ingest",
            "concepts",
        )


def test_a_split_of_which_no_image_is_valid(tmp_path):
    labelled_images(tmp_path, NAMES)
    splits = [f"{name}.png,{'train' if k < 5 else 'validation'}" for k, name in enumerate(NAMES)]
    (tmp_path / "splits.csv").write_text("\n".join(["image,split", *splits]))
    for name in NAMES[5:]:
        (tmp_path / f"images/{name}.png").write_bytes(b"broken")
    raw = segmentation(tmp_path, split={"csv": str(tmp_path / "splits.csv")}, max_bad_fraction=1)
    with pytest.raises(MicrotomeError, match=r"photos: no valid image has split 'validation' \(there are: train\)"):
        run(raw, "ingest", "concepts")


def test_colours_of_a_changed_image(tmp_path):
    labelled_images(tmp_path, NAMES)
    raw = segmentation(tmp_path, concepts=["pixels"])
    plan = run(raw, "ingest", "concepts")
    write_image(tmp_path, image_ids(plan)[0].removesuffix(".png"), np.full((SIZE, SIZE, 3), (255, 0, 0), np.uint8))
    plan = run(raw, "ingest", "concepts")
    assert made(tmp_path)[3:] == ["0 pixels/colour"]
    number = next(int(k) for k, v in stored(plan).attrs["concepts"].items() if v["name"] == "red")
    assert (stored(plan)["label_map"][0, 0] == number).all()


@pytest.mark.parametrize("size", [(8, 4), (5, 16)])
def test_label_maps_of_another_size(tmp_path, size):
    """Each position has the label under its centre, and units are compared with them at that size."""
    labelled_images(tmp_path, NAMES)
    whole = stored(run(segmentation(tmp_path), "ingest", "concepts"))["label_map"][:]
    plan = run(segmentation(tmp_path, label_map_size=size), "ingest", "concepts", "network", "extract", "dissect")
    found = stored(plan)["label_map"][:]
    assert found.shape == (len(NAMES), 1, *size)
    for y in range(size[0]):
        for x in range(size[1]):
            row, column = int((y + 0.5) * SIZE / size[0]), int((x + 0.5) * SIZE / size[1])
            np.testing.assert_array_equal(found[:, :, y, x], whole[:, :, row, column])
    assert manifest(plan).result["size"] == list(size)
    photos = open_results(plan.results)["photos"]["tiny"]
    for layer in photos.values():
        assert layer.thresholds.attrs["positions_counted"] == len(NAMES) * size[0] * size[1]
        assert layer.iou.attrs["pixels"] == len(NAMES) * size[0] * size[1]
    before = len(made(tmp_path))
    run(segmentation(tmp_path), "ingest", "concepts")
    assert len(made(tmp_path)) == before + 3, "the other size again"


def test_a_category_or_source_leaves_the_others_as_they_are(tmp_path):
    """In whichever order they come."""
    labelled_images(tmp_path, NAMES)
    run(segmentation(tmp_path, concepts=["pixels"]), "ingest", "concepts")
    assert len(made(tmp_path)) == 3
    run(segmentation(tmp_path, concepts=["pixels", "truth"]), "ingest", "concepts")
    assert made(tmp_path)[3:] == [f"{shard} truth/thing" for shard in range(3)]
