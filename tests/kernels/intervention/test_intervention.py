"""Regions, ratios and choices against their definitions, written out."""

import numpy as np
import pytest

from kernels.intervention.choice import alike, order_of
from kernels.intervention.ratios import ratio_of_sums
from kernels.intervention.regions import contrast, dilated, distance, spots, stretched


def test_dilation_is_within_so_many_steps():
    random = np.random.default_rng(0)
    mask = random.random((9, 11)) < 0.05
    mask[4, 5] = True
    at = np.argwhere(mask)
    for steps in (0, 1, 3):
        wanted = [[np.abs(at - (y, x)).sum(1).min() <= steps for x in range(11)] for y in range(9)]
        assert (dilated(mask, steps) == wanted).all()


def test_pieces_and_rings():
    region = np.zeros((12, 20), bool)
    region[2:5, 2:6] = region[5, 5] = True  # 13 pixels
    region[2:6, 8:12] = True  # 16
    region[9, 9] = True  # too small
    found = spots(region, 10)
    assert [int(spot.mask.sum()) for spot in found] == [13, 16]
    for spot in found:
        assert not (spot.ring & region).any()
        at = np.argwhere(spot.mask)
        near = [[np.abs(at - (y, x)).sum(1).min() <= 3 for x in range(20)] for y in range(12)]
        assert (spot.ring == (near & ~region)).all()
    assert spots(region, 10, 0.06)[0].mask.sum() == 13, "16 of 240 pixels are more than 6 %"


def test_contrast_and_distance_by_hand():
    random = np.random.default_rng(1)
    one, other, region = random.random((3, 8, 8)), random.random((3, 8, 8)), np.zeros((8, 8), bool)
    region[2:6, 2:6] = True
    (spot,) = spots(region, 4)
    inside = [np.mean([one[c, y, x] for y, x in np.argwhere(spot.mask)]) for c in range(3)]
    around = [np.mean([one[c, y, x] for y, x in np.argwhere(spot.ring)]) for c in range(3)]
    wanted = sum((a - b) ** 2 for a, b in zip(inside, around, strict=True)) ** 0.5
    assert contrast(one, spot) == pytest.approx(wanted, rel=1e-12)
    plain = sum(abs(one[c, y, x] - other[c, y, x]) / 3 for y, x in np.argwhere(region) for c in range(3))
    assert distance(one, other, region) == pytest.approx(plain, rel=1e-12)


def test_maps_at_another_size():
    maps = np.arange(12).reshape(3, 4)
    assert (stretched(maps, (6, 8)) == np.kron(maps, np.ones((2, 2), int))).all()
    assert stretched(maps, (3, 4)) is maps


def test_ratios_leave_out_what_is_unknown():
    part = np.array([[1.0, np.nan, 0.0], [3.0, 4.0, 0.0]])
    found = ratio_of_sums(part, np.array([[2.0, 5.0, 0.0], [2.0, 8.0, 0.0]]))
    assert found.value[:2].tolist() == [1.0, 0.5]
    assert np.isnan(found.value[2])
    assert (found.low[0], found.high[0]) == (0.5, 1.5)


def test_intervals_hold_the_truth():
    """Of means of 40 normal numbers, about 95 of 100 intervals hold the truth."""
    random = np.random.default_rng(2)
    values = random.normal(1.0, 1.0, (40, 200))
    found = ratio_of_sums(values, np.ones_like(values), draws=400)
    assert 0.88 < ((found.low <= 1) & (found.high >= 1)).mean() < 0.99


def test_orders_and_units_alike():
    assert order_of(np.array([0.1, np.nan, 0.3, 0.3])).tolist() == [2, 3, 0, 1]
    means = np.array([0.0, 1.0, 2.0, 3.0, 10.0, 11.0, 12.0])
    for seed in range(20):
        chosen = alike(np.array([4, 0]), means, np.random.default_rng(seed))
        assert len(set(chosen.tolist())) == 2 and not {0, 4} & set(chosen.tolist())
        assert chosen[0] in (3, 5, 6)
    with pytest.raises(ValueError, match="3 other units for 4"):
        alike(np.arange(4), means, np.random.default_rng(0))
