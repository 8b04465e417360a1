"""Intersections and IoU against sets of pixels; control by permutation; torch against numba."""

import pickle

import numpy as np
import pytest
from dissection_oracles import KINDS, activations, by_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.dissection import on_device as dissection_torch
from kernels.dissection.counts import Counts, Labels, ShardCounts, iou, label_columns
from kernels.dissection.half import HIGHEST, LOWEST, value
from kernels.dissection.iou import count_shard, mask
from kernels.dissection.upsample import Border, Size, upsample

NUMBERS = np.array([[3, 700, 9], [40, 41, 65535]])  # of the concepts in two categories
CONCEPT = np.array([700, 3, 65535, 40])  # those that are counted, in the order of their columns
CATEGORY = np.array([0, 0, 1, 1])
GROUPS = 4
TORCH = "cpu:0"  # a device for torch; plain "cpu" is numba's


def label_maps(seed: int, images: int, size: Size) -> NDArray[np.uint16]:
    """Patches of labels (n, 2, H, W), some of nothing; the second category is missing in every third image."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-1, 3, (images, 2, -(-size[0] // 3), -(-size[1] // 3)))
    fine = coarse.repeat(3, axis=2).repeat(3, axis=3)[:, :, : size[0], : size[1]]
    labels = np.where(fine < 0, 0, np.stack([NUMBERS[k][fine[:, k]] for k in range(2)], axis=1))
    labels[2::3, 1] = 0
    return labels.astype(np.uint16)


def by_sets(
    active: NDArray[np.bool_], labels: NDArray[np.uint16], group: list[int], partner: list[int], union: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Intersections (groups, units, concepts) and IoU (units, concepts) by sets of (image, y, x)."""
    images, units = active.shape[:2]
    together = np.zeros((GROUPS, units, len(CONCEPT)), np.int64)
    values = np.zeros((units, len(CONCEPT)))
    for c, (number, k) in enumerate(zip(CONCEPT, CATEGORY, strict=True)):
        labelled = {(i, y, x) for i in range(images) for y, x in np.argwhere(labels[partner[i], k] == number)}
        counted = {i for i in range(images) if union == "all" or labels[partner[i], k].any()}
        for u in range(units):
            fires = {(i, y, x) for i, y, x in np.argwhere(active[:, u])}
            for i, _, _ in fires & labelled:
                together[group[i], u, c] += 1
            fires = {pixel for pixel in fires if pixel[0] in counted}
            either = len(fires | labelled)
            values[u, c] = len(fires & labelled) / either if either else 0
    return together, values


def counted(shards: list[ShardCounts], units: int) -> Counts:
    counts = Counts.zeros(GROUPS, units, len(CONCEPT), 2)
    for shard in shards:
        counts.add(pickle.loads(pickle.dumps(shard)))
    return counts


def thresholds(seed: int, activation: NDArray[np.float16], size: Size, border: Border) -> NDArray[np.float16]:
    """For each unit one of its upsampled values, or any float16."""
    rng = np.random.default_rng(seed)
    values = upsample(activation, size, border).transpose(1, 0, 2, 3).reshape(activation.shape[1], -1)
    chosen = values[np.arange(len(values)), rng.integers(0, values.shape[1], len(values))]
    anything = value(rng.integers(LOWEST, HIGHEST + 1, len(values)))
    return np.where(rng.random(len(values)) < 0.8, chosen, anything)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(KINDS),
    st.sampled_from(["all", "category"]),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_counts_are_those_of_sets(
    shape: tuple[int, int, int, int], size: Size, border: Border, kind: str, union: str, permuted: bool, seed: int
) -> None:
    activation = activations(seed, shape, kind)
    labels = label_maps(seed, shape[0], size)
    threshold = thresholds(seed, activation, size, border)
    group = [(seed >> i) % GROUPS for i in range(shape[0])]
    permutation = np.roll(np.arange(shape[0]), 1) if permuted else None
    prepared = label_columns(labels, CONCEPT, CATEGORY)
    shard = count_shard(activation, threshold, prepared, group, border, permutation, GROUPS)
    counts = counted([shard], shape[1])
    active = upsample(activation, size, border) > threshold[:, None, None]
    partner = list(range(shape[0])) if permutation is None else permutation.tolist()
    together, values = by_sets(active, labels, group, partner, union)
    assert np.array_equal(counts.intersection, together)
    assert np.array_equal(iou(counts, CATEGORY, union), values)  # type: ignore[arg-type]
    assert np.array_equal(counts.unit_area.sum(axis=0), active.sum(axis=(0, 2, 3)))
    assert counts.pixels.sum() == shape[0] * size[0] * size[1]
    assert np.array_equal(mask(activation[0, 0], threshold[0], size, border), active[0, 0])


