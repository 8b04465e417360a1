"""Windows by the positions that they are made of, one layer at a time."""

import itertools

import pytest

from kernels.locality.windows import PIXELS, Axis


@pytest.mark.parametrize("seed", range(12))
def test_windows_by_sets_of_pixels(seed):
    """Every position's window is the hull of the pixels that a chain of windows reaches, by plain sets."""
    sizes = [(3, 1, 1, 1), (5, 2, 2, 1), (2, 2, 0, 1), (3, 1, 2, 2), (1, 2, 0, 1), (7, 3, 1, 1)]
    chain = [sizes[(seed * 5 + at * (seed + 1)) % len(sizes)] for at in range(3)]
    axis, length = PIXELS, 200
    reached = [{at} for at in range(length)]
    for kernel, stride, padding, dilation in chain:
        axis = axis.slid(kernel, stride, padding, dilation)
        count = (len(reached) + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        taps = [[at * stride - padding + dilation * tap for tap in range(kernel)] for at in range(count)]
        reached = [set(itertools.chain(*(reached[tap] for tap in own if 0 <= tap < len(reached)))) for own in taps]
    for at, pixels in enumerate(reached):
        first, stop = axis.clipped(at, length)
        assert (first <= min(pixels) and max(pixels) < stop) if pixels else True
        inside = axis.step * at + axis.first > 30 and axis.step * at + axis.last < length - 30
        assert not inside or (first, stop) == (min(pixels), max(pixels) + 1)


def test_padding_slices_and_branches():
    axis = PIXELS.slid(3, 2, 1)
    assert axis == Axis(2, -1, 1)
    assert axis.padded(1) == Axis(2, -3, -1) and axis.sliced(1, 2) == Axis(4, 1, 3)
    assert axis.joined(PIXELS.slid(1, 2, 0)) == axis and axis.joined(PIXELS) is None
    up = axis.enlarged(2)
    assert up is not None and axis.enlarged(3) is None
    for at in range(4):  # positions 2k and 2k + 1 repeat position k
        first, stop = up.clipped(at + 20, 1000)
        own = axis.clipped((at + 20) // 2, 1000)
        assert first <= own[0] and own[1] <= stop


def test_windows_outside_the_image_are_empty():
    assert Axis(8, -20, -10).clipped(0, 64) == (0, 0)
    assert Axis(8, 70, 90).clipped(0, 64) == (64, 64)
