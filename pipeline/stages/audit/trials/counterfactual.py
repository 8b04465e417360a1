"""Draw scenes again without some of their objects, and compare what the score loses with what a map says of each."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from kernels.attribution.agreement import rank_correlation
from kernels.audit import objects, ranks
from kernels.audit.games import Game
from pipeline.config.datasets import Scenes
from pipeline.data.kinds import draw_again
from pipeline.data.scenes import DEFINING, KINDS, Scene, generate
from pipeline.errors import DamagedError, MicrotomeError
from pipeline.networks.gradients import Logit
from pipeline.stages.attribute.options import IntegratedGradients
from pipeline.stages.audit.batch import Batch
from pipeline.stages.audit.counterfactual import OBJECTS, OF, SUMS, TRUTHS, Counterfactual

CALIBRATING = 128
"""Training scenes from which the untrained network's BatchNorms take their statistics."""
PICTURES = 64
"""Pictures that are drawn, and seen, at a time: at least a micro-batch of the network."""


@dataclass(frozen=True)
class Played:
    """What is true of the objects of one image.

    Attributes
    ----------
    scene : the image with its objects.
    kinds, areas, counts : of each object, (object,): its kind's place in `KINDS`, the pixels in which it is seen, and
        whether it counts.
    truths : by name, (object,). error : of the Shapley values.
    lone : an object that alone is of another class's kind, or None. wrong : its class, or any other.
    drop_of_wrong : what the score of that class loses, (object,).
    empty : the scene without any object.
    """

    scene: Scene
    kinds: np.ndarray
    areas: np.ndarray
    counts: np.ndarray
    truths: Mapping[str, np.ndarray]
    error: np.ndarray
    wrong: int
    lone: int | None
    drop_of_wrong: np.ndarray
    empty: np.ndarray


@dataclass(frozen=True)
class Said:
    """What a map, or a truth, says of the objects of one image: sums over each, (object,), and the share outside."""

    signed: np.ndarray
    absolute: np.ndarray
    outside: float = np.nan

    @staticmethod
    def of(values: np.ndarray, played: Played) -> Said:
        """Return what a map (y, x) says."""
        instances, count = played.scene.instance_map, len(played.kinds)
        signed, absolute = (objects.sums(each, instances, count) for each in (values, np.abs(values)))
        return Said(signed, absolute, objects.outside(values, instances))

    @staticmethod
    def values(values: np.ndarray) -> Said:
        """Return what values of objects (object,) say themselves."""
        return Said(values, np.abs(values))


def counterfactual(batch: Batch, options: Counterfactual) -> dict[str, np.ndarray]:
    """Compare what a method or a control says of the objects of each image with what the score loses without them.

    Images that the network predicts wrong, or with too few objects, have NaN.
    """
    played = batch.memo(("counterfactual", options.model_dump_json()), lambda: _play_all(batch, options))
    said = _said(batch, options, played)
    found = _blank(len(batch.ids))
    for row, own in played.items():
        _of_objects(found, row, own, said["map"][row])
        for at, of in enumerate(OF):
            if of in said:
                _compare(found, row, at, own, said[of][row])
        if batch.control == "drop":
            _of_truth(found, row, own, batch)
        if "wrong_class" in said:
            _of_lone(found, row, own, said["map"][row], said["wrong_class"][row])
    return found


def _blank(images: int) -> dict[str, np.ndarray]:
    compared = (len(OF), len(TRUTHS), len(SUMS))
    of_image = ("outside", "against", "lone_rank", "lone_top", "lone_negative", "own_kind", "lone_first")
    of_object = ("kind", "area", "drop", "shapley", "shapley_error", "signed", "absolute")
    return {
        **{name: np.full((images, *compared), np.nan) for name in ("rank", "partial", "top")},
        **{name: np.full(images, np.nan) for name in of_image},
        **{name: np.full((images, OBJECTS), np.nan) for name in of_object},
    }


