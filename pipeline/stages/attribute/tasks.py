"""What workers do for the stage `attribute`: explain the images of one shard by every method that lacks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.explainable import examine
from pipeline.networks.fitness import Explainable
from pipeline.networks.forward import Model, network_of, normalise
from pipeline.networks.gradients import Logit, padded, scores
from pipeline.networks.prepare import survey_of
from pipeline.stages.attribute.explaining import background_of, baseline_pixels, bounds_of, seed_of, target_of
from pipeline.stages.attribute.inputs import Shard
from pipeline.stages.attribute.methods.registry import FUNCTIONS
from pipeline.stages.attribute.options import METHODS, Labels, Segmented
from pipeline.stages.attribute.results import group_of, method_of, unit_relevance
from pipeline.stages.attribute.segments import name_of, part
from pipeline.stages.attribute.subject import Subject
from pipeline.stages.attribute.work import Work
from pipeline.storage.manifest import Files, within
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done
from pipeline.workers.tasks import computing

ACCOUNTS = ("bias", "leak", "magnitude", "phi0")
"""Facts that a law is about: they are numbers, or something went wrong."""


@dataclass(frozen=True)
class Given:
    """What a task reads of one shard: its images, and their label maps where segments are made of them."""

    images: StoreRef
    labels: StoreRef | None
    shard: Shard

    def pixels(self) -> np.ndarray:
        """Return the explained images, uint8 (image, channel, y, x)."""
        start, stop = self.shard.bounds
        return self.images.open()["image"][start:stop][list(self.shard.places)]

    def label_maps(self, category: int) -> np.ndarray:
        """Return the label maps of the explained images, (image, y, x), by the category's place on the store's axis."""
        assert self.labels is not None
        places = self.shard.places
        first, last = self.shard.bounds[0] + places[0], self.shard.bounds[0] + places[-1] + 1
        return self.labels.open()["label_map"][first:last, category][np.array(places) - places[0]]


def examine_network(
    model: Model, size: tuple[int, int], layers: Sequence[str], units: Sequence[str] = ()
) -> tuple[int, Explainable]:
    """Look at a network with its own weights, on a worker; return its number of parameters, too."""
    with computing:
        network = network_of(model)
        survey = survey_of(network, model, size)
        noise = torch.randint(256, (2, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        found = examine(network, survey, normalise(noise, model.spec), layers, lambda: build(model.spec), units)
        return sum(each.numel() for each in network.parameters()), found


def explain(work: Work, given: Sequence[Given], names: Sequence[str]) -> list[Done]:
    """Explain the images of some shards, and write the shards of each of these stores. Runs on a worker.

    A store is that of a method's maps, by its name, that of the relevance of units, by `unit_relevance`, or one
    of segments.
    """
    pixels = torch.cat([torch.from_numpy(each.pixels()) for each in given])
    ids = [id for each in given for id in each.shard.image_ids]
    classes = torch.tensor([label for each in given for label in each.shard.labels])
    maps = _label_maps(work, given)
    found = {name: _blank(work, name, len(pixels)) for name in names}
    size = work.model.spec.numerics.micro_batch
    for at in range(0, len(pixels), size):
        some = slice(at, min(at + size, len(pixels)))
        segments = _segments(work, pixels[some], maps, some, found)
        methods = {name: arrays for name, arrays in found.items() if name not in work.parted}
        if methods:
            _explain_batch(work, pixels[some], ids[some], classes[some], some, methods, segments)
    done, at = [], 0
    for each in given:
        own = slice(at, at := at + len(each.shard.places))
        done.append(Done(each.shard.part, _written(work, each.shard, found, own)))
    return done


def _written(work: Work, shard: Shard, found: Mapping[str, dict[str, np.ndarray]], own: slice) -> dict[str, Files]:
    """Write a shard of each store, of which `own` are the explained images. The others have nothing to store."""
    start, stop = shard.bounds
    files: dict[str, Files] = {}
    for name, arrays in found.items():
        whole = _blank(work, name, stop - start)  # the last shard may be shorter than a chunk
        for array, values in arrays.items():
            whole[array][list(shard.places)] = values[own]
        blocks = {array: ((start, *[0] * (values.ndim - 1)), values) for array, values in whole.items()}
        if name in work.layouts or name in work.parted:
            files[name] = write(work.stores[name], blocks)
            continue
        files[name] = {}
        for layer, block in blocks.items():
            group = group_of(layer)
            files[name] |= within(group, write(work.stores[name] / group, {"relevance": block}))
    return files


def sum_inputs(model: Model, images: StoreRef, bounds: tuple[int, int], places: Sequence[int]) -> np.ndarray:
    """Add up images of one shard as the network takes them, float64 (1, channel, y, x). Runs on a worker."""
    start, stop = bounds
    pixels = torch.from_numpy(images.open()["image"][start:stop][list(places)])
    with computing:
        parts = [normalise(each, model.spec).double().sum(0, keepdim=True).cpu() for each in pixels.split(64)]
        return torch.stack(parts).sum(0).numpy()


def _label_maps(work: Work, given: Sequence[Given]) -> dict[str, np.ndarray]:
    """Return the label maps (image, y, x) of each category that segments are made of."""
    found = {}
    for category, place in work.categories.items():
        if category in {each.category for each in work.parted.values() if isinstance(each, Labels)}:
            found[category] = np.concatenate([each.label_maps(place) for each in given])
    return found


def _segments(
    work: Work,
    pixels: torch.Tensor,
    maps: Mapping[str, np.ndarray],
    some: slice,
    found: Mapping[str, dict[str, np.ndarray]],
) -> dict[str, torch.Tensor]:
    """Return the segments of some images by the key of their setting, and keep those that are asked for.

    They are made again where only a method asks for them: their pixels and the setting decide them.
    """
    of_methods = [work.methods[name] for name in found if name in work.methods]
    needed = {name_of(each.segments) for each in of_methods if isinstance(each, Segmented)} | (
        found.keys() & work.parted
    )
    made = {}
    for name in sorted(needed):
        setting = work.parted[name]
        own = maps[setting.category][some] if isinstance(setting, Labels) else None
        index, feature = part(setting, pixels.numpy() / 255.0, own, work.explainable.patches)
        made[setting.key] = torch.from_numpy(index)
        if name in found:
            found[name]["segments"][some] = index
            found[name]["feature"][some] = feature
    return made


def _blank(work: Work, name: str, images: int) -> dict[str, np.ndarray]:
    """Return the arrays of a store, without values: those of a method or of segments, or one a layer with units."""
    if name in work.layouts or name in work.parted:
        arrays = {key: array for key, array in work.layout(name).arrays().items() if key != "image_id"}
    else:
        arrays = {layer: work.relevance_of(name, layer) for layer in work.layers_of(name)}
    return {key: np.full((images, *array.shape[1:]), array.fill, array.dtype) for key, array in arrays.items()}


def _explain_batch(
    work: Work,
    pixels: torch.Tensor,
    ids: Sequence[str],
    classes: torch.Tensor,
    some: slice,
    found: Mapping[str, dict[str, np.ndarray]],
    segments: Mapping[str, torch.Tensor],
) -> None:
    """Explain a micro-batch by every method, one rank at a time, and keep the numbers of `some` images."""
    spec, count = work.model.spec, len(pixels)
    size = spec.numerics.micro_batch
    labels = padded(classes, size)
    methods = list(dict.fromkeys(map(method_of, found)))
    kinds = {name: METHODS[work.methods[name].kind] for name in methods}
    probabilities = work.explainable.normalised == "softmax"
    with computing:
        network = network_of(work.model)
        inputs = normalise(padded(pixels, size), spec)
        baseline = None
        if any(kind.baseline for kind in kinds.values()):
            baseline = normalise(padded(baseline_pixels(work.baseline, pixels, ids), size), spec)
        layers = sorted({info.name for name in methods if (info := work.layer_of(name)) is not None})
        seeds = [seed_of(each) for each in ids]
        background = {name: background_of(work, name) for name in methods}
        for rank in range(work.targets.ranks):
            subject = Subject(
                network,
                inputs,
                partial(target_of, work.targets, labels=labels, rank=rank, probabilities=probabilities),
                baseline,
                size,
                count,
                layers,
                any(kind.shares == "inputs" for kind in kinds.values()),
                seeds,
                bounds=bounds_of(spec, pixels),
                one_baseline=work.baseline in ("black", "white") if isinstance(work.baseline, str) else True,
                segments={key: padded(each, size) for key, each in segments.items()},
            )
            target = subject.chosen
            assert isinstance(target, Logit)
            of_all = {"score": subject.score, "target": target.classes}
            if baseline is not None:
                likely = replace(target, against=None, link="probability")
                of_all |= {
                    "baseline_score": subject.baseline_score,
                    "baseline_probability": scores(network, baseline, likely),
                }
            for name in methods:
                known = replace(work.known(name), background=background[name])
                made = FUNCTIONS[work.methods[name].kind](subject, work.methods[name], known)
                for values in (made.map, *made.units.values(), *(made.facts.get(each) for each in ACCOUNTS)):
                    _refuse_non_finite(work, name, values, ids)
                arrays = {"attribution": made.map, "residual": made.residual, **of_all, **made.facts}
                arrays["channel_attribution"] = made.values
                place: Any = some if work.layouts[name].ranks is None else (some, rank)
                for store, tensors in ((name, arrays), (unit_relevance(name), made.units)):
                    for array, kept in found.get(store, {}).items():
                        tensor = tensors[array]
                        assert tensor is not None
                        stored = tensor[:count].detach().cpu().numpy()
                        if array in kinds[name].by_segment:
                            stored = filled(stored, work.layouts[name].segments)
                        kept[place] = stored


def filled(values: np.ndarray, width: int) -> np.ndarray:
    """Return numbers (image, segment) with NaN behind them, up to a width."""
    return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=np.nan)


def _refuse_non_finite(work: Work, name: str, values: torch.Tensor | None, ids: Sequence[str]) -> None:
    if values is None:
        return
    good = values[: len(ids)].isfinite().reshape(len(ids), -1).all(1)
    if not bool(good.all()):
        image = ids[int((~good).nonzero()[0])]
        raise MicrotomeError(
            f"network {work.model.name!r}, method {name!r}: the map of image {image!r}, or what the method knows "
            f"besides, is not finite (NaN or infinity)"
        )
