"""Where the gradient of the image ends on its way through a network: `no_grad`, `inference_mode`, `detach`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from pipeline.networks.graph.operations import Tape, said_of, tensors_in
from pipeline.networks.layers import first_tensor


class _Flow(Tape):
    """Notes which results were made of others without their gradient, and why; `notes` says it of each layer."""

    def __init__(self, network: nn.Module, images: torch.Tensor, layers: Iterable[str]) -> None:
        super().__init__(network, images)
        self.layers = set(layers)
        self.notes: dict[str, str] = {}
        self.ended: Any = WeakIdKeyDictionary()  # by result, where gradients ended of what it is made of
        self._entered: list[tuple[str, bool]] = []

    def entered(self, module: str) -> None:
        self._entered.append((module, torch.is_grad_enabled()))

    def after(self, name: str, inputs: Any, output: Any) -> None:
        given = [each for each in tensors_in(inputs) if each in self.number]
        had = name in ("detach", "detach_") or any(each.requires_grad for each in given)
        causes = dict.fromkeys(cause for each in given for cause in self.ended.get(each, ()))
        super().after(name, inputs, output)
        results = [each for each in tensors_in(output) if each in self.number and each.is_floating_point()]
        if name == "__setitem__" and given:
            results = [inputs[0][0]]
        if had and any(not each.requires_grad for each in results):
            causes[self._cause(name)] = None
        if causes:
            for each in results:
                self.ended[each] = tuple(causes)

    def _cause(self, name: str) -> str:
        if torch.is_grad_enabled():
            name = {"__get__": "data", "detach_": "detach"}.get(name, name)
            return f"`{name}` in {said_of(self._module)}"
        outside = next((module for module, enabled in reversed(self._entered) if enabled), "")
        mode = "torch.inference_mode" if torch.is_inference_mode_enabled() else "torch.no_grad"
        return f"`{mode}` in {said_of(outside)}"

    def left(self, module: str, inputs: Any, output: Any) -> None:
        super().left(module, inputs, output)
        self._entered.pop()
        tensor = first_tensor(output)
        if module not in self.layers or tensor is None:
            return
        with self.aside():
            causes = " and ".join(self.ended.get(tensor, ()))
            if tensor.requires_grad:
                if causes:
                    self.notes[module] = f"its gradient leaves out what passes through {causes}"
            elif causes:
                self.notes[module] = f"no gradient reaches the input: it ends at {causes}"
            elif self.unknown(tensor):
                where = f": {said_of(self.gaps[0])} runs code that cannot be followed" if self.gaps else ""
                self.notes[module] = f"no gradient reaches the input, and where it ends cannot be read{where}"
            elif tensor in self.number:
                self.notes[module] = "no gradient reaches the input: what it is made of has none"
            else:
                self.notes[module] = "it is not made of the image"


def ends(network: nn.Module, images: torch.Tensor, layers: Iterable[str]) -> dict[str, str]:
    """Say of each layer to which not all of the image's gradient leads where it ends; weights have no gradients here.

    Raises
    ------
    RuntimeError
        The network cannot run with gradients, for example because it mixes them with tensors of `inference_mode`.
    """
    given = images.detach().clone().requires_grad_()
    with torch.enable_grad(), _Flow(network, given, layers) as flow:
        network(given.clone())
    return flow.notes
