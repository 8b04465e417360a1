"""Reading the images of slots."""

import numpy as np
import pytest

from pipeline.data.images import pixels


class Counted:
    """An array in shards of seven images, which counts how often it is read."""

    def __init__(self) -> None:
        self.values = np.random.default_rng(0).integers(0, 256, (50, 3, 2, 2), np.uint8)
        self.shape, self.dtype = self.values.shape, self.values.dtype
        self.chunks, self.reads = (7, 3, 2, 2), 0

    def __getitem__(self, part: slice) -> np.ndarray:
        self.reads += 1
        return self.values[part]


@pytest.mark.parametrize(
    ("slots", "shards"),
    [([], 0), ([3], 1), ([49, 0, 48, 0], 3), (range(50), 8), (np.random.default_rng(1).permutation(50)[:30], 8)],
)
def test_images_come_in_the_order_of_their_slots_and_every_shard_is_read_once(slots, shards):
    array = Counted()
    found = pixels({"image": array}, slots)
    np.testing.assert_array_equal(found, array.values[np.asarray(slots, int)])
    assert found.dtype == np.uint8 and array.reads == shards
