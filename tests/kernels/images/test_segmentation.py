"""One class a pixel from scores: bilinear weights for every output in float64, and masks with their classes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.images.segmentation import best_class, merged_masks


def upsampled(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scores (channel, h, w) at `size`: half-pixel centres, edge values beyond the edge, two weights an axis."""

    def weights(length: int, wanted: int) -> np.ndarray:
        position = np.clip((np.arange(wanted) + 0.5) * length / wanted - 0.5, 0, length - 1)
        return np.maximum(0, 1 - np.abs(position[:, None] - np.arange(length)))

    rows, columns = weights(scores.shape[1], size[0]), weights(scores.shape[2], size[1])
    return np.einsum("Yy,cyx,Xx->cYX", rows, scores.astype(np.float64), columns)


@settings(deadline=None, max_examples=80)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 15), st.integers(1, 15)),
    st.integers(0, 2**32 - 1),
)
def test_the_best_class_is_that_of_the_upsampled_scores(shape, size, seed):
    scores = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    found = best_class(torch.from_numpy(scores), size).numpy()
    assert found.shape == size
    large = upsampled(scores, size)
    chosen = np.take_along_axis(large, found[None], 0)[0]
    # Two classes may come within a rounding of float32 of each other; the one that is taken is never worse than that.
    assert (large.max(0) - chosen).max() <= 1e-5


def test_equal_scores_go_to_the_first_class():
    scores = torch.zeros(4, 2, 3)
    scores[1:3, 0] = 5
    found = best_class(scores, (2, 3))
    assert found.tolist() == [[1, 1, 1], [0, 0, 0]]
    assert found.dtype == torch.int64


def test_the_argmax_is_of_the_upsampled_scores_and_not_the_other_way_round():
    """Half-way between a pixel that is surely 0 and one that is a little more 1 than 0, it is 0."""
    scores = torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]]])
    assert best_class(scores, (1, 2)).tolist() == [[0, 1]]
    assert best_class(scores, (1, 8)).tolist() == [[0, 0, 0, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("size", [None, (9, 12)])
def test_masks_with_their_classes(size):
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(5, 4, generator=generator) * 3  # three classes and "no object"
    masks = torch.randn(5, 6, 7, generator=generator) * 3
    found = merged_masks(classes, masks, size).double().numpy()
    share = np.exp(classes.double().numpy())
    share /= share.sum(1, keepdims=True)
    large = masks.double().numpy() if size is None else upsampled(masks.numpy(), size)
    expected = np.zeros((3, *(size or (6, 7))))
    for query in range(5):
        for of_class in range(3):
            expected[of_class] += share[query, of_class] / (1 + np.exp(-large[query]))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
