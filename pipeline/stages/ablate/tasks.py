"""What workers do for the stage `ablate`: predict one shard without some units of a layer, and write it down.

The activations of a shard that `extract` stored are read. Those of another (training images, mostly) are computed as
`extract` would, in the same micro-batches and rounded to the same float16, and not stored: a forward pass costs less
than the ablation it serves, and less than reading it back. So the numbers do not depend on what is stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.networks.forward import (
    HALF_MAX,
    Model,
    NonFiniteError,
    forward_in_batches,
    network_of,
    normalise,
    refuse_non_finite,
    scale_for,
)
from pipeline.networks.layer import LayerInfo
from pipeline.networks.prepare import prepare, survey_of
from pipeline.storage.store import StoreRef, write
from pipeline.workers.devices import device
from pipeline.workers.resumable import Done

if TYPE_CHECKING:
    import torch

    from pipeline.networks.graph.tail import State, Tail

TASK_FLOPS = 4e11  # of one task, about: some seconds on a core. A block of units (or of sets) of one shard
TASK_UNITS = 16  # the fewest units of a block: a shard that is not stored is computed again for each block
BATCH_BYTES = 256 << 20  # of the pairs that run at once, and of the images whose units are held apart at once
BATCH_PAIRS = 8192
UNITS, SETS = "units", "sets"  # the stores of predictions, as tasks name them


@dataclass(frozen=True)
class Shard:
    """The images of one shard that count, as tasks name them.

    Attributes
    ----------
    start, stop : its first image, and one past its last.
    rows : places in the shard, all splits together, in order.
    label : of each row.
    partner : for each row, which row gives the values of the replacement `shuffled`.
    images : where its pixels are.
    activations, logits : where those of the network are; None where the layer's are not stored.
    """

    number: int
    start: int
    stop: int
    rows: np.ndarray
    label: np.ndarray
    partner: np.ndarray
    images: StoreRef
    activations: StoreRef | None = None
    logits: StoreRef | None = None


@dataclass(frozen=True)
class Cut:
    """A network that is cut after a layer: what is known of the part behind it, its tail, before any image.

    Attributes
    ----------
    classes : number of logits.
    block, pairs, images : units of a task, pairs of a unit and an image that run at once, images begun at once.
    whole : whether all of the network runs for each pair, since it could not be cut.
    memory : bytes that a task needs, about.
    """

    info: LayerInfo
    classes: int
    block: int
    pairs: int
    images: int
    whole: bool
    pair_flops: float
    memory: int


@dataclass(frozen=True)
class Target(Cut):
    """A layer whose units are removed, as tasks name it.

    Attributes
    ----------
    id, scale : of its activations.
    folder : of the network on this data set.
    replace, mean : what a removed unit gives; the mean (unit) and that in each special token (token, unit).
    """

    id: str
    scale: float
    folder: Path
    replace: str
    mean: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def units(self) -> int:
        return self.info.shape[0]

    @property
    def predictions(self) -> Path:
        return self.folder / "ablation-predictions" / f"{self.id}.zarr"

    @property
    def set_predictions(self) -> Path:
        return self.folder / "ablation-predictions" / f"{self.id}-sets.zarr"

    @property
    def dtype(self) -> Any:
        """The type of the number of a class; -1: the image does not count."""
        return np.int16 if self.classes < 1 << 15 else np.int32


def prepare_cuts(model: Model, size: tuple[int, int], names: list[str], shard_images: int) -> list[Cut]:
    """Cut the network after each layer, and divide its work: by its cost alone, so always alike."""
    network = network_of(model)
    found = []
    for info in prepare(network, model, survey_of(network, model, size), names).layers:
        tail = tail_of(model, info, size)
        cost = tail.cost()
        flops = max(1.0, cost.pair_flops)
        block = min(info.shape[0], max(TASK_UNITS, math.ceil(TASK_FLOPS / (flops * shard_images))))
        pairs = max(1, min(BATCH_PAIRS, BATCH_BYTES // max(1, cost.pair_bytes)))
        images = max(1, min(shard_images, BATCH_BYTES // max(1, cost.image_bytes)))
        held = 4 * sum(value.numel() for value in (*network.parameters(), *network.buffers()))
        # Tensors of a shard as stored and replaced, whatever is begun at once.
        whole_shard = 4 * shard_images * math.prod(info.shape)
        memory = held + cost.pair_bytes * pairs + cost.image_bytes * images + whole_shard
        found.append(
            Cut(info, tail.traced.shapes[tail.traced.output][1], block, pairs, images, tail.whole, flops, memory)
        )
    return found


@functools.lru_cache(maxsize=4)
def tail_of(model: Model, info: LayerInfo, size: tuple[int, int]) -> Tail:
    """Return a worker's copy of the tail after a layer, found and checked once, on fixed noise."""
    from pipeline.networks.graph.tail import cut

    return cut(network_of(model), info, noise(model, size))


