"""The pixels that a position of a map can depend on, in closed form: windows and how they follow from layer to layer.

Araujo, Norris and Sim, "Computing receptive fields of convolutional neural networks" (Distill, 2019), with branches,
whose windows are joined.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Axis:
    """Along one axis, position p depends on pixels from `step` p + `first` to `step` p + `last`, both included.

    Pixels outside the image are padding: `clipped` leaves them out.
    """

    step: int
    first: int
    last: int

    def slid(self, kernel: int, stride: int, padding: int, dilation: int = 1) -> Axis:
        """Return the axis of the output of a sliding window over a map with this one: of a convolution or a pooling.

        Whether a pooling rounds its size up changes which positions there are, not what each depends on.
        """
        first = self.first - padding * self.step
        return Axis(self.step * stride, first, self.last + (dilation * (kernel - 1) - padding) * self.step)

    def padded(self, before: int) -> Axis:
        """Return the axis of a map to which so many positions are added before the first one; negative: taken away."""
        return Axis(self.step, self.first - before * self.step, self.last - before * self.step)

    def sliced(self, start: int, step: int) -> Axis:
        """Return the axis of every few positions from one on: of a slice with this start and step."""
        moved = self.padded(-start)
        return Axis(self.step * step, moved.first, moved.last)

    def joined(self, other: Axis) -> Axis | None:
        """Return the axis of what is made of both, position by position; None if their positions drift apart."""
        if self.step != other.step:
            return None
        return Axis(self.step, min(self.first, other.first), max(self.last, other.last))

    def enlarged(self, factor: int) -> Axis | None:
        """Return the axis of a map whose positions are each repeated so often; None unless the step is a multiple."""
        step = Fraction(self.step, factor)
        if step.denominator != 1:
            return None
        return Axis(int(step), self.first - self.step + int(step), self.last)

    def clipped(self, position: int, size: int) -> tuple[int, int]:
        """Return the first pixel of a position's window and one past its last, within an image of `size` pixels."""
        at = self.step * position
        first = min(max(at + self.first, 0), size)
        return first, max(min(at + self.last + 1, size), first)


PIXELS = Axis(1, 0, 0)
"""The axis of the image itself."""
