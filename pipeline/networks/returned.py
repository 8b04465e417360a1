"""What a network returns: its logits may be one tensor among several, found by name or by place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipeline.errors import MicrotomeError
from pipeline.networks.layers import entries_of

Shapes = Mapping[str | int, tuple[int, ...]]


def returning(network: nn.Module, output: str | int | None, name: str) -> nn.Module:
    """Have a network return one of the tensors that it returns, by name or place; None leaves it as it is.

    The network gets a class of its own, whose forward calls the former one, so that graphs of it hold the choice.
    """
    if output is None:
        return network
    before = type(network)

    def forward(self: nn.Module, images: torch.Tensor) -> Any:
        return _picked(before.forward(self, images), output, name)

    network.__class__ = type(before.__name__, (before,), {"forward": forward, "__module__": before.__module__})
    return network


def _picked(returned: Any, output: str | int, name: str) -> Any:
    if isinstance(returned, torch.Tensor):
        raise MicrotomeError(f"{name} returns one tensor, and no entry `output: {output}`: leave out `output`")
    found = entries_of(returned)
    values = list(found.values())
    if isinstance(output, int) and -len(values) <= output < len(values):
        return values[output]
    if isinstance(output, str) and output in found:
        return found[output]
    there = ", ".join(map(repr, found)) or type(returned).__name__
    raise MicrotomeError(f"{name} returns no entry `output: {output}`; it returns {there}")


def check_returned(shapes: Shapes, classes: int | None, name: str) -> None:
    """Refuse several tensors among which the logits are not clear.

    They are clear where an entry is called `logits`, and where the first is the only one of shape (class).

    Parameters
    ----------
    shapes : of each tensor that the network returns, without the batch; empty if it returns one tensor alone.
    classes : that the images are labelled with, if any.
    """
    if len(shapes) < 2 or "logits" in shapes:
        return
    vectors = [key for key, shape in shapes.items() if len(shape) == 1]
    wide = [key for key in vectors if classes is None or shapes[key] == (classes,)]
    first = next(iter(shapes))
    if first in vectors:
        clear = len(vectors) == 1 or (wide == [first] and classes is not None)
    else:
        clear = classes is None or not wide  # a network without a head, which returns its features
    if not clear:
        listed = ", ".join(f"{key!r} {shape}" for key, shape in shapes.items())
        labelled = f", and the images have {classes} classes" if classes else ""
        raise MicrotomeError(
            f"{name} returns several tensors for an image, {listed}{labelled}: say which are the logits, by name or "
            f"place, for example `output: {(wide or vectors)[-1]}`"
        )
