"""Gradients of a scalar of a network's forward pass: of a logit, of a unit, or of anything computed from its output.

Weights get no gradient, and neither modes nor hooks stay on the network, whether a call ends well or not.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, get_args

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.fitness import Link
from pipeline.networks.graph.call_sites import CallSites, frozen
from pipeline.networks.layers import first_tensor, head_of, one_attention_path, replaced


class Target(Protocol):
    """The scalar of each image that is explained: a function of the network's output, or of a layer's."""

    @property
    def layer(self) -> str | None:
        """The layer whose output it is computed from; None: the network's."""

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        """Return the scalar of each image, (image,)."""

    def at(self, rows: torch.Tensor) -> Target:
        """Return the same for some of the images, which may repeat."""


@dataclass(frozen=True)
class Logit:
    """A class of each image: its logit, probability or log-probability, less that of `against` if given.

    `classes` and `against` are int64 (image,). With `probabilities`, the network's output is one, and its logarithm
    stands for the logits.
    """

    classes: torch.Tensor
    against: torch.Tensor | None = None
    link: Link = "logit"
    probabilities: bool = False
    layer: str | None = None

    def __post_init__(self) -> None:
        if self.link not in get_args(Link):
            raise MicrotomeError(f"link {self.link!r}: {', '.join(get_args(Link))}{nearest(self.link, get_args(Link))}")

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        if output.ndim != 2:
            raise MicrotomeError(f"the network gives {tuple(output.shape)}, expected logits (image, class)")
        if self.link != "logit" and output.shape[1] == 1:
            raise MicrotomeError(
                f"the network gives one logit, whose softmax is always 1: explain it, not a {self.link}"
            )
        if self.probabilities:
            if not output.is_cuda and bool((output < 0).any()):
                raise MicrotomeError("the network gives numbers below 0: they are no probabilities")
            output = output.log()
        if self.link == "probability":
            output = output.softmax(1)
        elif self.link == "log_probability":
            output = output.log_softmax(1)
        value = _picked(output, self.classes)
        return value if self.against is None else value - _picked(output, self.against)

    def at(self, rows: torch.Tensor) -> Logit:
        against = None if self.against is None else self.against[rows]
        return replace(self, classes=self.classes[rows], against=against)


@dataclass(frozen=True)
class Unit:
    """A unit of a layer at a position, or its maximum over all positions.

    `index` is that of the layer's output without the batch: `(unit, y, x)` of maps, `(token, unit)` of tokens. What it
    leaves open is reduced to the maximum.
    """

    layer: str | None
    index: tuple[int | slice, ...]

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        whole = tuple(output.shape[1:])
        if len(self.index) > len(whole) or any(
            not (-size <= each < size) if isinstance(each, int) else not range(*each.indices(size))
            for each, size in zip(self.index, whole, strict=False)
        ):
            place = "the network" if self.layer is None else f"layer {self.layer!r}"
            raise MicrotomeError(f"no unit {self.index} in the output of {place}, which is {whole} for an image")
        return output[(slice(None), *self.index)].reshape(len(output), -1).amax(1)

    def at(self, rows: torch.Tensor) -> Unit:
        return self


