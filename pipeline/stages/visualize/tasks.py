"""What workers do for the stage `visualize`: look at the network, sum up spectra, and draw one part of one group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kernels.images.grey import grey
from kernels.visualization.priors import Spectrum
from pipeline.data.images import pixels as pixels_of
from pipeline.errors import MicrotomeError
from pipeline.networks import experts, generators
from pipeline.networks.experts import Likelihood
from pipeline.networks.explainable import normalised_by
from pipeline.networks.fitness import Normalised
from pipeline.networks.forward import Model, network_of, normalise
from pipeline.networks.generators import Maker
from pipeline.networks.gradients import Logit, Target, gradients
from pipeline.networks.graph.reach import Reach, first_convolutions, reach_of
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import head_of, one_attention_path
from pipeline.networks.prepare import prepare, survey_of
from pipeline.stages.visualize.climbing import Climb
from pipeline.stages.visualize.projecting import Ruled, project
from pipeline.stages.visualize.results import PictureLayout, ProjectionLayout
from pipeline.stages.visualize.settings import Maximise, Rule
from pipeline.stages.visualize.subject import Strongest
from pipeline.storage.manifest import within
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done
from pipeline.workers.tasks import computing


@dataclass(frozen=True)
class Seen:
    """What a look at a network found.

    Attributes
    ----------
    layers : by name. reach : what a position of each depends on.
    normalised : whether its outputs are those of a softmax.
    parameters : how many values they have. values : of all outputs of layers, for an image.
    filters : by module that reads the image itself, its weights (filter, channel, y, x) and stride.
    refused : by method of projection or name of a generator or expert, why the network does not allow it.
    """

    layers: dict[str, LayerInfo]
    reach: dict[str, Reach]
    normalised: Normalised
    parameters: int
    values: int
    filters: dict[str, tuple[np.ndarray, tuple[int, int]]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A group of pictures: units of a layer, or classes.

    Attributes
    ----------
    store : the group's own folder; `within` is its name in the store.
    numbers : of units or classes. scales : what the score of each is divided by.
    info : the layer; None for classes, of which `score` is maximised.
    """

    store: Path
    within: str
    numbers: tuple[int, ...]
    scales: tuple[float, ...]
    layout: PictureLayout
    info: LayerInfo | None = None
    score: str = ""


@dataclass(frozen=True)
class Strip:
    """A group of projections: units of a layer and the images of each, -1 where there are fewer.

    `images` is (unit, place), slots; `methods` what ReLUs send back.
    """

    store: Path
    within: str
    numbers: tuple[int, ...]
    images: np.ndarray
    methods: tuple[Rule, ...]
    info: LayerInfo
    reach: Reach
    layout: ProjectionLayout


def look(
    model: Model,
    size: tuple[int, int],
    layers: Sequence[str],
    methods: Sequence[Rule],
    filters: bool,
    makers: Sequence[Maker],
    judges: Sequence[Likelihood],
) -> Seen:
    """Look at a network with its own weights. Runs on a worker."""
    with computing:
        network = network_of(model)
        survey = survey_of(network, model, size)
        prepared = prepare(network, model, survey, list(layers)) if layers else None
        noise = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        inputs = normalise(noise, model.spec)
        with torch.no_grad(), one_attention_path():
            logits = head_of(network(inputs.clone()))
        has_logits = logits is not None and logits.ndim == 2 and survey.classes
        refused: dict[str, str] = {}
        for rule in methods:
            if rule == "gradient" or not has_logits:
                continue
            try:
                gradients(network, inputs, Logit(torch.zeros(2, dtype=torch.int64)), sites=Ruled(network, rule))
            except MicrotomeError as error:
                refused[rule] = str(error)
        for maker in makers:
            if why := generators.why_not(maker, size, model.spec.preprocessing.channels):
                refused[maker.name] = why
        for judge in judges:
            if why := experts.why_not(judge, size, model.spec.preprocessing.channels):
                refused[judge.name] = why
        modules = first_convolutions(network, inputs) if filters else []
        found: dict[str, Any] = {name: network.get_submodule(name) for name in modules}
        return Seen(
            {info.name: info for info in prepared.layers} if prepared is not None else {},
            reach_of(network, inputs, list(layers)),
            normalised_by(logits) if has_logits and logits is not None else "",
            sum(each.numel() for each in network.parameters()),
            sum(each.shape[0] * (each.special + each.shape[1] * each.shape[2]) for each in survey.layers),
            {name: (each.weight.detach().cpu().numpy(), each.stride) for name, each in found.items()},
            refused,
        )


def sum_spectra(images: StoreRef, bounds: tuple[int, int], places: Sequence[int], channels: int) -> Spectrum:
    """Sum up images of one shard as pixels from 0 to 1. Runs on a worker."""
    start, stop = bounds
    found = torch.from_numpy(images.open()["image"][start:stop][list(places)])
    return Spectrum.of((grey(found) if channels == 1 else found).numpy() / 255.0)