# Truths ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    """An image that counts: its scene, the pixels in which each object is seen, and which objects pictures show."""

    scene: Scene
    areas: np.ndarray
    game: Game


def _play_all(batch: Batch, options: Counterfactual) -> dict[int, Played]:
    """Return what is true of the images that count, by their place."""
    dataset = Scenes.model_validate(batch.dataset)
    right = batch.logits.argmax(1).cpu().numpy() == batch.labels
    stages = {}
    for row in np.flatnonzero(right).tolist():
        stage = _stage(batch, options, row, draw_again(dataset, batch.ids[row]))
        if (stage.areas >= options.pixels).sum() >= options.objects:
            stages[row] = stage
    if not stages:
        return {}
    logits = _seen(batch, (block for each in stages.values() for block in _pictures(each)))
    own = logits.split([len(each.game.shown) for each in stages.values()])
    return {row: _play(batch, options, row, stages[row], seen) for row, seen in zip(stages, own, strict=True)}


def _stage(batch: Batch, options: Counterfactual, row: int, scene: Scene) -> _Stage:
    count = len(scene.things)
    if not np.array_equal(scene.image, batch.pixels[row].numpy()):
        raise DamagedError(
            f"image {batch.ids[row]!r} has other pixels when it is drawn again: another version drew the stored ones, "
            f"so remove the data set's results"
        )
    if count > OBJECTS:
        raise MicrotomeError(f"image {batch.ids[row]!r} has {count} objects, expected at most {OBJECTS}")
    game = Game.of(count, options.exact, options.coalitions, batch.seeds[row])
    return _Stage(scene, objects.areas(scene.instance_map, count), game)


def _pictures(stage: _Stage) -> Iterator[np.ndarray]:
    for at in range(0, len(stage.game.shown), PICTURES):
        yield stage.scene.pictures(stage.game.shown[at : at + PICTURES])


