"""Pictures of units: which units and images they show, that the outline is the mask, and what stands beside them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_results import SCALE, write_results

from pipeline.config.report import Report
from pipeline.report.experiment import Experiment, Made
from pipeline.stages.dissect import cards
from pipeline.stages.dissect.found import Unit, networks
from pipeline.stages.extract import pictures


def unit(number: int, concept: str, iou: float) -> Unit:
    return Unit("a", number, concept, "c" if concept else "", iou, 0.5, 0.1, 0.1, 0.1, 1.5, 0.01)


def test_best_units_takes_one_of_each_concept_first() -> None:
    units = [unit(0, "sky", 0.9), unit(1, "sky", 0.8), unit(2, "sky", 0.7), unit(3, "tree", 0.1), unit(4, "", 0.04)]
    assert [u.unit for u in cards.best_units(units, 2)] == [0, 3]
    assert [u.unit for u in cards.best_units(units, 3)] == [0, 3, 1]
    assert [u.unit for u in cards.best_units(units, 9)] == [0, 3, 1, 2, 4]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6))
def test_top_images_match_a_full_sort(seed: int, images: int, count: int) -> None:
    random = np.random.default_rng(seed)
    maximum = random.integers(0, 4, (images, 5)).astype(np.float32)  # many ties
    maximum[random.uniform(size=maximum.shape) < 0.2] = np.nan
    shown = random.uniform(size=images) < 0.8
    units = [0, 3, 4]
    expected, highest = [], []
    for number in units:
        usable = [i for i in range(images) if shown[i] and maximum[i, number] == maximum[i, number]]
        expected.append(sorted(usable, key=lambda i: (-maximum[i, number], i))[:count])
        highest.append(max((float(maximum[i, number]) for i in usable), default=math.nan))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "ROWS_AT_ONCE", 7)
        found, most = pictures.top_images(maximum, units, shown, count)
    assert found == expected
    np.testing.assert_array_equal(most, highest)


class Chunked(np.ndarray):
    """An array in memory that says how it would be cut in a store."""

    chunks = (4, 2, 3, 3)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 14), st.integers(1, 14))
def test_histogram_counts_every_value_of_the_sample(seed: int, images: int, sample: int) -> None:
    random = np.random.default_rng(seed)
    values = random.normal(size=(images, 5, 3, 3)).astype(np.float16)
    values[random.uniform(size=images) < 0.2] = np.nan  # not extracted
    shown = random.uniform(size=images) < 0.8
    store: Any = {"activation": values.view(Chunked)}
    highest = np.full(5, 3.5, np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "SAMPLE", sample)
        found = cards.histogram(store, [1, 2, 4], shown, highest[:3])
    for number, (counts, low, high) in zip([1, 2, 4], found, strict=True):
        mine = values[np.flatnonzero(shown)[:sample], number].astype(np.float64).ravel()
        mine = mine[~np.isnan(mine)]
        if not len(mine):
            assert counts == [] and math.isnan(low) and math.isnan(high)
            continue
        assert low == mine.min() and high == max(mine.max(), 3.5)
        expected, edges = np.histogram(mine, cards.BINS, (low, high))
        assert sum(counts) == len(mine)
        # Values at an edge may be rounded to either side.
        close = (np.abs(mine[:, None] - edges[None]) < 1e-5).sum()
        assert np.abs(np.subtract(counts, expected)).sum() <= 2 * close


def test_histogram_of_a_unit_that_never_varies() -> None:
    store: Any = {"activation": np.zeros((3, 1, 3, 3), np.float16).view(Chunked)}
    counts, low, high = cards.histogram(store, [0], np.ones(3, bool), np.zeros(1, np.float32))[0]
    assert (sum(counts), low, high) == (27, 0, 0)


def test_best_concepts_are_in_order_and_overlap() -> None:
    assert cards.best_concepts(np.float32([0.5, 0, 0.25, 0.5])) == [(0, 0.5), (3, 0.5), (2, 0.25)]
    assert cards.best_concepts(np.float32([math.nan, 0])) == []
    assert len(cards.best_concepts(np.linspace(0.1, 0.9, 50))) == cards.RUNNERS_UP


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(1, 20))
def test_square_lies_in_the_image_and_shows_the_mask(seed: int, height: int, width: int) -> None:
    random = np.random.default_rng(seed)
    mask = random.uniform(size=(height, width)) < random.uniform(0, 0.3)
    top, left, side = cards.square_around(mask)
    assert 0 <= top <= height - side and 0 <= left <= width - side and 1 <= side <= min(height, width)
    assert side >= min(height, width) / 2
    rows, columns = np.nonzero(mask)
    if len(rows) and max(np.ptp(rows), np.ptp(columns)) < side:
        assert mask[top : top + side, left : left + side].sum() == mask.sum()


def test_tile_dims_outside_and_keeps_inside() -> None:
    image = np.full((3, 20, 30), 200, dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:15, 10:20] = True
    tile = np.asarray(cards.tile(image, mask))
    assert tile.shape == (cards.TILE, cards.TILE, 3)
    assert tile[cards.TILE // 2, cards.TILE // 2].tolist() == [200, 200, 200]
    assert tile[0, 0].max() < 120
    assert (tile == cards.OUTLINE).all(axis=2).any()
    assert (np.asarray(cards.tile(image[:1], mask)) == tile).all()  # one grey channel
    assert np.asarray(cards.tile(image, np.zeros_like(mask))).max() < 120  # nothing above the threshold


def test_pictures_show_the_extracted_valid_images_of_the_split_with_their_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images as large as the maps: the mask must be the map compared with the threshold, without interpolation.
    results = write_results(tmp_path, {"cnn": [("stem", 3), ("last", 3)]}, images=9, side=4, not_extracted=3)
    masks: list[np.ndarray] = []

    def record(image: np.ndarray, mask: np.ndarray) -> Image.Image:
        masks.append(mask)
        return Image.new("RGB", (cards.TILE, cards.TILE), (5 * len(masks),) * 3)

    monkeypatch.setattr(cards, "tile", record)
    monkeypatch.setattr(cards, "UNITS_AT_ONCE", 2)
    experiment = Experiment(results, tmp_path / "out", "", (Made("dissect", "scenes", "cnn"),), report=Report(cards=5))
    (experiment.out / "units").mkdir(parents=True)
    dissection = networks(experiment)[0].trained
    drawn = cards.draw_cards(experiment, dissection)

    assert set(drawn) == {(u.layer, u.unit) for u in cards.best_units(dissection.units, 5)}
    for (layer, number), card in drawn.items():
        # Image 0 is of another split, 1 is not valid, 6 to 8 were not extracted: four are left for five places.
        assert sorted(card.images) == [2, 3, 4, 5]
        (of,) = (one for one in dissection.layers if one.name == layer)
        activation = zarr.open_array(of.activations / "activation", mode="r")
        maximum = zarr.open_array(of.activations / "maximum", mode="r")[:, number]
        assert card.images == sorted(card.images, key=lambda image: -maximum[image])
        (threshold,) = (u.threshold for u in dissection.units if (u.layer, u.unit) == (layer, number))
        with Image.open(experiment.out / card.file) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (cards.TILE, 4 * cards.TILE, 3)
        for place, image in enumerate(card.images):
            shown = round(int(pixels[cards.TILE // 2, place * cards.TILE + cards.TILE // 2, 0]) / 5)
            expected = np.asarray(activation[image, number], dtype=np.float64) * SCALE > threshold
            assert (masks[shown - 1] == expected).all()


def test_classes_and_ids_of_pictures(tmp_path: Path) -> None:
    results = write_results(tmp_path, {"cnn": [("stem", 1)]}, classes=["beach", "road"])
    pictures = cards.open_pictures(results / "scenes/images.zarr")
    assert pictures.classes[:3] == ["beach", "road", "beach"] and pictures.ids[2] == "000002"
    assert not pictures.shown("validation")[:2].any() and pictures.shown("validation")[2:].all()
    # A split that no image has means all valid images.
    assert pictures.shown("every")[0] and not pictures.shown("every")[1]