@dataclass(frozen=True)
class Scalar:
    """Any function of the network's output, (image, ...) to (image,), that treats images alike and apart.

    For example the log-probability of a word, or the distance of an embedding to a given one.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    layer: str | None = None

    def __call__(self, output: torch.Tensor) -> torch.Tensor:
        return self.function(output)

    def at(self, rows: torch.Tensor) -> Scalar:
        return self


@dataclass(frozen=True)
class Gradients:
    """What one forward and one backward give.

    Attributes
    ----------
    output : of the network, detached; None where the target is of a layer and the forward ended there.
    score : of each image, (image,).
    inputs : the gradient of the score with respect to the input, like the input; None where not wanted.
    layers : by name, a layer's output and the gradient of the score with respect to it.
    target : the target, where it was chosen from the output.
    """

    output: torch.Tensor | None
    score: torch.Tensor
    inputs: torch.Tensor | None
    layers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    target: Target


def gradients(
    network: nn.Module,
    inputs: torch.Tensor,
    target: Target | Callable[[torch.Tensor], Target],
    layers: Sequence[str] = (),
    of_inputs: bool = True,
    sites: CallSites | None = None,
) -> Gradients:
    """Compute the score of each image and its gradients, with respect to the input and to layers' outputs.

    Without `of_inputs`, the backward ends at the layers, and what lies before them costs a forward alone.

    Parameters
    ----------
    inputs : (image, ...), as the network takes them.
    target : what is explained, or a function that chooses it from the network's output.
    layers : names of modules. sites : backward rules in place of torch's own.

    Raises
    ------
    MicrotomeError
        The score does not depend on the input or on a layer, a layer is called more or less often than once, or the
        network is in training mode or draws random numbers.
    """
    refuse_training(network)
    kept: dict[str, torch.Tensor] = {}
    given = inputs.detach().requires_grad_(of_inputs)
    with (
        frozen(network),
        torch.enable_grad(),
        one_attention_path(),
        _repeatable(inputs),
        _kept(network, layers, kept, not of_inputs),
    ):
        with sites if sites is not None else contextlib.nullcontext():
            output = _output(network, given.clone(), getattr(target, "layer", None))  # which may write into its input
        chosen: Any = target if hasattr(target, "layer") else target(output.detach())
        with sites if sites is not None and sites.of_score else contextlib.nullcontext():
            score = chosen(output)
        if score.shape != (len(inputs),):
            raise MicrotomeError(f"the target gives {tuple(score.shape)} for {len(inputs)} images, expected one each")
        if sites is not None:
            sites.audit(score if sites.of_score else output)
        if missing := [name for name in layers if name not in kept]:
            raise MicrotomeError(f"layer {missing[0]!r} is not called in this forward")
        wanted = [*([given] if of_inputs else []), *(kept[name] for name in layers)]
        found: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if score.requires_grad and wanted:
            found = _differentiated(score, wanted)
    names = [*(["input"] if of_inputs else []), *(f"layer {name!r}" for name in layers)]
    for name, gradient in zip(names, found, strict=True):
        if gradient is None:
            raise MicrotomeError(
                f"what is explained does not depend on the {name} in a way that has a gradient"
                if name == "input"
                else f"{name}: what is explained does not depend on it"
            )
    of_layers = {
        name: (kept[name].detach(), gradient)
        for name, gradient in zip(layers, found[len(found) - len(layers) :], strict=True)
        if gradient is not None
    }
    return Gradients(
        output.detach() if chosen.layer is None else None,
        score.detach(),
        found[0] if of_inputs else None,
        of_layers,
        chosen,
    )


def _differentiated(score: torch.Tensor, wanted: Sequence[torch.Tensor]) -> Sequence[torch.Tensor | None]:
    """Return the gradient of the sum of scores, None where it does not depend; say what torch cannot differentiate."""
    try:
        return torch.autograd.grad(score.sum(), wanted, allow_unused=True)
    except RuntimeError as error:
        if "modified by an inplace operation" in str(error):
            raise MicrotomeError(
                "the network writes in place into values that its gradient needs, so torch cannot differentiate it: "
                "let that operation make a new tensor"
            ) from error
        if "torch.utils.checkpoint" in str(error):
            raise MicrotomeError(
                "the network computes parts of its forward again (torch.utils.checkpoint), which the method cannot "
                "follow: turn checkpointing off, which changes no number"
            ) from error
        raise


def output_of(network: nn.Module, inputs: torch.Tensor, layer: str | None, sites: CallSites) -> torch.Tensor:
    """Return the output of the network, or of a layer, from one forward through call sites."""
    refuse_training(network)
    with frozen(network), torch.enable_grad(), one_attention_path(), _repeatable(inputs), sites:
        return _output(network, inputs.detach().requires_grad_().clone(), layer)


def scores(network: nn.Module, inputs: torch.Tensor, target: Target, rows: int = 0) -> torch.Tensor:
    """Compute the score of each image, (image,), without gradients; refuse the same networks as `gradients`.

    One image stands for `rows` that are the same.
    """
    refuse_training(network)
    with torch.no_grad(), one_attention_path(), _repeatable(inputs):
        return target(_repeated(_output(network, inputs.clone(), target.layer), rows))


def scores_through(
    network: nn.Module, inputs: torch.Tensor, target: Target, sites: CallSites, rows: int
) -> torch.Tensor:
    """Compute the score of each image, (image,), while rules meet every call; one image stands for all `rows`."""
    refuse_training(network)
    with frozen(network), torch.enable_grad(), one_attention_path(), _repeatable(inputs), sites:
        output = _output(network, inputs.detach().requires_grad_().clone(), target.layer)
        return target(_repeated(output, rows)).detach()


def _repeated(output: torch.Tensor, rows: int) -> torch.Tensor:
    return output.expand(rows, *output.shape[1:]) if len(output) == 1 < rows else output


@contextlib.contextmanager
def _repeatable(inputs: torch.Tensor) -> Iterator[None]:
    """Use deterministic algorithms on a GPU, and refuse what draws random numbers, by the states of the generators."""
    before = _random_state(inputs)
    with _deterministic() if inputs.is_cuda else contextlib.nullcontext():
        yield
    if not all(map(torch.equal, before, _random_state(inputs))):
        raise MicrotomeError(
            "the network draws random numbers in its forward, so an explanation would be of one draw: give functional "
            "dropouts `training=self.training`, and leave out any other noise"
        )


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Compute on a GPU with the same bits each time, where torch has a way to."""
    memory: Any = torch.utils.deterministic
    fill, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark


