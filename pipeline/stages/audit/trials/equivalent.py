"""Networks that compute what another one does, in other operations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from pipeline.networks.layers import head_of, one_attention_path

ALIKE = 1e-9  # largest difference of logits, as a share of their magnitude, of networks that compute the same


class Halves(nn.Module):
    """A convolution as the sum of two: of the first half of the channels of its input, and of the others."""

    def __init__(self, whole: nn.Conv2d) -> None:
        super().__init__()
        self.middle = whole.in_channels // 2
        self.first = _part(whole, self.middle, whole.bias is not None)
        self.second = _part(whole, whole.in_channels - self.middle, False)
        with torch.no_grad():
            self.first.weight.copy_(whole.weight[:, : self.middle])
            self.second.weight.copy_(whole.weight[:, self.middle :])
            if whole.bias is not None and self.first.bias is not None:
                self.first.bias.copy_(whole.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x[:, : self.middle]) + self.second(x[:, self.middle :])


def _part(whole: nn.Conv2d, channels: int, bias: bool) -> nn.Conv2d:
    """Return a convolution like another one, of so many channels of its input."""
    return nn.Conv2d(
        channels,
        whole.out_channels,
        whole.kernel_size,  # type: ignore[arg-type]
        whole.stride,  # type: ignore[arg-type]
        whole.padding,  # type: ignore[arg-type]
        whole.dilation,  # type: ignore[arg-type]
        bias=bias,
        padding_mode=whole.padding_mode,  # type: ignore[arg-type]
        device=whole.weight.device,
        dtype=whole.weight.dtype,
    )


class Spelled(nn.Module):
    """ReLU as x - min(x, 0)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.clamp(max=0)


def folded(network: nn.Module, inputs: torch.Tensor, spared: str) -> bool:
    """Fold every BatchNorm into the convolution whose output alone it reads."""
    made: dict[int, str] = {}
    alive: list[torch.Tensor] = []
    pairs: list[tuple[str, str]] = []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            alive.append(output)  # else another tensor could get its id
            made[id(output)] = name

        return hook

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            if id(given[0]) in made:
                pairs.append((made.pop(id(given[0])), name))

        return hook

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(after(name)))
        elif isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            hooks.append(module.register_forward_pre_hook(before(name)))
    try:
        with torch.no_grad(), one_attention_path():
            network(inputs[:1].clone())
    finally:
        for each in hooks:
            each.remove()
    pairs = [pair for pair in pairs if spared not in pair]
    for convolution, norm in pairs:
        fused = fuse_conv_bn_eval(network.get_submodule(convolution), network.get_submodule(norm))  # type: ignore[type-var, arg-type]
        network.set_submodule(convolution, fused)
        network.set_submodule(norm, nn.Identity())
    return bool(pairs)


def halves(network: nn.Module, inputs: torch.Tensor, spared: str) -> bool:
    """Put two convolutions in place of each that mixes two channels or more."""
    return _replaced(
        network, lambda each: type(each) is nn.Conv2d and each.groups == 1 and each.in_channels > 1, Halves
    )


def spelled(network: nn.Module, inputs: torch.Tensor, spared: str) -> bool:
    """Put x - min(x, 0) in place of each module that is a ReLU."""
    return _replaced(network, lambda each: type(each) is nn.ReLU, lambda _: Spelled())


def _replaced(network: nn.Module, wanted: Callable[..., bool], make: Callable[..., nn.Module]) -> bool:
    names = [name for name, module in network.named_modules() if name and wanted(module)]
    for name in names:
        network.set_submodule(name, make(network.get_submodule(name)).eval())
    return bool(names)


VARIANTS: Mapping[str, Callable[[nn.Module, torch.Tensor, str], bool]] = {
    "folded": folded,
    "halves": halves,
    "spelled": spelled,
}
"""By name, what changes a network in place to one that computes the same; it says whether there was anything to change.

The third argument is the layer that a method looks at, whose output has to stay what it is.
"""


def equivalent(
    network: nn.Module, change: Callable[[nn.Module, torch.Tensor, str], bool], inputs: torch.Tensor, spared: str
) -> nn.Module | None:
    """Return another network that computes the same; None where there is nothing to change, or it computes another."""
    other = copy.deepcopy(network)
    if not change(other, inputs, spared):
        return None
    with torch.no_grad(), one_attention_path():
        mine, its = head_of(network(inputs.clone())), head_of(other(inputs.clone()))
    assert mine is not None and its is not None
    return other if float((mine - its).abs().max()) <= ALIKE * max(float(mine.abs().max()), 1.0) else None