def draw(
    model: Model,
    group: Group,
    way: str,
    part: str,
    options: Maximise,
    normalised: Normalised,
    spectrum: Spectrum | None,
    maker: Maker | None,
    judges: Sequence[Likelihood],
    key: str,
) -> Done:
    """Make the pictures of one part of a group, and write them. Runs on a worker."""
    first = int(part) * group.layout.each
    rows = slice(first, min(first + group.layout.each, group.layout.rows))
    numbers, restarts = group.numbers[rows], group.layout.restarts
    each = [number for number in numbers for _ in range(restarts)]
    scale = torch.tensor([scale for scale in group.scales[rows] for _ in range(restarts)])
    seeds = [(options.seed, number, restart) for number in numbers for restart in range(restarts)]
    with computing:
        climb = Climb(
            network_of(model),
            model.spec,
            target_of(group, each, normalised),
            scale,
            seeds,
            group.layout.size,
            options,
            spectrum,
            maker,
            judges,
        )
        made = climb.run(way)
    if not (finite := made.finite & np.isfinite(made.reached)).all():
        what = f"class {each[finite.argmin()]}" if group.info is None else f"unit {each[finite.argmin()]}"
        raise MicrotomeError(
            f"network {model.name!r}, {group.within}: the score of {what} or its gradient is not finite (NaN, infinity "
            f"or beyond what can be squared) on the way to a picture that maximises it, by {way}"
        )
    shape = len(numbers), restarts
    reached = made.reached.reshape(shape)
    best = reached.argmax(1)
    chosen = np.arange(len(numbers)) * restarts + best
    arrays = {
        "picture": made.rounded[chosen],
        "reached": reached,
        "started": made.started.reshape(shape),
        "best": best.astype(np.int64),
        "found": made.found.reshape(shape),
        "trajectory": made.trajectory.reshape(*shape, *made.trajectory.shape[1:]),
    }
    if group.layout.latent:
        arrays["latent"] = made.latent[chosen]
    if group.layout.keeps:
        arrays["input"] = made.pixels[chosen]
    files = write(group.store, {name: ((first, *[0] * (values.ndim - 1)), values) for name, values in arrays.items()})
    return Done(key, {group.store.parent.stem: within(group.within, files)})


def target_of(group: Group, numbers: Sequence[int], normalised: Normalised) -> Target:
    """Return what rows maximise: a unit at its strongest, or what of a class."""
    index = torch.tensor(numbers)
    if group.info is not None:
        return Strongest(group.info, index)
    link: Any = group.score
    return Logit(index, None, link, normalised == "softmax")


def draw_strip(model: Model, strip: Strip, part: str, images: StoreRef, key: str) -> Done:
    """Project the images of one part of a layer's units, and write the projections. Runs on a worker."""
    layout = strip.layout
    first = int(part) * layout.each
    units = strip.numbers[first : first + layout.each]
    slots = strip.images[first : first + layout.each]
    there = slots >= 0
    numbers = np.repeat(np.array(units, np.int64)[:, None], layout.images, 1)[there]
    size = layout.size[1:]
    arrays = {
        name: np.full((len(units), *array.shape[1:]), array.fill, array.dtype)
        for name, array in layout.arrays().items()
    }
    if there.any():
        shown = torch.from_numpy(pixels_of(images.open(), slots[there]))
        with computing:
            network, spec = network_of(model), model.spec
            found = project(
                network,
                normalise(shown, spec),
                strip.info,
                torch.from_numpy(numbers),
                strip.reach,
                strip.methods,
                (size[0], size[1]),
                spec.numerics.micro_batch,
            )
        flat = np.abs(found.maps).reshape(*found.maps.shape[:2], -1)
        scale = flat.max(2)
        if not np.isfinite(scale).all():
            row = int(np.argwhere(~np.isfinite(scale))[0, 0])
            raise MicrotomeError(
                f"network {model.name!r}, layer {strip.info.name!r}: a projection of unit {numbers[row]} is not finite "
                f"(NaN or infinity)"
            )
        parts = np.where(scale > 0, scale, 1)[:, :, None, None, None]
        arrays["projection"][there] = np.rint(128 + 127 * found.maps / parts).astype(np.uint8)
        arrays["scale"][there] = scale
        arrays["image"][there] = slots[there]
        arrays["value"][there] = found.value
        arrays["position"][there] = found.position
        arrays["field"][there] = found.field
    files = write(strip.store, {name: ((first, *[0] * (values.ndim - 1)), values) for name, values in arrays.items()})
    return Done(key, {strip.store.parent.stem: within(strip.within, files)})
