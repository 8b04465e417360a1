"""What a backward pass keeps for biases and loses, image by image, summed where it arises.

The images of a batch lie along some axis of every tensor, not always the first: (token, image, unit), or rows of
(token, image) after a reshape. A network is studied once, on one image and on two, and the layouts of its calls are
remembered by network and shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pipeline.errors import MicrotomeError

NEAR = 1e-3
"""Relative difference up to which outputs of an image alone and among others are the same."""


@dataclass(frozen=True)
class Layout:
    """Where the images lie in the output of a call.

    Attributes
    ----------
    shape : of the output for one image.
    axis : that holds the images. first : whether the entries of an image are neighbours on it; else images alternate.
    """

    shape: tuple[int, ...]
    axis: int
    first: bool

    def fits(self, shape: Sequence[int], images: int) -> bool:
        """Return whether this is the layout of an output of that shape for so many images."""
        return tuple(shape) == self.of(images)

    def of(self, images: int) -> tuple[int, ...]:
        """Return the shape of the output for so many images."""
        return (*self.shape[: self.axis], images * self.shape[self.axis], *self.shape[self.axis + 1 :])

    def per_image(self, values: torch.Tensor, images: int) -> torch.Tensor:
        """Return the sum over all entries of each image, float64 (image,)."""
        each, axis = self.shape[self.axis], self.axis
        if each > 1:
            values = values.unflatten(axis, (images, each) if self.first else (each, images))
            axis += not self.first
        others = [at for at in range(values.ndim) if at != axis]
        return values.sum(others, dtype=torch.float64) if others else values.double()


def layout_of(one: torch.Tensor, two: torch.Tensor) -> Layout | None:
    """Return the layout of a call from its outputs for an image and for two of which it is the first.

    None if they are no outputs of the same image (the call mixes the images of a batch), or if nothing tells which of
    several entries are whose.
    """
    axes = [at for at, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
    if one.ndim != two.ndim or len(axes) != 1 or two.shape[axes[0]] != 2 * one.shape[axes[0]]:
        return None
    (axis,), each = axes, one.shape[axes[0]]
    alone = two.unflatten(axis, (2, each)).select(axis, 0), two.unflatten(axis, (each, 2)).select(axis + 1, 0)
    near, alternating = (_distance(one, other) for other in alone)
    if min(near, alternating) > NEAR or (each > 1 and near == alternating and bool(one.any())):
        return None
    return Layout(tuple(one.shape), axis, near <= alternating)


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest difference relative to the largest finite magnitude."""
    scale = torch.where(one.isfinite(), one.abs(), 0.0).amax() if one.numel() else one.new_ones(())
    different = torch.where(one == other, 0.0, (one - other).abs()) / scale.clamp(min=torch.finfo(one.dtype).tiny)
    return float(different.nan_to_num(torch.inf).amax()) if one.numel() else 0.0


class Ledger:
    """Relevance of each image that biases and constants keep, and that rules lose, float64 (image,)."""

    def __init__(self, images: int, device: torch.device) -> None:
        self.images = images
        self.bias = torch.zeros(images, dtype=torch.float64, device=device)
        self.leak = torch.zeros_like(self.bias)

    def book_bias(self, layout: Layout, values: torch.Tensor) -> None:
        """Add relevance that a bias or constant keeps, of the shape of a call's output."""
        self.bias = self.bias + layout.per_image(values, self.images)

    def book_leak(self, layout: Layout, values: torch.Tensor) -> None:
        """Add relevance that is lost, of the shape of a call's output."""
        self.leak = self.leak + layout.per_image(values, self.images)


@dataclass
class Site:
    """A call that books relevance: its name, its number in the forward, and the layout of its output."""

    ledger: Ledger
    call: str
    at: int
    layout: Layout | None = None

    def book(self, bias: torch.Tensor | None = None, leak: torch.Tensor | None = None) -> None:
        """Add relevance of the output's entries that a bias or constant keeps, or that is lost."""
        assert self.layout is not None
        if bias is not None:
            self.ledger.book_bias(self.layout, bias)
        if leak is not None:
            self.ledger.book_leak(self.layout, leak)


class OtherCallsError(MicrotomeError):
    """The network was changed since it was studied: it calls other functions, or lacks what is asked for."""
