"""Measures of localisation: cases made by hand from the papers' definitions, and twins that look at every pixel."""

from __future__ import annotations

from collections import deque

import numpy as np
import pytest

from kernels.audit import accuracy, localisation
from kernels.audit.localisation import Truth

DRAW = np.random.default_rng(11)
ONCE = np.ones((1, 4))


def flooded(mask: np.ndarray) -> list[set[tuple[int, int]]]:
    """Return the connected parts of a mask, by flooding each."""
    left, found = {(int(y), int(x)) for y, x in np.argwhere(mask)}, []
    while left:
        part, queue = set(), deque([min(left)])
        while queue:
            y, x = queue.popleft()
            if (y, x) in left:
                left.remove((y, x))
                part.add((y, x))
                queue += [(y + down, x + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]
        found.append(part)
    return sorted(found, key=len, reverse=True)


def box_of(part: set[tuple[int, int]]) -> tuple[int, int, int, int]:
    rows, columns = [y for y, _ in part], [x for _, x in part]
    return min(columns), min(rows), max(columns) + 1, max(rows) + 1


def cells_iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    """Return the intersection over union of boxes with whole edges, by counting cells."""
    one, other = ({(y, x) for y in range(each[1], each[3]) for x in range(each[0], each[2])} for each in (a, b))
    return len(one & other) / len(one | other)


def test_parts_touch_at_corners_and_the_largest_comes_first() -> None:
    mask = np.array([[1, 0, 0, 0, 1], [0, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 0, 0, 0, 1]], bool)
    boxes, sizes = localisation.components(mask)
    assert boxes.tolist() == [[4, 0, 5, 4], [0, 0, 2, 2], [0, 3, 1, 4]]
    assert sizes.tolist() == [4, 2, 1]
    assert localisation.components(np.zeros((2, 3), bool))[0].shape == (0, 4)


def test_parts_are_those_of_flooding() -> None:
    for _ in range(10):
        mask = DRAW.random((9, 12)) < 0.35
        boxes, sizes = localisation.components(mask)
        twin = flooded(mask)
        assert sizes.tolist() == [len(part) for part in twin]
        assert sorted(map(tuple, boxes.tolist())) == sorted(map(box_of, twin))


def test_iou() -> None:
    assert localisation.iou([[0, 0, 2, 2]], [[1, 1, 3, 3], [0, 0, 2, 2], [2, 0, 4, 2]]).tolist() == [[1 / 7, 1, 0]]
    for _ in range(20):
        x, y = np.sort(DRAW.choice(9, (2, 2), replace=True), 1), np.sort(DRAW.choice(9, (2, 2), replace=True), 1)
        a, b = (int(x[0, 0]), int(x[1, 0]), int(x[0, 1]) + 1, int(x[1, 1]) + 1), (int(y[0, 0]), int(y[1, 0]), 9, 9)
        assert localisation.iou([a], [b])[0, 0] == pytest.approx(cells_iou(a, b))


def test_a_sweep_looks_at_the_largest_part_and_at_any() -> None:
    """The object is the small part, the large one is elsewhere: MaxBoxAcc misses it, MaxBoxAccV2 finds it."""
    values = np.zeros((4, 8))
    values[:, :3], values[1:3, 6:8] = 0.8, 0.5
    truth = np.array([[6.0, 1.0, 8.0, 3.0]])
    largest, best = localisation.sweep(values, truth, np.array([0.0, 0.3, 0.6, 0.9]))
    assert largest.tolist() == [4 / 32, 0, 0, 0]
    assert best.tolist() == [4 / 32, 1, 0, 0]


def test_a_sweep_is_that_of_each_threshold() -> None:
    values, thresholds = np.round(DRAW.random((8, 10)), 1), np.linspace(0, 1, 21)
    truth = [(2, 1, 7, 5), (0, 4, 3, 8)]
    largest, best = localisation.sweep(values, np.array(truth, float), thresholds)
    for at, threshold in enumerate(thresholds):
        parts = flooded(values >= threshold)
        fits = [max(cells_iou(box_of(part), each) for each in truth) for part in parts]
        assert best[at] == pytest.approx(max(fits, default=0))
        longest = [fit for part, fit in zip(parts, fits, strict=True) if len(part) == len(parts[0])]
        assert any(largest[at] == pytest.approx(each) for each in longest or [0])


def test_box_accuracy_is_at_the_best_threshold_of_all_images() -> None:
    fits = np.array([[0.1, 0.6, 0.9], [0.5, 0.2, 0.4], [0.1, 0.7, 0.2], [0.2, 0.5, 0.0]])
    np.testing.assert_array_equal(accuracy.box_accuracy(fits, 0.5, ONCE), [[0.25, 0.75, 0.25]])
    # No threshold serves all: each image at its own best would give 1.
    assert accuracy.box_accuracy(fits, 0.5, ONCE).max() == 0.75
    drawn = np.array([[0.0, 2, 1, 1]])
    np.testing.assert_array_equal(accuracy.box_accuracy(fits, 0.5, drawn), [fits[[1, 1, 2, 3]].__ge__(0.5).mean(0)])
    assert np.isnan(accuracy.box_accuracy(fits, 0.5, 0 * ONCE)).all()


def test_a_threshold_of_the_other_half_is_no_better_than_the_best_of_all() -> None:
    fits = np.array([[0.9, 0.1], [0.8, 0.1], [0.1, 0.9], [0.2, 0.7]])
    half = np.array([True, True, False, False])
    # Each half is best at the threshold at which the other is worst.
    assert accuracy.crossed(fits, half, 0.5, ONCE) == 0
    assert accuracy.box_accuracy(fits, 0.5, ONCE).max() == 0.5
    assert accuracy.crossed(fits, np.array([True, False, True, False]), 0.5, ONCE) == 0.5
    assert np.isnan(accuracy.crossed(fits, np.ones(4, bool), 0.5, ONCE))
    assert np.isnan(accuracy.crossed(fits, half, 0.5, np.array([[1.0, 3, 0, 0]])))


def test_pixels_above_leave_out_what_nobody_knows() -> None:
    values = np.array([[0.1, 0.5, 0.9], [0.5, 0.2, 0.7]])
    mask = np.array([[1, 1, 0], [0, -1, -1]], np.int8)
    inside, outside = localisation.pixels_above(values, mask, np.array([0.0, 0.5, 0.8]))
    assert inside.tolist() == [2, 1, 0]
    assert outside.tolist() == [2, 2, 1]


def test_pixel_ap_is_the_sum_over_thresholds() -> None:
    """Of two images together: precision of each threshold times what its recall adds."""
    thresholds = np.linspace(0, 1, 12)
    pairs = [(DRAW.random((5, 6)), (DRAW.random((5, 6)) < 0.4).astype(np.int8)) for _ in range(2)]
    inside, outside = np.array([localisation.pixels_above(*each, thresholds) for each in pairs]).swapaxes(0, 1)
    totals = np.array([mask.sum() for _, mask in pairs])
    total = int(totals.sum())
    twin, before = 0.0, 0.0
    for threshold in thresholds[::-1]:
        right = sum(int(((values >= threshold) & (mask == 1)).sum()) for values, mask in pairs)
        every = sum(int((values >= threshold).sum()) for values, _ in pairs)
        twin += (right / every if every else 0) * (right / total - before)
        before = right / total
    assert accuracy.pixel_ap(inside, outside, totals, np.ones((1, 2))) == pytest.approx(twin)
    alone = accuracy.pixel_ap(inside[:1], outside[:1], totals[:1], np.ones((1, 1)))
    assert accuracy.pixel_ap(inside, outside, totals, np.array([[2.0, 0]])) == pytest.approx(alone)


def test_pixel_ap_of_a_perfect_map_and_of_none() -> None:
    mask = np.array([[1, 0], [0, 0]], np.int8)
    thresholds = np.linspace(0, 1, 11)
    for values, wanted in ((mask.astype(float), 1), (np.ones((2, 2)), 0.25)):
        above = [each[None] for each in localisation.pixels_above(values, mask, thresholds)]
        assert accuracy.pixel_ap(*above, np.ones(1), np.ones((1, 1))) == wanted


def test_share_boxes_are_of_the_maximum_and_not_of_the_range() -> None:
    values = np.array([[-9.0, 0.19, 0.16, 0.0], [0.0, 1.0, 0.0, 0.0]])
    assert localisation.share_box(values, localisation.CAM).tolist() == [1, 1, 2, 2]
    assert localisation.share_box(values, localisation.GRAD_CAM).tolist() == [1, 0, 3, 2]
    assert np.isnan(localisation.share_box(-np.ones((2, 2)), 0.2)).all()


def test_the_centre_box_has_half_the_area() -> None:
    left, top, right, bottom = localisation.centre_box((10, 20))
    assert (right - left) * (bottom - top) == pytest.approx(100)
    assert (left + right, top + bottom) == pytest.approx((20, 10))
    assert (right - left) / (bottom - top) == pytest.approx(2)


def test_hits_with_tolerance_and_without() -> None:
    values, mask = np.zeros((5, 5)), np.zeros((5, 5), np.int8)
    mask[0, 0], values[3, 4] = 1, 2.0
    assert localisation.hit(values, mask, 0) == 0
    assert localisation.hit(values, mask, 4.9) == 0
    assert localisation.hit(values, mask, 5) == 1
    values[0, 0] = 2.0
    assert localisation.hit(values, mask, 0) == 0.5
    mask[3, 4] = -1
    assert localisation.hit(values, mask, 0) == 1
    mask[0, 0] = 0
    assert np.isnan(localisation.hit(values, mask, 0))


def test_a_constant_map_hits_by_chance() -> None:
    mask = (DRAW.random((6, 7)) < 0.3).astype(np.int8)
    assert localisation.hit(np.zeros((6, 7)), mask, 0) == pytest.approx(mask.mean())


def test_energy_is_of_the_positive_part() -> None:
    values = np.array([[3.0, 1.0], [-5.0, 4.0]])
    mask = np.array([[1, 0], [1, -1]], np.int8)
    assert localisation.energy_inside(values, mask) == 0.75
    assert np.isnan(localisation.energy_inside(-np.abs(values), mask))


def test_truths() -> None:
    truth = Truth.of_boxes(np.array([[0.4, 0, 2.5, 1], [2, 1, 4, 3]]), (3, 4))
    assert truth.mask.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    mask = np.array([[1, 0, 0, -1], [0, 0, 1, 1]], np.int8)
    found = Truth.of_mask(mask)
    assert found.boxes.tolist() == [[2, 1, 4, 2], [0, 0, 1, 1]]
    assert found.mask.tolist() == mask.tolist()


def test_grab_cut_finds_an_object_of_another_colour() -> None:
    """The map points at a part of the object; colour tells the rest."""
    pytest.importorskip("cv2", reason="needs OpenCV: the extra `boxes`")
    pixels = np.empty((3, 32, 32), np.uint8)
    pixels[:] = np.array([30, 60, 200], np.uint8)[:, None, None]
    pixels[:, 8:24, 6:20] = np.array([220, 40, 20], np.uint8)[:, None, None]
    pixels += DRAW.integers(0, 12, pixels.shape, dtype=np.uint8)
    saliency = DRAW.random((32, 32)) * 0.01
    saliency[12:20, 9:16] += 1
    saliency[:5], saliency[27:] = 0, 0  # more than 30 %: no value lies below the quantile
    assert localisation.grab_cut_box(saliency, pixels).tolist() == [6, 8, 20, 24]
    assert np.isnan(localisation.grab_cut_box(np.ones((32, 32)), pixels)).all()
