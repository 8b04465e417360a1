"""Cards: which units and images they show, and that the outline is the mask."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from report_results import SCALE, write_results

from pipeline.report import cards
from pipeline.report.results import Unit, read_dissection


def unit(number: int, concept: str, iou: float) -> Unit:
    return Unit("a", number, concept, "c" if concept else "", iou, 0.5, 0.1, 0.1, 0.1, 1.5, 0.01)


def test_best_units_takes_one_of_each_concept_first() -> None:
    units = [unit(0, "sky", 0.9), unit(1, "sky", 0.8), unit(2, "sky", 0.7), unit(3, "tree", 0.1), unit(4, "", 0.04)]
    assert [u.unit for u in cards.best_units(units, 2)] == [0, 3]
    assert [u.unit for u in cards.best_units(units, 3)] == [0, 1, 3]
    assert [u.unit for u in cards.best_units(units, 9)] == [0, 1, 2, 3]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(0, 6))
def test_top_images_match_a_full_sort(seed: int, images: int, count: int) -> None:
    random = np.random.default_rng(seed)
    maximum = random.integers(0, 4, (images, 5)).astype(np.float32)  # many ties
    maximum[random.uniform(size=maximum.shape) < 0.2] = np.nan
    shown = random.uniform(size=images) < 0.8
    units = [3, 0, 4]
    expected = []
    for number in units:
        usable = [i for i in range(images) if shown[i] and maximum[i, number] == maximum[i, number]]
        expected.append(sorted(usable, key=lambda i: (-maximum[i, number], i))[:count])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cards, "ROWS_AT_ONCE", 7)
        store: Any = {"maximum": maximum}
        assert cards.top_images(store, units, shown, count) == expected


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


def test_thumbnail_dims_outside_and_keeps_inside() -> None:
    image = np.full((3, 20, 30), 200, dtype=np.uint8)
    mask = np.zeros((20, 30), dtype=bool)
    mask[5:15, 10:20] = True
    tile = cards.thumbnail(image, mask)
    assert tile.shape == (cards.TILE, cards.TILE, 3)
    assert tile[cards.TILE // 2, cards.TILE // 2].tolist() == [200, 200, 200]
    assert tile[0, 0].max() < 120
    assert (tile == (255, 214, 10)).all(axis=2).any()
    assert (cards.thumbnail(image[:1], mask) == tile).all()  # one grey channel
    assert cards.thumbnail(image, np.zeros_like(mask)).max() < 120  # nothing above the threshold


def test_cards_show_the_extracted_valid_images_of_the_split_with_their_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images as large as the maps: the mask must be the map compared with the threshold, without interpolation.
    results = write_results(tmp_path, {"cnn": [("stem", 3), ("last", 3)]}, images=9, side=4, not_extracted=3)
    masks: list[np.ndarray] = []

    def record(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        masks.append(mask)
        return np.full((cards.TILE, cards.TILE, 3), len(masks), dtype=np.uint8)

    monkeypatch.setattr(cards, "thumbnail", record)
    out = tmp_path / "figures"
    out.mkdir()
    drawn = cards.draw_cards(read_dissection(results, "scenes", "cnn"), results / "scenes/images.zarr", out, 4, 5)

    assert len(drawn) == 4
    assert [card.unit.iou for card in drawn] == sorted((card.unit.iou for card in drawn), reverse=True)
    # Image 0 is of another split, 1 is not valid, 6 to 8 were not extracted: four are left for five places.
    assert all({name for name, _ in card.images} == {"000002", "000003", "000004", "000005"} for card in drawn)
    assert all(label == ("beach", "road")[int(name) % 2] for card in drawn for name, label in card.images)
    for card in drawn:
        layer = next(
            layer for layer in read_dissection(results, "scenes", "cnn").layers if layer.name == card.unit.layer
        )
        activation = zarr.open_array(layer.activations / "activation", mode="r")
        with Image.open(out / card.file) as picture:
            pixels = np.asarray(picture)
        assert pixels.shape == (cards.TILE, 5 * (cards.TILE + cards.GAP) - cards.GAP, 4)
        for place, (name, _) in enumerate(card.images):
            shown = pixels[0, place * (cards.TILE + cards.GAP)]
            expected = np.asarray(activation[int(name), card.unit.unit], dtype=np.float64) * SCALE > card.unit.threshold
            assert (masks[shown[0] - 1] == expected).all()
        assert (pixels[:, -cards.TILE :, 3] == 0).all()  # the fifth place stays empty
