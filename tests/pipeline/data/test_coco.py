"""COCO's files as label maps: polygons, runs in both forms, panoptic segments, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.data.coco import convert, filled, main, runs_of
from pipeline.data.label_maps import read_class_list, read_label_map
from pipeline.errors import MicrotomeError

SIZE = 6, 8
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 90, "name": "hair drier"}]
SQUARE = [[1, 2, 4, 2, 4, 5, 1, 5]]  # x 1 to 3, y 2 to 4


def region(**told):
    return {"id": 1, "image_id": 7, "category_id": 3, "iscrowd": 0} | told


def written(folder, annotations, categories=CATEGORIES, **image):
    images = [{"id": 7, "file_name": "a/one.jpg", "height": SIZE[0], "width": SIZE[1]} | image]
    told = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(told))
    return folder / "coco.json"


def labels(folder, annotations):
    assert convert(written(folder, annotations), folder / "labels") == 1
    return read_label_map(folder / "labels/a/one.png", 10**6)


def runs(mask):
    """Runs of zeros and ones down the columns, zeros first, one pixel at a time."""
    found, last = [0], 0
    for value in mask.T.reshape(-1).tolist():
        if value != last:
            found.append(0)
        found[-1] += 1
        last = value
    return found


def text(counts):
    """The reference's encoding, by its C code: differences to the last run but one, five bits at a time."""
    out = ""
    for at, count in enumerate(counts):
        value = count - counts[at - 2] if at > 2 else count
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            out += chr((bits | (32 if more else 0)) + 48)
            if not more:
                break
    return out


def test_polygons_are_filled(tmp_path):
    expected = np.zeros(SIZE, int)
    expected[2:5, 1:4] = 3
    assert (labels(tmp_path, [region(segmentation=SQUARE)]) == expected).all()
    assert read_class_list(tmp_path / "labels.txt").names == {3: "cat", 90: "hair drier"}


def test_polygons_have_the_pixels_whose_centres_they_hold():
    """Against Pillow's, whose outlines are a pixel thick, on a figure a hundred times as large."""
    corners = np.array([[1.3, 0.2], [7.6, 2.1], [5.2, 5.8], [4.0, 2.9], [0.4, 5.5]])
    large = Image.new("1", (800, 600))
    ImageDraw.Draw(large).polygon([tuple(each) for each in (100 * corners).tolist()], fill=1)
    assert (filled(corners, SIZE) == np.asarray(large)[50::100, 50::100]).all()


def test_the_smaller_instance_is_on_top(tmp_path):
    whole = [[0, 0, 8, 0, 8, 6, 0, 6]]
    both = [region(segmentation=SQUARE), region(segmentation=whole, category_id=90)]
    for order in (both, both[::-1]):
        found = labels(tmp_path, order)
        assert (found == 3).sum() == 9 and (found == 90).sum() == 48 - 9


@pytest.mark.parametrize("seed", range(5))
def test_runs_are_read_in_both_forms(tmp_path, seed):
    mask = np.random.default_rng(seed).random(SIZE) < 0.5
    for counts in (runs(mask), text(runs(mask))):
        found = labels(tmp_path, [region(segmentation={"size": list(SIZE), "counts": counts}, iscrowd=1)])
        assert (found == 3 * mask).all()


def test_long_and_falling_runs():
    for counts in ([0, 1], [5000, 3, 20, 1, 100_000, 2], [1] * 9):
        assert runs_of(text(counts)) == counts


def test_an_image_without_annotations_is_empty(tmp_path):
    assert not labels(tmp_path, []).any()


def panoptic(folder, ids, segments):
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    (folder / "png").mkdir(exist_ok=True)
    Image.fromarray(colours).save(folder / "png/one.png")
    return written(folder, [{"image_id": 7, "file_name": "one.png", "segments_info": segments}])


def test_panoptic_segments(tmp_path, capsys):
    ids = np.zeros(SIZE, int)
    ids[:2], ids[2:4], ids[4:, 2:] = 70_000, 256, 9
    segments = [{"id": 70_000, "category_id": 90}, {"id": 256, "category_id": 3}, {"id": 9, "category_id": 3}]
    main([str(panoptic(tmp_path, ids, segments)), str(tmp_path / "labels"), "--panoptic", str(tmp_path / "png")])
    expected = np.select([ids == 70_000, ids > 0], [90, 3], 0)
    assert (read_label_map(tmp_path / "labels/a/one.png", 10**6) == expected).all()
    assert "1 label maps" in capsys.readouterr().out
    with pytest.raises(MicrotomeError, match="has the segment 9, which `segments_info` lacks"):
        convert(panoptic(tmp_path, ids, segments[:2]), tmp_path / "labels", tmp_path / "png")
    with pytest.raises(MicrotomeError, match="is a panoptic file: give the folder"):
        convert(tmp_path / "coco.json", tmp_path / "labels")


@pytest.mark.parametrize(
    ("annotations", "categories", "said"),
    [
        ([region(segmentation=SQUARE, category_id=4)], CATEGORIES, "category 4 is not among its categories"),
        ([region(segmentation=SQUARE, image_id=8)], CATEGORIES, "annotations name image 8"),
        ([region(segmentation=[[1, 2, 3, 4]])], CATEGORIES, "neither polygons of three corners"),
        ([region()], CATEGORIES, "neither polygons"),
        ([region(segmentation={"size": [6, 8], "counts": [47]})], CATEGORIES, "runs of 47 pixels"),
        ([region(segmentation={"size": [8, 6], "counts": [48]})], CATEGORIES, r"expected \[6, 8\]"),
        ([], [{"id": 0, "name": "cat"}], "category 0"),
        ([], [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}], "category 2"),
    ],
)
def test_files_that_are_refused(tmp_path, annotations, categories, said):
    with pytest.raises(MicrotomeError, match=said):
        convert(written(tmp_path, annotations, categories), tmp_path / "labels")


def test_another_kind_of_file_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"is no COCO file: expected `images`"):
        main([str(tmp_path / "x.json"), str(tmp_path / "labels")])
