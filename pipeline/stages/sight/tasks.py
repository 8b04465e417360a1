"""What workers do for the stage `sight`: one minibatch through a network, and every measure of it.

The network runs once as it is; once without each of its skip connections; and once with gradients, for a part of the
images, with a backward pass from each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from kernels.locality.attention import distances, mean_distance
from kernels.locality.localisation import patches, position_hsic, position_vectors
from kernels.locality.receptive_field import centre
from kernels.locality.skips import norm_ratio
from kernels.similarity.cka import centred
from pipeline.data.minibatches import Minibatch
from pipeline.errors import MicrotomeError
from pipeline.networks.features import images_of, naming_slots, packed_gram
from pipeline.networks.forward import Model, network_of, normalise, refuse_non_finite
from pipeline.networks.graph import gradient_flow, operations
from pipeline.networks.graph.arithmetic import Term, sums_to_one
from pipeline.networks.graph.operations import Attention, Operations, Product, Skip
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, Survey, first_tensor, one_attention_path, to_maps
from pipeline.networks.prepare import Prepared, prepare, survey_of
from pipeline.storage.store import Array, StoreRef, write
from pipeline.workers.resumable import Done

MINIBATCHES = "minibatches"  # the store, as `Done` names it
MOST_POSITIONS = 1024  # of a layer whose positions are compared with all patches: a million pairs


@dataclass(frozen=True)
class Seen(Prepared):
    """A network with what it does between its layers.

    Attributes
    ----------
    skips, attention : as `operations.find` gives them.
    localised : the last of the layers with more than one position, whose positions are compared with patches.
    absent : of a measure that this network does not have, why.
    unread : modules whose additions cannot be read. attention_unread : why of attention that cannot be.
    trail : the additions and products of a forward, in order.
    gradient_notes : by layer, where gradients end on their way to the input.
    values : of all outputs of an image.
    logits : whether the network gives logits of several classes: the largest of one is always its own.
    """

    skips: list[Skip]
    attention: list[Attention]
    localised: LayerInfo | None
    absent: dict[str, str]
    unread: tuple[str, ...]
    attention_unread: tuple[str, ...]
    trail: tuple[str, ...]
    gradient_notes: Mapping[str, str]
    values: int
    logits: bool


@dataclass(frozen=True)
class Work:
    """What all minibatches of a step have in common."""

    model: Model
    image: tuple[int, int]
    prepared: Seen
    measures: tuple[str, ...]
    gradients: int  # images of a minibatch
    store: Path
    places: int  # of a minibatch

    def wants(self, measure: str) -> bool:
        return measure in self.measures and measure not in self.prepared.absent


def prepare_seen(model: Model, size: tuple[int, int], layers: str | Sequence[str]) -> Seen:
    """Look at a network, its layers and what it does between them, on a worker."""
    network = network_of(model)
    every = survey_of(network, model, size)
    tokens = [layer.name for layer in every.layers if layer.layout == "tokens"]
    prepared = prepare(network, model, every, layers, strict=False, others=tokens)
    misplaced = {each.layer.name: each.reason for each in prepared.misplaced}
    noise = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    unlike = normalise(noise, model.spec)
    found = operations.find(network, unlike, {layer.name: layer for layer in every.layers})
    absent, notes = {}, {}
    # Without an order, which of the tokens are special is not known.
    mixed = {name for name, each in every.misplaced.items() if each.out_of_order and each.layer.special}
    skips = [skip for skip in found.skips if skip.info.name not in mixed]
    if not found.skips:
        absent["skips"] = found.without_skips
    elif not skips:
        name = found.skips[0].info.name
        absent["skips"] = f"layer {name!r} {every.misplaced[name].reason}"
    attention, elsewhere = placed(found.attention, every)
    if not attention:
        absent["attention"] = elsewhere[0] if elsewhere else found.without_attention
    spatial = [layer for layer in prepared.layers if layer.spatial and layer.name not in misplaced]
    localised = spatial[-1] if spatial else None
    grid = localised.shape[1:] if localised is not None else (1, 1)
    if localised is None:
        absent["localisation"] = "none of its layers has more than one position"
        if misplaced:
            absent["localisation"] = f"layer {next(reversed(misplaced))!r} {misplaced[next(reversed(misplaced))]}"
    elif math.prod(grid) > MOST_POSITIONS or grid[0] > size[0] or grid[1] > size[1]:
        absent["localisation"] = (
            f"layer {localised.name!r}, the last with positions, has {grid[0]} x {grid[1]} of them: name a later one"
        )
    if not spatial:
        absent["receptive_field"] = absent["localisation"]
    try:
        with _without_weights(network):
            notes = gradient_flow.ends(network, unlike, [layer.name for layer in spatial])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        absent["receptive_field"] = f"the network fails when it runs with gradients: {str(error).splitlines()[0]}"
    return Seen(
        **vars(prepared),
        skips=skips,
        attention=attention,
        localised=localised,
        absent=absent,
        unread=(*found.unread, *dict.fromkeys(skip.name for skip in found.skips if skip not in skips)),
        attention_unread=(*found.attention_unread, *elsewhere),
        trail=found.trail,
        gradient_notes=notes | {name: f"it {reason}" for name, reason in misplaced.items()},
        values=sum(layer.shape[0] * (layer.special + math.prod(layer.shape[1:])) for layer in every.layers),
        logits=every.classes is not None and every.classes > 1,
    )


def placed(attention: Sequence[Attention], survey: Survey) -> tuple[list[Attention], list[str]]:
    """Return the attention between positions of the image, and what is to be said of the rest.

    Outputs of attention itself may show a change everywhere alike, so one layer in or around it that shows where the
    positions lie is enough.
    """
    found, reasons = [], []
    for each in attention:
        module, own = each.name.partition(" [")[0], survey.misplaced.get(each.info.name)
        near = [
            layer
            for layer in survey.layers
            if (layer.layout, layer.shape[1:], layer.special) == ("tokens", each.info.shape[1:], each.info.special)
            and (not module or layer.name.startswith(f"{module}.") or f"{module}.".startswith(f"{layer.name}."))
        ]
        if own is None or (not own.out_of_order and any(layer.name not in survey.misplaced for layer in near)):
            found.append(each)
        else:
            reasons.append(
                f"{operations.said_of(module)} attends between the tokens of {each.info.name!r}, which {own.reason}"
            )
    return found, reasons


def memory_need(prepared: Seen, images: int, gradients: int, size: tuple[int, int]) -> int:
    """Estimate the bytes of a task: weights, a forward without gradients, and one of a few images with them."""
    forward = 4 * images * (3 * size[0] * size[1] + 4 * prepared.largest)
    graph = 8 * gradients * (3 * size[0] * size[1] + prepared.values)
    positions = math.prod(prepared.localised.shape[1:]) if prepared.localised is not None else 0
    pairs = 8 * images**2 * (4 * len(prepared.layers) + 2 * min(positions, MOST_POSITIONS))
    return 12 * prepared.parameters + max(forward, graph) + pairs


def arrays(work: Work, minibatches: int) -> dict[str, Array]:
    """The layout of what is kept of each minibatch; only measures that the network has."""
    found = {}

    def add(name: str, dims: str, shape: tuple[int, ...], dtype: Any = np.float64, fill: Any = np.nan) -> None:
        names = ("minibatch", *dims.split())
        found[name] = Array(names, (minibatches, *shape), dtype, (1, *shape), fill=fill)

    prepared, places = work.prepared, work.places
    layers, skips = len(prepared.layers), len(prepared.skips)
    add("image", "place", (places,), np.int64, -1)
    if work.wants("receptive_field"):
        add("receptive_field", "layer y x", (layers, *work.image))
        add("gradients", "", (), np.int64, 0)
        add("centre_changes", "layer", (layers,), np.int64, 0)
    if work.wants("attention"):
        heads = max(each.heads for each in prepared.attention)
        add("distance", "place attention head kind", (places, len(prepared.attention), heads, 2))
    if work.wants("skips"):
        add("ratio", "place skip part", (places, skips, 2))
        positions = max(each.info.special + math.prod(each.info.shape[1:]) for each in prepared.skips)
        add("ratio_sum", "skip position", (skips, positions))
        add("ratio_count", "skip position", (skips, positions), np.int64, 0)
        add("predicted", "place network", (places, 1 + skips), np.int64, -1)
        add("hsic_layer", "layer", (layers,))
        add("hsic_across", "skip layer", (skips, layers))
        add("hsic_without", "skip layer layer_b", (skips, layers, layers))
    if work.wants("localisation"):
        assert prepared.localised is not None
        cells = math.prod(prepared.localised.shape[1:])
        outputs = prepared.localised.special + cells
        add("hsic_position", "output input", (outputs, cells))
        add("hsic_output", "output", (outputs,))
        add("hsic_input", "input", (cells,))
    return found


def look(work: Work, pixels: StoreRef, part: str, batch: Minibatch) -> Done:
    """On a worker: measure one minibatch, and write one chunk of each array."""
    images = images_of(batch, pixels, work.model)
    with naming_slots(batch):
        found = measured(work, network_of(work.model), images)
    found["image"] = np.array(batch.images)
    blocks: dict[str, tuple[tuple[int, ...], np.ndarray]] = {}
    for name, array in arrays(work, 1).items():
        block = np.full(array.shape, array.fill, array.dtype)
        own = found[name]
        # A smaller last minibatch leaves places empty.
        block[0, ...][tuple(map(slice, own.shape))] = own
        blocks[name] = ((int(part), *(0,) * own.ndim), block)
    return Done(part, {MINIBATCHES: write(work.store, blocks)})


def measured(work: Work, network: nn.Module, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The measures of images (image, channel, y, x) as the network takes them, by the names of `arrays`."""
    found: dict[str, np.ndarray] = {}
    if set(work.measures) - set(work.prepared.absent) - {"receptive_field"}:
        whole = _Look(work, network)
        whole.run(images)
        found |= whole.found()
        if work.wants("localisation"):
            assert work.prepared.localised is not None
            inputs = position_vectors(patches(images, work.prepared.localised.shape[1:]))
            names = ("hsic_position", "hsic_output", "hsic_input")
            found |= dict(zip(names, position_hsic(whole.positions, inputs), strict=True))
        if work.wants("skips"):
            found |= without_skips(work, network, images, whole)
    if work.wants("receptive_field"):
        some = images[: work.gradients]
        found["gradients"] = np.array(len(some))
        unread = {each.layer.name for each in work.prepared.misplaced}
        found["receptive_field"], found["centre_changes"] = gradients(network, some, work.prepared.layers, unread)
    return found