def _random_state(inputs: torch.Tensor) -> list[torch.Tensor]:
    """Return the states of the generators that a network on the inputs' device may draw from."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(inputs.device)] if inputs.is_cuda else states


class _Reached(BaseException):
    """Ends a forward at the layer that a target is of; no `except Exception` of a network may catch it."""


def _output(network: nn.Module, inputs: torch.Tensor, layer: str | None) -> torch.Tensor:
    """Return the output that a target is computed from: a layer's, or the network's logits."""
    if layer is None:
        output = head_of(network(inputs))
        if output is None:
            raise MicrotomeError(f"{type(network).__name__} does not return a tensor")
        return output
    found: list[torch.Tensor] = []

    def reached(module: nn.Module, _: object, output: object) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            raise MicrotomeError(f"layer {layer!r} gives {type(output).__name__}, expected a tensor")
        found.append(tensor)
        raise _Reached

    handle = _module(network, layer).register_forward_hook(reached)
    try:
        with contextlib.suppress(_Reached):
            network(inputs)
    finally:
        handle.remove()
    if not found:
        raise MicrotomeError(f"layer {layer!r} is not called in this forward")
    return found[0]


@contextlib.contextmanager
def _kept(network: nn.Module, layers: Sequence[str], kept: dict[str, torch.Tensor], leaves: bool) -> Iterator[None]:
    """Keep the outputs of layers; with `leaves`, the gradient's way begins there.

    What follows gets a copy, since it may write into the output.
    """

    def keep(name: str) -> Any:
        def hook(module: nn.Module, _: object, output: Any) -> Any:
            tensor = first_tensor(output)
            if tensor is None:
                raise MicrotomeError(f"layer {name!r} gives {type(output).__name__}, expected a tensor")
            if name in kept:
                raise MicrotomeError(f"layer {name!r} is called more than once in one forward, expected one call")
            kept[name] = tensor.detach().requires_grad_() if leaves and not tensor.requires_grad else tensor
            return replaced(output, tensor, kept[name].clone())

        return hook

    hooks = [_module(network, name).register_forward_hook(keep(name)) for name in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        known = [each for each, _ in network.named_modules() if each]
        raise MicrotomeError(f"no layer {name!r}{nearest(name, known)}") from None


def refuse_training(network: nn.Module) -> None:
    """Refuse a network that draws random numbers, or lets images of a batch depend on each other."""
    for name, module in network.named_modules():
        if module.training and isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)):
            raise MicrotomeError(f"module {name!r} is in training mode: call `eval()` first")


def _picked(output: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    if len(classes) != len(output):
        raise MicrotomeError(f"{len(classes)} classes for {len(output)} images, expected one each")
    if not classes.is_cuda:  # those on a GPU were chosen from the output; to look at them would wait for it
        outside = classes[(classes < 0) | (classes >= output.shape[1])]
        if len(outside):
            raise MicrotomeError(
                f"class {int(outside[0])} of a network of {output.shape[1]} logits, expected 0 to {output.shape[1] - 1}"
            )
    return output.gather(1, classes.to(output.device)[:, None])[:, 0]


def in_chunks(rows: int, batch: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of chunks of at most `batch` rows."""
    for at in range(0, rows, batch):
        yield at, min(at + batch, rows)


def padded(values: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat the last row until there are `batch` rows: other batch sizes round otherwise."""
    lacking = batch - len(values)
    return values if lacking <= 0 else torch.cat([values, values[-1:].expand(lacking, *values.shape[1:])])


def relative(difference: torch.Tensor, *scales: torch.Tensor) -> torch.Tensor:
    """Return |difference| over the largest |scale| of each image, float64 (image,); NaN where all scales are 0."""
    largest = torch.stack([each.double().abs() for each in scales]).amax(0)
    return torch.where(largest > 0, difference.double().abs() / largest, math.nan)


def of_tensors(
    network: nn.Module,
    inputs: torch.Tensor,
    target: Target,
    sites: CallSites,
    kept: Callable[[], Sequence[torch.Tensor]],
    wanted: bool = True,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return tensors that call sites kept in a forward, and the gradient of the score with respect to each if `wanted`.

    A tensor on which the score does not depend has the gradient 0.
    """
    refuse_training(network)
    with frozen(network), torch.enable_grad(), _repeatable(inputs):
        with sites:
            output = _output(network, inputs.detach().requires_grad_().clone(), target.layer)
        found = list(kept())
        if not wanted:
            return [each.detach() for each in found], []
        score = target(output)
        made = _differentiated(score, found)
    given = [torch.zeros_like(a) if g is None else g for a, g in zip(found, made, strict=True)]
    return [each.detach() for each in found], given