def noise(model: Model, size: tuple[int, int]) -> torch.Tensor:
    """Return three images as the network takes them, always the same."""
    import torch

    pixels = torch.randint(0, 256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return normalise(pixels, model.spec)


def sum_shard(
    model: Model, target: Target, shard: Shard, rows: np.ndarray
) -> tuple[int, list[float], list[list[float]]]:
    """Sum over some rows of a shard, for the replacement `mean`.

    Returns the shard's number, the sum of each unit's mean over the positions, and those of each special token's units.
    """
    import torch

    maps, special, _, _ = activations(model, target, shard)
    chosen = torch.from_numpy(rows)
    total = maps[chosen].double().mean((2, 3)).sum(0).tolist()
    return shard.number, total, special[chosen].double().sum(0).tolist() if special is not None else []


def without_units(model: Model, target: Target, shard: Shard, first: int) -> Done:
    """Predict the images of one shard without each unit of the block that begins with unit `first`."""
    import torch

    last = min(first + target.block, target.units)
    shape = len(shard.rows), last - first
    prediction, above = np.empty(shape, np.int64), np.empty(shape, np.int64)
    whole = np.empty(shape[0], np.int64), np.empty(shape[0], np.int64)
    facts: dict[str, Any] = {"pairs": 0}
    for rows, tail, state, logits, true_logits in begun(model, target, shard):
        label = torch.from_numpy(shard.label[rows]).to(logits.device)
        own = judged(logits, label)
        for each, into, alone in zip(own, (prediction, above), whole, strict=True):
            into[rows], alone[rows] = each[:, None].cpu().numpy(), each.cpu().numpy()
        for unit, image, changed in tail.without_units(state, range(first, last), target.pairs):
            at = image.cpu().numpy() + rows.start, unit.cpu().numpy() - first
            of = [f"logits without unit {each} of {target.info.name}" for each in unit.tolist()]
            require_finite(changed, shard.start + shard.rows[at[0]], of)
            prediction[at], above[at] = (each.cpu().numpy() for each in judged(changed, label[image]))
            facts["pairs"] += len(unit)
        if first == 0:
            compare(facts, logits.cpu().numpy(), true_logits)
    values: dict[str, tuple[tuple[int, ...], np.ndarray]] = {
        "prediction": ((shard.start, first), full(target, shard, prediction)),
        "above": ((shard.start, first), full(target, shard, above)),
    }
    if first == 0:
        values["prediction_whole"] = ((shard.start,), full(target, shard, whole[0]))
        values["above_whole"] = ((shard.start,), full(target, shard, whole[1]))
    return Done(f"{shard.number}.{first}", {UNITS: write(target.predictions, values)}, facts)


def without_sets(model: Model, target: Target, shard: Shard, first: int, packed: np.ndarray) -> Done:
    """Predict the images of one shard without each of some sets of units: (set, unit) packed to bits, from set `first`
    on."""
    import torch

    sets = torch.from_numpy(np.unpackbits(packed, axis=1, count=target.units).astype(bool))
    prediction = np.empty((len(shard.rows), len(sets)), np.int64)
    facts = {"pairs": 0}
    for rows, tail, state, logits, _ in begun(model, target, shard):
        prediction[rows] = logits.argmax(1)[:, None].cpu().numpy()
        for chosen, image, changed in tail.without_sets(state, sets.to(logits.device), target.pairs):
            at = image.cpu().numpy() + rows.start, chosen.cpu().numpy()
            of = [f"logits without {each} units of {target.info.name}" for each in sets.sum(1)[chosen.cpu()].tolist()]
            require_finite(changed, shard.start + shard.rows[at[0]], of)
            prediction[at] = changed.argmax(1).cpu().numpy()
            facts["pairs"] += len(chosen)
    values = {"prediction": ((shard.start, first), full(target, shard, prediction))}
    return Done(f"{shard.number}.{first}", {SETS: write(target.set_predictions, values)}, facts)


def require_finite(logits: torch.Tensor, slots: np.ndarray, of: Sequence[str]) -> None:
    """Refuse logits (row, class) that are not finite, of which an argmax would be some class nevertheless.

    Rows are images at `slots`; `of` says what the logits are, by row.
    """
    good = logits.isfinite()
    if not bool(good.all()):
        row = int((~good.all(1)).nonzero()[0])
        raise NonFiniteError(of[row], int(slots[row]), int((~good[row]).nonzero()[0]))


def begun(model: Model, target: Target, shard: Shard) -> Iterator[tuple[slice, Tail, State, torch.Tensor, np.ndarray]]:
    """Begin the rows of a shard, some at a time: which, the tail, its state, its logits, the network's own logits."""
    import torch

    maps, special, pixels, logits = activations(model, target, shard)
    tail = tail_of(model, target.info, (pixels.shape[2], pixels.shape[3]))
    partner = torch.from_numpy(shard.partner)
    for start in range(0, len(shard.rows), target.images):
        rows = slice(start, min(start + target.images, len(shard.rows)))
        output = as_output(maps[rows], None if special is None else special[rows], target.info, model)
        match target.replace:
            case "zero":
                other = torch.zeros_like(output)
            case "shuffled":
                chosen = partner[rows]
                other = as_output(maps[chosen], None if special is None else special[chosen], target.info, model)
            case "mean":
                other = mean_output(target, len(output), model)
            case _:
                raise ValueError(f"replacement {target.replace!r}")
        sides = tail.beside(normalise(pixels[rows], model.spec)) if tail.traced.sides else {}
        state = tail.begin(output, other, sides)
        found = tail.logits(state, target.pairs)
        computed = [f"logits computed from {target.info.name}"] * len(found)
        require_finite(found, shard.start + shard.rows[rows], computed)
        yield rows, tail, state, found, logits[rows]


def activations(
    model: Model, target: Target, shard: Shard
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, np.ndarray]:
    """Return maps (row, unit, y, x) and special tokens, float32 with the rounding of the store; pixels; logits."""
    import torch

    from pipeline.networks.layers import to_maps

    pixels = torch.from_numpy(shard.images.open()["image"][shard.start : shard.stop])
    rows = torch.from_numpy(shard.rows)
    if shard.activations is not None and shard.logits is not None:
        stored = shard.activations.open()
        maps = torch.from_numpy(np.asarray(stored["activation"][shard.start : shard.stop]))[rows]
        special = None
        if target.info.special:
            special = torch.from_numpy(np.asarray(stored["special"][shard.start : shard.stop]))[rows]
        logits = shard.logits.open()["logits"][shard.start : shard.stop]
        scale = target.scale
    else:
        name = target.info.name
        outputs: list[torch.Tensor] = []
        head = forward_in_batches(
            model, pixels, [name], lambda _, at, output: outputs.append(output.to(torch.float32, copy=True))
        )
        assert head is not None
        output, logits = torch.cat(outputs), head.numpy()
        refuse_non_finite(output, name, shard.start, target.info)
        largest = float(output.abs().amax())
        scale = target.scale if largest <= HALF_MAX * target.scale else scale_for(largest)
        maps, special = to_maps(output, target.info)
        maps = (maps[rows] / scale).half()
        special = (special[rows] / scale).half() if special is not None else None
    return (
        maps.float() * scale,
        special.float() * scale if special is not None else None,
        pixels[rows],
        np.asarray(logits)[shard.rows],
    )


def as_output(maps: torch.Tensor, special: torch.Tensor | None, info: LayerInfo, model: Model) -> torch.Tensor:
    """Return maps (row, unit, y, x) and special tokens as the layer gives them: the reverse of `layers.to_maps`."""
    import torch

    maps = maps.to(device())
    match info.layout:
        case "vector":
            return maps.flatten(1)
        case "channels_last":
            return maps.permute(0, 2, 3, 1).contiguous()
        case "tokens":
            tokens = maps.flatten(2).transpose(1, 2)
            return tokens.contiguous() if special is None else torch.cat([special.to(tokens.device), tokens], 1)
    return maps.contiguous(memory_format=torch.channels_last) if model.spec.numerics.channels_last else maps


def mean_output(target: Target, count: int, model: Model) -> torch.Tensor:
    """Return the output of a layer whose units are all at their mean, for `count` images."""
    import torch

    assert target.mean is not None
    mean, special = (torch.from_numpy(each.astype(np.float32)) for each in target.mean)
    units, height, width = target.info.shape
    maps = mean.view(1, units, 1, 1).expand(count, units, height, width)
    tokens = special.expand(count, *special.shape) if target.info.special else None
    return as_output(maps, tokens, target.info, model)


def judged(logits: torch.Tensor, label: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the class with the highest logit, and how many have a higher one than the label has."""
    return logits.argmax(1), (logits > logits.gather(1, label[:, None])).sum(1)


def compare(facts: dict[str, Any], logits: np.ndarray, true: np.ndarray) -> None:
    """Note how far the tail's logits are from the network's own: the rounding of the store, carried on."""
    facts["difference"] = max(facts.get("difference", 0.0), float(np.abs(logits - true).max(initial=0)))
    facts["largest"] = max(facts.get("largest", 0.0), float(np.abs(true).max(initial=0)))
    facts["changed"] = facts.get("changed", 0) + int((logits.argmax(1) != true.argmax(1)).sum())


def full(target: Target, shard: Shard, values: np.ndarray) -> np.ndarray:
    """Return the values of the rows as those of a whole shard, with -1 where an image does not count."""
    whole = np.full((shard.stop - shard.start, *values.shape[1:]), -1, target.dtype)
    whole[shard.rows] = values
    return whole