class _Look(Operations):
    """One forward, and what is measured on its way: attention, skips, Gram matrices of layers, features of positions.

    With `without`, the skip of one addition is left out, and only Gram matrices are made; those of layers before it are
    those of `before`, the forward of the whole network.
    """

    def __init__(
        self, work: Work, network: nn.Module, without: Skip | None = None, before: _Look | None = None
    ) -> None:
        super().__init__(network)
        self.work, self.without, self.before = work, without, before
        self.infos = {layer.name: layer for layer in work.prepared.layers}
        self.skips = {skip.place: skip for skip in work.prepared.skips if work.wants("skips")}
        self.attention = {each.place: each for each in work.prepared.attention if work.wants("attention")}
        self.packed: dict[str, np.ndarray] = {}
        self.ratios: dict[str, torch.Tensor] = {}
        self.distance: dict[str, torch.Tensor] = {}
        self.positions = np.zeros((0, 0))
        self.logits: torch.Tensor | None = None
        self.images = 0

    def run(self, images: torch.Tensor) -> None:
        self.images = len(images)
        localised = self.work.prepared.localised if self.work.wants("localisation") and self.without is None else None
        names = list(self.infos) if self.skips else [localised.name] if localised is not None else []

        def take(name: str, output: torch.Tensor) -> None:
            with self.aside():
                if self.skips:
                    self.packed[name] = self.gram_of(name, output)
                if localised is not None and name == localised.name:
                    refuse_non_finite(output, name, 0, localised)
                    maps, special = to_maps(output, localised)
                    tokens = maps.flatten(2).permute(2, 0, 1)
                    if special is not None:
                        tokens = torch.cat([special.transpose(0, 1), tokens])
                    self.positions = position_vectors(list(tokens))

        with Recorder(self.network, names, take=take) as record, self:
            self.logits, _ = record(images)
        if (self.skips or self.attention) and tuple(self.trail) != self.work.prepared.trail:
            raise MicrotomeError(
                "the network adds or multiplies other things for these images than for those that it was inspected "
                "with, so its skips and attention cannot be told: leave `skips` and `attention` out of `sight.measures`"
            )

    def gram_of(self, name: str, output: torch.Tensor) -> np.ndarray:
        if self.without is not None and self.additions <= self.without.place:
            assert self.before is not None
            return self.before.packed[name]
        return packed_gram(output, output, self._said(name), self.infos[name])

    def on_addition(self, place: int, operands: tuple[Term, Term]) -> int | None:
        skip = self.skips.get(place)
        if self.without is not None:
            return (0 if self.without.first else 1) if place == self.without.place else None
        if skip is not None:
            z, branch = (each.make() for each in (operands if skip.first else operands[::-1]))
            ratio = norm_ratio(z, branch, 1 if skip.info.layout == "map" else -1)
            self.ratios[skip.name] = ratio.flatten(1).cpu()
        return None

    def on_product(self, product: Product) -> None:
        each = self.attention.get(product.place)
        if each is not None and self.without is None:
            weights = product.operand(each.operand)
            if each.operand >= 0 and not sums_to_one(weights, each.reading.keys):
                raise MicrotomeError(
                    f"the attention weights of {each.name!r} do not sum to 1 over what is attended to, as when "
                    f"the network was inspected: leave `attention` out of `sight.measures`"
                )
            weights = each.reading.weights(weights, self.images)
            grid = each.info.shape[1], each.info.shape[2]
            patch = self.work.image[0] / grid[0], self.work.image[1] / grid[1]
            weights = weights.roll((each.info.last, each.info.last), (-2, -1))  # special tokens first
            self.distance[each.name] = mean_distance(weights, distances(grid, patch), each.info.special).cpu()

    def predicted(self) -> np.ndarray | None:
        """The class of the highest logit of every image."""
        if self.logits is None or not self.work.prepared.logits:
            return None
        refuse_non_finite(self.logits, self._said("logits"), 0, self.logits)
        return self.logits.argmax(1).cpu().numpy()

    def _said(self, name: str) -> str:
        """A layer, and what the network ran without."""
        return name if self.without is None else f"{name} without {self.without.name}"

    def found(self) -> dict[str, np.ndarray]:
        """What was measured of attention and skips, by the names of `arrays`."""
        found = {}
        if self.attention:
            heads = max(each.heads for each in self.attention.values())
            count = len(next(iter(self.distance.values())))
            found["distance"] = np.full((count, len(self.attention), heads, 2), np.nan)
            for at, each in enumerate(self.attention.values()):
                found["distance"][:, at, : each.heads] = self.distance[each.name].numpy()
        if self.skips:
            positions = max(ratio.shape[1] for ratio in self.ratios.values())
            count = len(next(iter(self.ratios.values())))
            found["ratio"] = np.full((count, len(self.skips), 2), np.nan)
            found["ratio_sum"] = np.full((len(self.skips), positions), np.nan)
            found["ratio_count"] = np.zeros((len(self.skips), positions), np.int64)
            for at, skip in enumerate(self.skips.values()):
                ratio = self.ratios[skip.name].roll(skip.info.last, 1)  # special tokens first
                own = slice(ratio.shape[1])
                found["ratio_sum"][at, own] = ratio.nansum(0).numpy()
                found["ratio_count"][at, own] = (~ratio.isnan()).sum(0).numpy()
                parts = ratio[:, : skip.info.special], ratio[:, skip.info.special :]
                found["ratio"][:, at] = torch.stack([part.nanmean(1) for part in parts], 1).numpy()
        return found