def _seen(batch: Batch, blocks: Iterable[np.ndarray]) -> torch.Tensor:
    """Return the logits of uint8 pictures, float64 (picture, class) on the CPU; micro-batches are full but the last."""
    size = batch.spec.numerics.micro_batch
    step = -(-PICTURES // size) * size
    found, kept = [], np.empty((0, 3, *batch.size), np.uint8)
    for block in blocks:
        kept = np.concatenate([kept, block])
        while len(kept) >= step:
            found.append(batch.logits_at(batch.normalise(torch.from_numpy(kept[:step]))).double().cpu())
            kept = kept[step:]
    if len(kept):
        found.append(batch.logits_at(batch.normalise(torch.from_numpy(kept))).double().cpu())
    return torch.cat(found)


def _play(batch: Batch, options: Counterfactual, row: int, stage: _Stage, logits: torch.Tensor) -> Played:
    """Return what is true of an image, from the logits of its pictures, (picture, class)."""
    scene, areas, game = stage.scene, stage.areas, stage.game
    kinds = np.array([KINDS.index(thing.kind) for thing in scene.things])
    scores = batch.target.at(torch.full((len(logits),), row))(logits).numpy()
    shares = game.shares(scores)
    lone = _lone(batch, kinds, areas, options, row)
    wrong = _class_of(batch, kinds[lone]) if lone is not None else _drawn_class(batch, row)
    of_wrong = _for_class(batch, torch.full((len(logits),), wrong))(logits).numpy()
    return Played(
        scene,
        kinds,
        areas,
        areas >= options.pixels,
        {"drop": game.drops(scores), "shapley": shares.values},
        shares.error,
        wrong,
        lone,
        game.drops(of_wrong),
        scene.pictures(np.zeros((1, game.objects), bool))[0],
    )


def _for_class(batch: Batch, classes: torch.Tensor) -> Logit:
    """Return what is explained, of these classes."""
    return replace(batch.target, classes=classes, against=None)


def _class_of(batch: Batch, kind: int) -> int:
    """Return the class that a kind of objects defines."""
    return next(list(batch.class_names).index(name) for name, own in DEFINING.items() if own == KINDS[kind])


def _lone(batch: Batch, kinds: np.ndarray, areas: np.ndarray, options: Counterfactual, row: int) -> int | None:
    """Return the largest object that counts and alone is of a kind that defines another class."""
    own = DEFINING[batch.class_names[int(batch.classes[row])]]
    defining = [KINDS.index(kind) for kind in DEFINING.values() if kind != own]
    alone = (
        np.isin(kinds, defining) & (areas >= options.pixels) & (np.bincount(kinds, minlength=len(KINDS))[kinds] == 1)
    )
    return int(np.argmax(np.where(alone, areas, -1))) if alone.any() else None


def _drawn_class(batch: Batch, row: int) -> int:
    """Draw a class other than the one that is explained."""
    others = np.delete(np.arange(len(batch.class_names)), int(batch.classes[row]))
    return int(np.random.default_rng([batch.seeds[row], 3]).choice(others))


# What is said ---------------------------------------------------------------------------------------------------------


def _said(batch: Batch, options: Counterfactual, played: Mapping[int, Played]) -> dict[str, dict[int, Said]]:
    """Return what a method or a control says of the objects of each image, as it is and in the controls of `OF`."""
    rows = list(played)
    if batch.control in TRUTHS:
        return {"map": {row: Said.values(own.truths[batch.control]) for row, own in played.items()}}
    if batch.control == "ring":
        return {"map": {row: Said.values(own) for row, own in _filled(batch, options, played).items()}}
    if batch.control == "area":
        return {"map": {row: Said.of(np.ones(batch.size), own) for row, own in played.items()}}
    if batch.control.startswith("ig_"):
        return {"map": _of_maps(batch, _integrated(batch, options, played), played) if rows else {}}
    maps = batch.at_image()
    found = {"map": {row: Said.of(maps[row], own) for row, own in played.items()}}
    if batch.control or not rows:
        return found
    wrong = _for_class(batch, torch.tensor([own.wrong for own in played.values()]))
    inputs = batch.inputs[rows]
    untrained, quick = _calibrated(batch), _quick(batch, options)
    if untrained is not None:
        found["untrained"] = _of_maps(batch, batch.explain(untrained, inputs, rows=rows, options=quick), played)
    found["wrong_class"] = _of_maps(batch, batch.explain(None, inputs, wrong, rows=rows, options=quick), played)
    return found


def _quick(batch: Batch, options: Counterfactual) -> IntegratedGradients | None:
    """Return integrated gradients of at most the test's steps, never doubled; None for other methods: their own."""
    own = batch.options_of_method
    if not isinstance(own, IntegratedGradients):
        return None
    steps = min(own.steps, options.steps)
    return own.model_copy(update={"steps": steps, "max_steps": steps})


def _of_maps(batch: Batch, maps: np.ndarray, played: Mapping[int, Played]) -> dict[int, Said]:
    """Return what maps of the images that count say, by their place."""
    return {row: Said.of(own, played[row]) for row, own in zip(played, batch.at_image(maps), strict=True)}


def _filled(batch: Batch, options: Counterfactual, played: Mapping[int, Played]) -> dict[int, np.ndarray]:
    """Return what the score loses where the mask of an object has the colour of its ring, (object,); NaN without."""
    found = {row: np.full(len(own.kinds), np.nan) for row, own in played.items()}
    pictures = {}
    for row, own in played.items():
        for k in range(len(own.kinds)):
            picture = objects.filled(own.scene.image, own.scene.instance_map == k + 1, options.ring)
            if picture is not None:
                pictures[row, k] = picture
    if pictures:
        rows = torch.tensor([row for row, _ in pictures])
        logits = _seen(batch, (each[None] for each in pictures.values()))
        scores = batch.target.at(rows)(logits).numpy()
        for (row, k), score in zip(pictures, scores, strict=True):
            found[row][k] = batch.score[row] - score
    return found


def _integrated(batch: Batch, options: Counterfactual, played: Mapping[int, Played]) -> np.ndarray:
    """Return integrated gradients from the baseline that the control names, (image, y, x) of the images that count."""
    rows = list(played)
    pixels = batch.pixels[rows]
    if batch.control == "ig_empty":
        baseline = torch.from_numpy(np.stack([own.empty for own in played.values()]))
    elif batch.control == "ig_mean":
        baseline = pixels.double().mean((2, 3), keepdim=True).round().to(torch.uint8).expand_as(pixels).contiguous()
    else:
        baseline = torch.zeros_like(pixels)
    method = IntegratedGradients(method="integrated_gradients", steps=options.steps, max_steps=options.steps)
    return batch.explain(None, batch.inputs[rows], baseline=batch.normalise(baseline), rows=rows, options=method)


def _calibrated(batch: Batch) -> nn.Module | None:
    """Return the untrained network whose BatchNorms have the statistics of training scenes; None without a control."""
    if batch.untrained is None:
        return None

    def make() -> nn.Module:
        network, dataset = copy.deepcopy(batch.untrained), Scenes.model_validate(batch.dataset)
        assert network is not None
        norms = [each for each in network.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
        if not norms:
            return network
        scenes = generate(dataset.seed, 0, CALIBRATING, dataset.size, "train", label_map=False)
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean of all batches
            norm.train()
        with torch.no_grad():
            for some in torch.from_numpy(scenes.image).split(PICTURES):
                network(batch.normalise(some))
        return network.eval()

    return batch.memo_of_network("untrained, calibrated", make)


# Measures -------------------------------------------------------------------------------------------------------------


def _of_objects(found: Mapping[str, np.ndarray], row: int, played: Played, said: Said) -> None:
    """Note what is known of each object that counts."""
    there = played.counts.nonzero()[0]
    numbers = {
        "kind": played.kinds,
        "area": played.areas / played.scene.instance_map.size,
        **played.truths,
        "shapley_error": played.error,
        "signed": said.signed,
        "absolute": said.absolute,
    }
    for name, values in numbers.items():
        found[name][row, : len(there)] = values[there]
    found["outside"][row] = said.outside
    negative = played.counts & (played.truths["drop"] < 0)
    if negative.any():
        found["against"][row] = np.mean(said.signed[negative] < 0)


def _compare(found: Mapping[str, np.ndarray], row: int, at: int, played: Played, said: Said) -> None:
    """Note how far the objects that count are in the order of the truths."""
    for of, truth in enumerate(TRUTHS):
        for place, values in enumerate((said.signed, said.absolute)):
            own, true = values[played.counts], played.truths[truth][played.counts]
            found["rank"][row, at, of, place] = rank_correlation(own[None], true[None])[0]
            found["partial"][row, at, of, place] = ranks.partial_rank_correlation(
                own, true, played.areas[played.counts]
            )
            found["top"][row, at, of, place] = ranks.found(own, true)


def _of_truth(found: Mapping[str, np.ndarray], row: int, played: Played, batch: Batch) -> None:
    """Note what the truth itself says of kinds: it may be any, and mostly is the one that defines the class."""
    drop = np.where(played.counts, played.truths["drop"], -np.inf)
    own = DEFINING[batch.class_names[int(batch.classes[row])]]
    found["own_kind"][row] = KINDS[played.kinds[drop.argmax()]] == own
    if played.lone is not None:
        found["lone_first"][row] = np.where(played.counts, played.drop_of_wrong, -np.inf).argmax() == played.lone


def _of_lone(found: Mapping[str, np.ndarray], row: int, played: Played, said: Said, wrong: Said) -> None:
    """Note what the map of the class of a lone object of another kind says, and the sign of that object in the own."""
    if played.lone is None:
        return
    own, true = wrong.signed[played.counts], played.drop_of_wrong[played.counts]
    found["lone_rank"][row] = rank_correlation(own[None], true[None])[0]
    found["lone_top"][row] = ranks.found(own, true)
    if played.truths["drop"][played.lone] < 0:
        found["lone_negative"][row] = said.signed[played.lone] < 0