@pytest.mark.parametrize("border", ["edge", "zeros"])
@pytest.mark.parametrize("kind", KINDS)
def test_activity_is_that_of_torch_in_float64(border: Border, kind: str) -> None:
    activation = activations(11, (4, 3, 7, 5), kind)
    threshold = thresholds(11, activation, (28, 20), border)
    labels = label_maps(11, 4, (28, 20))
    dense = by_torch(activation.reshape(12, 7, 5), (28, 20), border).reshape(4, 3, 28, 20)
    with np.errstate(under="ignore"):
        active = dense.astype(np.float16) > threshold[:, None, None]
    together, values = by_sets(active, labels, [0, 1, 2, 3], [0, 1, 2, 3], "all")
    counts = counted(
        [count_shard(activation, threshold, label_columns(labels, CONCEPT, CATEGORY), range(4), border, groups=GROUPS)],
        3,
    )
    assert np.array_equal(counts.intersection, together)
    assert np.array_equal(iou(counts, CATEGORY), values)


def test_a_threshold_below_zero_is_passed_by_the_zero_border() -> None:
    activation = np.full((1, 1, 4, 4), -1, np.float16)
    labels = label_columns(np.full((1, 1, 16, 16), 3, np.uint16), [3], [0])
    zeros = count_shard(activation, np.float16([-0.9]), labels, [0], "zeros")
    edge = count_shard(activation, np.float16([-0.9]), labels, [0], "edge")
    assert zeros.unit_area.sum() == zeros.count.sum() == 16 * 16 - 12 * 12
    assert edge.unit_area.sum() == edge.count.sum() == 0


def test_order_of_shards_and_images_does_not_matter() -> None:
    activation, labels = activations(5, (12, 6, 5, 4), "relu"), label_maps(5, 12, (20, 16))
    threshold = np.full(6, 0.3, np.float16)
    group = np.arange(12) * 7 % GROUPS

    def part(images: NDArray[np.int64]) -> ShardCounts:
        prepared = label_columns(labels[images], CONCEPT, CATEGORY)
        return count_shard(activation[images], threshold, prepared, group[images], "edge", groups=GROUPS)

    whole = counted([part(np.arange(12))], 6)
    pieces = [part(images) for images in np.array_split(np.random.default_rng(0).permutation(12), 5)]
    for split in (counted(pieces, 6), counted(pieces[::-1], 6)):
        for name, array in vars(whole).items():
            assert np.array_equal(array, getattr(split, name)), name
            assert array.dtype == np.int64


def test_a_permutation_counts_as_permuted_labels_do() -> None:
    activation, labels = activations(6, (7, 4, 5, 5), "normal"), label_maps(6, 7, (15, 15))
    threshold, permutation, group = np.full(4, 1, np.float16), np.roll(np.arange(7), 3), np.arange(7) % GROUPS
    by_index = count_shard(
        activation, threshold, label_columns(labels, CONCEPT, CATEGORY), group, "edge", permutation, GROUPS
    )
    copied = label_columns(labels[permutation], CONCEPT, CATEGORY)
    by_copy = count_shard(activation, threshold, copied, group, "edge", None, GROUPS)
    for name, array in vars(by_index).items():
        assert np.array_equal(array, getattr(by_copy, name)), name


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)),
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.sampled_from(["edge", "zeros"]),
    st.sampled_from(KINDS),
    st.integers(0, 2**32 - 1),
)
def test_torch_counts_the_same_integers(
    shape: tuple[int, int, int, int], size: Size, border: Border, kind: str, seed: int
) -> None:
    activation = activations(seed, shape, kind)
    labels = label_columns(label_maps(seed, shape[0], size), CONCEPT, CATEGORY)
    threshold = thresholds(seed, activation, size, border)
    group, partner = np.arange(shape[0]) % GROUPS, np.roll(np.arange(shape[0]), 1)
    mine, its = (
        count_shard(activation, threshold, labels, group, border, partner, GROUPS, device) for device in ("cpu", TORCH)
    )
    assert_same(mine, its)


def test_torch_works_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    activation, labels = activations(7, (5, 6, 4, 4), "normal"), label_maps(7, 5, (8, 8))
    prepared, group = label_columns(labels, CONCEPT, CATEGORY), np.arange(5) % GROUPS
    monkeypatch.setattr(dissection_torch, "BLOCK", 3 * 64)
    mine, its = (
        count_shard(activation, np.full(6, 0.5, np.float16), prepared, group, "edge", None, GROUPS, device)
        for device in ("cpu", TORCH)
    )
    assert_same(mine, its)


def assert_same(one: ShardCounts, other: ShardCounts) -> None:
    for name, array in vars(one).items():
        assert np.array_equal(array, getattr(other, name)), name
        assert array.dtype == getattr(other, name).dtype, name