def without_skips(work: Work, network: nn.Module, images: torch.Tensor, whole: _Look) -> dict[str, np.ndarray]:
    """The network again without each skip: what it predicts, and HSIC1 of its layers with those of the whole one."""
    layers, skips = work.prepared.layers, work.prepared.skips
    vectors = _vectors(whole)
    own = np.einsum("lp,lp->l", vectors, vectors)
    across = np.empty((len(skips), len(layers)))
    within = np.empty((len(skips), len(layers), len(layers)))
    predicted = np.full((len(images), 1 + len(skips)), -1)
    for at, skip in enumerate(skips):
        lacking = _Look(work, network, skip, whole)
        lacking.run(images)
        changed = _vectors(lacking)
        across[at] = np.einsum("lp,lp->l", vectors, changed)
        within[at] = changed @ changed.T
        if (classes := lacking.predicted()) is not None:
            predicted[:, 1 + at] = classes
    if (classes := whole.predicted()) is not None:
        predicted[:, 0] = classes
    return {"hsic_layer": own, "hsic_across": across, "hsic_without": within, "predicted": predicted}


def _vectors(look: _Look) -> np.ndarray:
    return centred(np.stack([look.packed[name] for name in look.infos]), "unbiased")


def gradients(
    network: nn.Module, images: torch.Tensor, layers: Sequence[LayerInfo], unread: Collection[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Return |d (sum over units of the centre position) / d input|, (layer, y, x) float64, and whether the sum changes.

    The first is the mean over channels, summed over images. A layer without positions, one whose positions are not
    known (`unread`), and one to which no gradient leads, have zeros. The second, (layer), is 1 where the sum is not the
    same for all images.
    """
    centres: dict[str, torch.Tensor] = {}
    infos = {layer.name: layer for layer in layers if layer.spatial and layer.name not in unread}

    def note(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: object) -> None:
            tensor = first_tensor(output)
            assert tensor is not None
            y, x = centre(infos[name].shape[1:])
            # Summed now: a later operation may overwrite the output.
            centres[name] = to_maps(tensor, infos[name])[0][:, :, y, x].sum(1)

        return hook

    hooks = [network.get_submodule(name).register_forward_hook(note(name)) for name in infos]
    found = np.zeros((len(layers), *images.shape[2:]))
    changes = np.zeros(len(layers), np.int64)
    try:
        with torch.enable_grad(), one_attention_path(), _without_weights(network):
            given = images.detach().clone().requires_grad_()
            # An operation in place cannot be the first to use a tensor that gradients are asked of.
            network(given.clone())
            for at, layer in enumerate(layers):
                if layer.name not in infos:
                    continue
                centre_sums = centres[layer.name]
                changes[at] = int(bool((centre_sums != centre_sums[0]).any()))
                if centre_sums.requires_grad:
                    (gradient,) = torch.autograd.grad(
                        centre_sums.sum(), given, retain_graph=True, allow_unused=True, materialize_grads=True
                    )
                    refuse_non_finite(gradient, f"{layer.name} (its gradient)", 0)
                    found[at] = gradient.abs().double().mean(1).sum(0).cpu().numpy()
    finally:
        for hook in hooks:
            hook.remove()
    return found, changes


@contextmanager
def _without_weights(network: nn.Module) -> Iterator[None]:
    """No gradients of the weights, which nobody asks for and which would take as long again."""
    asked = [each for each in network.parameters() if each.requires_grad]
    for each in asked:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in asked:
            each.requires_grad_(True)
