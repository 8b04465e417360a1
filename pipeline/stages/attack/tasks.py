"""What workers do for the stage `attack`: look at the network, attack images of some shards, and look at units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from kernels.attacks.rounding import noise
from pipeline.errors import MicrotomeError
from pipeline.networks.explainable import normalised_by
from pipeline.networks.fitness import Normalised
from pipeline.networks.forward import Model, network_of, normalise
from pipeline.networks.gradients import in_chunks, padded
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import head_of, one_attention_path
from pipeline.networks.prepare import prepare, survey_of
from pipeline.stages.attack.attacking import Attempt, Effort, Outcome, predictions
from pipeline.stages.attack.chosen import Shard, seed_of
from pipeline.stages.attack.observing import Shown, observe_rows
from pipeline.stages.attack.results import FAILED, SUCCEEDED, WRONG, Layout, UnitLayout
from pipeline.stages.attack.settings import Attack
from pipeline.storage.manifest import within
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done
from pipeline.workers.tasks import computing


@dataclass(frozen=True)
class Seen:
    """What a look at a network found.

    Attributes
    ----------
    classes : its logits. normalised : whether they are those of a softmax. layer : whose units are looked at.
    parameters : how many values they have. values : of all outputs of layers, for an image.
    """

    classes: int
    normalised: Normalised
    layer: LayerInfo | None
    parameters: int
    values: int


@dataclass(frozen=True)
class Work:
    """What all shards of a step have in common: attacks by name, each with its store and layout."""

    model: Model
    normalised: Normalised
    attacks: Mapping[str, Attack]
    stores: Mapping[str, Path]
    layouts: Mapping[str, Layout]
    effort: Effort
    start: str


@dataclass(frozen=True)
class Looking:
    """What all shards have in common when their units are looked at.

    Attributes
    ----------
    twin : the untrained network, where there is one. order : (class, rank) the units that matter most; -1: none.
    """

    model: Model
    twin: Model | None
    info: LayerInfo
    order: np.ndarray
    stores: Mapping[str, Path]
    layout: UnitLayout
    seed: int


@dataclass(frozen=True)
class Given:
    """What a task reads of one shard: its images, and where units are looked at, attacked ones by attack."""

    images: StoreRef
    shard: Shard
    attacked: Mapping[str, StoreRef]

    def pixels(self) -> torch.Tensor:
        """Return the chosen images, uint8 (image, channel, y, x)."""
        return torch.from_numpy(self.images.open()["image"][slice(*self.shard.bounds)][list(self.shard.places)])

    def of_attack(self, name: str, array: str) -> np.ndarray:
        """Return what is stored of the chosen images."""
        return np.asarray(self.attacked[name].open()[array][slice(*self.shard.bounds)])[list(self.shard.places)]


def look(model: Model, size: tuple[int, int], layer: str | None) -> Seen:
    """Look at a network with its own weights. Runs on a worker."""
    with computing:
        network = network_of(model)
        survey = survey_of(network, model, size)
        noise = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), one_attention_path():
            logits = head_of(network(normalise(noise, model.spec)))
        if logits is None or logits.ndim != 2:
            raise MicrotomeError(f"network {model.name!r} gives no logits (image, class), so it cannot be attacked")
        info = prepare(network, model, survey, [layer]).layers[0] if layer is not None else None
        return Seen(
            logits.shape[1],
            normalised_by(logits),
            info,
            sum(each.numel() for each in network.parameters()),
            sum(each.shape[0] * (each.special + each.shape[1] * each.shape[2]) for each in survey.layers),
        )


def attack(work: Work, given: Sequence[Given], names: Sequence[str]) -> list[Done]:
    """Attack the chosen images of some shards that the network recognises, and write the shards. Runs on a worker."""
    pixels = torch.cat([each.pixels() for each in given])
    rows = [(shard.shard, at) for shard in given for at in range(len(shard.shard.places))]
    labels = torch.tensor([shard.labels[at] for shard, at in rows])
    with computing:
        network = network_of(work.model)
        before = predictions(network, work.model.spec, pixels)
        sources = torch.tensor([-1 if shard.pair.source is None else shard.pair.source for shard, _ in rows])
        targets = torch.tensor([-1 if shard.pair.target is None else shard.pair.target for shard, _ in rows])
        sources = torch.where(sources >= 0, sources, before if work.start == "predicted" else labels)
        right = before == sources
        seeds = [seed_of(shard.image_ids[at]) for shard, at in rows]
        found = {name: _blank(work.layouts[name], len(rows)) for name in names}
        for arrays in found.values():
            arrays["state"][:] = np.where(right.numpy(), FAILED, WRONG)
            arrays["predicted_before"][:] = before.numpy()
        size = work.model.spec.numerics.micro_batch
        for several in (right & (targets >= 0), right & (targets < 0)):
            own = several.nonzero()[:, 0]
            targeted = bool(len(own)) and bool(targets[own[0]] >= 0)
            for start, stop in in_chunks(len(own), size):
                some = padded(own[start:stop], size)
                attempt = Attempt(
                    network,
                    work.model.spec,
                    work.normalised,
                    pixels[some],
                    sources[some],
                    targets[some] if targeted else None,
                    [seeds[row] for row in some.tolist()],
                )
                noisy = [[work.effort.seed, seeds[row]] for row in some.tolist()]
                for name, arrays in found.items():
                    outcome = attempt.run(work.attacks[name], work.effort)
                    _keep(arrays, own[start:stop].numpy(), outcome)
                    drawn = noise(attempt.pixels, outcome.image, noisy)
                    arrays["predicted_noise"][own[start:stop].numpy()] = predictions(network, work.model.spec, drawn)[
                        : stop - start
                    ]
    done, at = [], 0
    for each in given:
        shard = slice(at, at := at + len(each.shard.places))
        files = {}
        for name, arrays in found.items():
            files[name] = _written(work.layouts[name], work.stores[name], each.shard, arrays, shard)
        done.append(Done(each.shard.key, files))
    return done


def _keep(arrays: Mapping[str, np.ndarray], rows: np.ndarray, outcome: Outcome) -> None:
    """Keep what an attack gave for some rows; the batch behind them is padding."""
    count = len(rows)

    def own(values: torch.Tensor) -> np.ndarray:
        return values[:count].cpu().numpy()

    good = own(outcome.succeeded)
    arrays["image"][rows], arrays["predicted"][rows] = own(outcome.image), own(outcome.predicted)
    arrays["state"][rows] = np.where(good, SUCCEEDED, FAILED)
    for name in ("linf", "l2", "excess", "margin"):
        arrays[name][rows] = own(getattr(outcome, name))
    arrays["first_step"][rows], arrays["start_succeeded"][rows] = own(outcome.first), own(outcome.starts)


def observe(looking: Looking, given: Sequence[Given], names: Sequence[str]) -> list[Done]:
    """Look at the units of a layer before and after attacks, and write the shards. Runs on a worker."""
    done = []
    with computing:
        network = network_of(looking.model)
        twin = network_of(looking.twin) if looking.twin is not None else None
        states = [each.of_attack(names[0], "state") for each in given]
        attacked = [np.flatnonzero(state >= FAILED) for state in states]
        pixels = torch.cat([each.pixels()[own] for each, own in zip(given, attacked, strict=True)])
        before = [each.of_attack(names[0], "predicted_before")[own] for each, own in zip(given, attacked, strict=True)]
        seeds = [
            [looking.seed, seed_of(each.shard.image_ids[at])]
            for each, own in zip(given, attacked, strict=True)
            for at in own
        ]
        targets = [each.shard.pair.target for each, own in zip(given, attacked, strict=True) for _ in own]
        sources = np.concatenate(before)
        images, predicted = {}, {}
        for name in names:
            pairs = list(zip(given, attacked, strict=True))
            images[name] = torch.from_numpy(np.concatenate([each.of_attack(name, "image")[own] for each, own in pairs]))
            ends = np.concatenate([each.of_attack(name, "predicted")[own] for each, own in pairs])
            predicted[name] = np.array(
                [end if target is None else target for end, target in zip(ends, targets, strict=True)], np.int64
            )
        found = _observed(looking, network, twin, Shown(pixels, images, sources, predicted, seeds))
    at = 0
    for each, own in zip(given, attacked, strict=True):
        rows = slice(at, at := at + len(own))
        places = tuple(each.shard.places[place] for place in own)
        files = {}
        for name in names:
            arrays = {key: values[rows] for key, values in found[name].items()}
            files[name] = _stored(looking.layout, looking.stores[name], each.shard, arrays, places)
        done.append(Done(each.shard.key, files))
    return done


def _observed(
    looking: Looking, network: nn.Module, twin: nn.Module | None, shown: Shown
) -> dict[str, dict[str, np.ndarray]]:
    blank = {name: _blank(looking.layout, len(shown.pixels)) for name in shown.attacked}
    size = looking.model.spec.numerics.micro_batch
    twin_spec = looking.twin.spec if looking.twin is not None else None
    for start, stop in in_chunks(len(shown.pixels), size):
        some = padded(torch.arange(start, stop), size)
        seen = observe_rows(network, looking.model.spec, twin, twin_spec, looking.info, looking.order, shown.at(some))
        for name, arrays in seen.items():
            for key, values in arrays.items():
                blank[name][key][start:stop] = values[: stop - start]
    return blank


def _blank(layout: Layout | UnitLayout, rows: int) -> dict[str, np.ndarray]:
    """Return the arrays of a store for so many images, without values."""
    return {name: np.full((rows, *each.shape[1:]), each.fill, each.dtype) for name, each in layout.arrays().items()}


def _written(
    layout: Layout, store: Path, shard: Shard, found: Mapping[str, np.ndarray], own: slice
) -> dict[str, tuple[int, int]]:
    return _stored(layout, store, shard, {name: values[own] for name, values in found.items()}, shard.places)


def _stored(
    layout: Layout | UnitLayout,
    store: Path,
    shard: Shard,
    found: Mapping[str, np.ndarray],
    places: Sequence[int],
) -> dict[str, tuple[int, int]]:
    """Write a shard of a store: values at some places of it. The others have nothing to store."""
    start, stop = shard.bounds
    whole = _blank(layout, stop - start)
    for name, values in found.items():
        whole[name][list(places)] = values
    group = shard.pair.name
    blocks = {name: ((start, *[0] * (values.ndim - 1)), values) for name, values in whole.items()}
    return within(group, write(store / group, blocks))