def test_many_concepts_and_units_that_never_fire() -> None:
    labels = np.arange(1, 1601, dtype=np.uint16).reshape(1, 1, 40, 40)
    prepared = label_columns(labels, np.arange(1, 1601), np.zeros(1600, int))
    activation = np.zeros((1, 3, 10, 10), np.float16)
    activation[0, 1] = 1
    shard = count_shard(activation, np.float16([0.5, 0.5, 0.5]), prepared, [2], "edge", groups=GROUPS)
    counts = Counts.zeros(GROUPS, 3, 1600, 1)
    counts.add(shard)
    assert counts.unit_area.sum(axis=0).tolist() == [0, 1600, 0]
    assert np.array_equal(counts.intersection[2, 1], np.ones(1600))
    assert counts.intersection.sum() == 1600


def test_no_counted_concept_and_no_image() -> None:
    labels = label_columns(label_maps(1, 3, (6, 6)), np.array([], int), np.array([], int))
    shard = count_shard(activations(1, (3, 2, 3, 3), "normal"), np.float16([0, 0]), labels, [0, 1, 2], "edge")
    assert len(shard.key) == 0
    assert shard.unit_area.sum() > 0
    nothing = label_columns(label_maps(1, 0, (6, 6)), CONCEPT, CATEGORY)
    shard = count_shard(np.zeros((0, 2, 3, 3), np.float16), np.float16([0, 0]), nothing, [], "edge")
    assert shard.pixels.sum() == shard.unit_area.sum() == len(shard.key) == 0


def bad_input() -> dict[str, tuple[str, dict]]:
    maps, labels = activations(1, (2, 3, 4, 4), "relu"), label_columns(label_maps(1, 2, (8, 8)), CONCEPT, CATEGORY)
    good: dict = {
        "activation": maps,
        "threshold": np.zeros(3, np.float16),
        "labels": labels,
        "group": [0, 1],
        "border": "edge",
    }
    strange = maps.copy()
    strange[1, 2, 0, 3] = np.nan
    return {
        "non-finite": ("image 1, unit 2", good | {"activation": strange}),
        "thresholds": ("expected one per unit", good | {"threshold": np.zeros(2, np.float16)}),
        "nan threshold": ("NaN", good | {"threshold": np.float16([0, np.nan, 0])}),
        "images": ("expected one of each per image", good | {"group": [0]}),
        "group": ("expected 0 to 19", good | {"group": [0, 20]}),
        "permutation": ("of 2 label maps", good | {"permutation": [0, 2]}),
        "border": ("'wrap' is not known", good | {"border": "wrap"}),
    }


@pytest.mark.parametrize("case", bad_input())
def test_what_does_not_fit_is_refused(case: str) -> None:
    message, arguments = bad_input()[case]
    with pytest.raises(ValueError, match=message):
        count_shard(**arguments)


def test_counts_of_another_shape_are_refused() -> None:
    _, arguments = bad_input()["non-finite"]
    arguments["activation"] = np.nan_to_num(arguments["activation"])
    with pytest.raises(ValueError, match=r"\(20, 4, 4, 2\), the shard has \(20, 3, 4, 2\)"):
        Counts.zeros(20, 4, 4, 2).add(count_shard(**arguments))
    with pytest.raises(ValueError, match="union 'image' is not known"):
        iou(Counts.zeros(20, 4, 4, 2), CATEGORY, "image")  # type: ignore[arg-type]


def test_label_maps_that_do_not_fit_are_refused() -> None:
    maps = label_maps(1, 3, (6, 6))
    maps[1, 1, 5, 5] = 700
    with pytest.raises(ValueError, match=r"image 1 holds concept 700 in category 1.* category 0"):
        label_columns(maps, CONCEPT, CATEGORY)
    with pytest.raises(ValueError, match="expected uint16"):
        label_columns(maps.astype(np.int32), CONCEPT, CATEGORY)  # type: ignore[arg-type]
    for concept in ([0], [5, 5], [65536]):
        with pytest.raises(ValueError, match="unique, from 1 to 65535"):
            label_columns(maps, concept, np.zeros(len(concept), int))
    with pytest.raises(ValueError, match="the maps have 2"):
        label_columns(maps, [1], [2])
    with pytest.raises(ValueError, match="one category per concept"):
        label_columns(maps, [1, 2], [1])


def test_labels_know_what_is_present() -> None:
    maps = label_maps(2, 6, (9, 9))
    labels: Labels = label_columns(maps, CONCEPT, CATEGORY)
    assert np.array_equal(labels.present, maps.any(axis=(2, 3)))
    assert np.array_equal(labels.area, np.stack([(maps == number).sum(axis=(1, 2, 3)) for number in CONCEPT], axis=1))
    assert not labels.present[2::3, 1].any()
