"""The tables of the stage `attack`: success, checks, the units that move, and what foretells success."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kernels.attacks.intervals import auroc, mean_interval, share_interval
from kernels.audit.intervals import resampled
from pipeline.plan.job import Job
from pipeline.stages.attack import results
from pipeline.stages.attack.chosen import Shard, of_pair
from pipeline.stages.attack.results import FAILED, IMPORTANT, RANDOM, SUCCEEDED, WRONG
from pipeline.stages.attack.settings import Attack, Pair, Settings, pairs_of
from pipeline.storage.manifest import Files, below
from pipeline.storage.tables import number
from pipeline.workers.resumable import Parts

Found = Mapping[Pair, Mapping[str, np.ndarray]]
"""By pair, what is stored of the chosen images: (image, ...) by array, with their slots."""
SMALL = (
    *("state", "predicted_before", "predicted", "predicted_noise", "linf", "l2", "excess", "margin", "first_step"),
    "start_succeeded",
)
LEVEL, WIDE = 0.95, 0.99
"""Levels of intervals: of shares, and of changes of peaks."""
MOVED = 10
"""Units of a pair in the table of those that moved most."""
FORETELL = ("margin_without", "margin_before", "loss_of_margin")


def read(job: Job[Settings], name: str, parts: Parts, shards: Mapping[str, Shard]) -> Found:
    """Return what is stored of the chosen images of an attack, without the images."""
    from pipeline.storage.store import Reader

    files, found = parts.files(), {}
    for pair in pairs_of(job.settings):
        reader = Reader(job.folder / f"{name}.zarr" / pair.name, below(pair.name, files))
        own = of_pair(shards, pair)
        slots = [shard.bounds[0] + place for shard in own for place in shard.places]
        found[pair] = {"slot": np.array(slots, np.int64)}
        for array in SMALL:
            values = [np.asarray(reader[array][slice(*shard.bounds)])[list(shard.places)] for shard in own]
            found[pair][array] = np.concatenate(values) if values else np.asarray(reader[array][:0])
    return found


def class_name(index: int | None, names: Sequence[str]) -> str:
    """Return a class for readers: its name, its index where it has none, `any` for no class."""
    if index is None:
        return "any"
    return names[index] if index < len(names) else f"class {index}"


# Success --------------------------------------------------------------------------------------------------------------


def of_attacks(job: Job[Settings], attacks: Mapping[str, Attack], found: Mapping[str, Found]) -> dict[str, bytes]:
    """Return the tables of success and of checks, by file name."""
    names = job.images.classes
    rows = [
        row_of(attack, [pair], [found[name][pair]], names)
        for name, attack in attacks.items()
        for pair in pairs_of(job.settings)
    ]
    if len(pairs_of(job.settings)) > 1:
        rows += [row_of(attack, [], list(found[name].values()), names) for name, attack in attacks.items()]
    return {
        results.TABLE: results.table(results.COLUMNS, rows),
        results.CHECKS_TABLE: results.table(results.CHECK_COLUMNS, checks(attacks, found)),
    }


def together(arrays: Sequence[Mapping[str, np.ndarray]], name: str) -> np.ndarray:
    return np.concatenate([each[name] for each in arrays])


def row_of(
    attack: Attack, pairs: Sequence[Pair], arrays: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> list[Any]:
    """Return what an attack reached on a pair, or on all of them where none is named."""
    state, l2, linf, excess = (together(arrays, name) for name in ("state", "l2", "linf", "excess"))
    attacked, good = state >= FAILED, state == SUCCEEDED
    count, total = int(good.sum()), int(attacked.sum())
    noise = together(arrays, "predicted_noise")[attacked] != together(arrays, "predicted_before")[attacked]
    classes = [class_name(each, names) for pair in pairs for each in (pair.source, pair.target)] or ["all", "all"]
    return [
        *(attack.name, attack.method, attack.norm, "" if attack.epsilon is None else number(attack.epsilon), *classes),
        *(int((state >= WRONG).sum()), total, count, number(count / total if total else math.nan)),
        *map(number, share_interval(count, total, LEVEL)),
        *map(number, (mean(linf[good]), mean(l2[good]), float(np.median(l2[good])) if count else math.nan)),
        number(float(excess[attacked].max()) if attack.epsilon is not None and total else math.nan),
        number(mean(noise)),
    ]


def mean(values: np.ndarray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else math.nan


def checks(attacks: Mapping[str, Attack], found: Mapping[str, Found]) -> Iterator[list[Any]]:
    """Yield what must hold of any attack, and what would show that gradients are masked."""
    good = {name: together(list(of.values()), "state") == SUCCEEDED for name, of in found.items()}
    attacked = {name: together(list(of.values()), "state") >= FAILED for name, of in found.items()}

    def share(name: str) -> float:
        return mean(good[name][attacked[name]])

    def check(what: str, name: str, other: str, images: int, left: float, right: float, holds: bool) -> list[Any]:
        return [what, name, other, images, number(left), number(right), int(holds)]

    for name, attack in attacks.items():
        honest = sum(int(changed(pair, own).sum()) for pair, own in found[name].items())
        count = int(good[name].sum())
        yield check("a success changes the prediction", name, "", count, honest, count, honest == count)
        if attack.epsilon is not None:
            excess = together(list(found[name].values()), "excess")[attacked[name]]
            most = float(excess.max()) if len(excess) else 0.0
            yield check("no distance is above the bound", name, "", len(excess), most, 0.0, most == 0)
    for name, attack in attacks.items():
        own, count = share(name), int(attacked[name].sum())
        starts = together(list(found[name].values()), "start_succeeded")
        if starts.shape[1] > 1:
            first = mean(starts[attacked[name], 0] == 1)
            yield check("more starts reach as far", name, "its first start", count, own, first, own >= first)
        alike = [each for each in attacks.values() if (each.method, each.norm) == (attack.method, attack.norm)]
        smaller = [each for each in alike if (each.epsilon or 0) < (attack.epsilon or 0)]
        if smaller:
            before = max(smaller, key=lambda each: each.epsilon or 0)
            other = share(before.name)
            yield check("a larger bound reaches as far", name, before.name, count, own, other, own >= other)
        if attack.method == "square":
            rivals = [
                each.name
                for each in attacks.values()
                if (each.norm, each.epsilon) == (attack.norm, attack.epsilon) and each.method != "square"
            ]
            if rivals:
                best = max(rivals, key=share)
                other = share(best)
                yield check("gradients reach as far as squares", best, name, count, other, own, other >= own)


def changed(pair: Pair, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which images succeed by what is stored: they were something else before, and are the target now."""
    before, after = arrays["predicted_before"], arrays["predicted"]
    reached = after == pair.target if pair.target is not None else after != before
    return (arrays["state"] == SUCCEEDED) & reached & (after != before)


# Units ----------------------------------------------------------------------------------------------------------------


SHOWN = {
    "attack": ("peak", "peak_attacked"),
    "noise": ("peak", "peak_noise"),
    "untrained": ("peak_untrained", "peak_attacked_untrained"),
}
"""What images are shown to which network: the peaks before and after."""


@dataclass(frozen=True)
class Moved:
    """The units of a layer on the attacked images of all pairs, a row each.

    Attributes
    ----------
    slot : (row,) of the image. pair : (row,) the place of its pair. important : (row, 2 * IMPORTANT) the units of the
        source and of the end, -1 where there is none. arrays : what is stored, by name.
    """

    slot: np.ndarray
    pair: np.ndarray
    important: np.ndarray
    arrays: Mapping[str, np.ndarray]


def moved(job: Job[Settings], name: str, found: Found, files: Files, order: np.ndarray, twin: bool) -> Moved:
    """Read the units of an attack; with `twin`, in the untrained network too."""
    from pipeline.storage.store import StoreRef

    slots, places, important = [], [], []
    arrays: dict[str, list[np.ndarray]] = {}
    peaks = [peak for shown, both in SHOWN.items() if twin or shown != "untrained" for peak in both]
    keys = ["margin_before", "margin_without", *dict.fromkeys(peaks)]
    for place, (pair, own) in enumerate(found.items()):
        attacked = own["state"] >= FAILED
        slot = own["slot"][attacked]
        store = StoreRef(job.folder / f"{name}{results.UNITS}.zarr" / pair.name, below(pair.name, files))
        end = own["predicted"][attacked] if pair.target is None else np.full(len(slot), pair.target)
        tops = order[:, :IMPORTANT]
        important.append(np.concatenate([tops[own["predicted_before"][attacked]], tops[end]], 1))
        slots.append(slot)
        places.append(np.full(len(slot), place))
        for key in keys:
            arrays.setdefault(key, []).append(results.whole(store, key)[slot])
    joined = {key: np.concatenate(values) for key, values in arrays.items()}
    return Moved(np.concatenate(slots), np.concatenate(places), np.concatenate(important), joined)


def of_units(
    job: Job[Settings],
    attacks: Mapping[str, Attack],
    found: Mapping[str, Found],
    files: Mapping[str, Files],
    order: np.ndarray,
    twin: bool,
) -> dict[str, bytes]:
    """Return the tables of units, by file name."""
    pairs, names = pairs_of(job.settings), job.images.classes
    rows: dict[str, list[list[Any]]] = {name: [] for name in (results.UNITS_TABLE, results.MOVED_TABLE)}
    foretold: list[list[Any]] = []
    for name, attack in attacks.items():
        one = moved(job, name, found[name], files[name], order, twin)
        rows[results.UNITS_TABLE] += by_rank(job, name, one)
        rows[results.MOVED_TABLE] += most_moved(name, one, pairs, names, order)
        foretold += foretelling(attack, one, found[name])
    return {
        results.UNITS_TABLE: results.table(results.UNIT_COLUMNS, rows[results.UNITS_TABLE]),
        results.MOVED_TABLE: results.table(results.MOVED_COLUMNS, rows[results.MOVED_TABLE]),
        results.PREDICTED_TABLE: results.table(results.PREDICTED_COLUMNS, foretold),
    }


def by_rank(job: Job[Settings], name: str, one: Moved) -> Iterator[list[Any]]:
    """Yield the change of the peak by the unit's rank of importance, beside four random units and all others."""
    random = random_units(job.settings.seed, one.important, one.arrays["peak"].shape[1])
    for shown, (before, after) in SHOWN.items():
        if before not in one.arrays:
            continue
        delta = one.arrays[after].astype(np.float64) - one.arrays[before]
        spread = deviation(one.slot, one.arrays[before])
        relative = np.divide(delta, spread, out=np.full_like(delta, np.nan), where=spread > 0)
        for group, rank, members in groups_of(one, random, delta.shape[1]):
            found = []
            for values in (np.abs(delta), delta, np.abs(relative)):
                found.append(mean_interval(by_image(one.slot, of_group(values, members)), WIDE))
            numbers = [each for mean, low, high, _ in found for each in (mean, low, high)]
            yield [name, shown, group, rank or "", found[0][3], *map(number, numbers)]


def random_units(seed: int, important: np.ndarray, units: int) -> np.ndarray:
    """Draw units of each row that are important to neither class, bool (row, unit): alike for equal important ones."""
    drawn = np.zeros((len(important), units), bool)
    for own in np.unique(important, axis=0):
        left = np.setdiff1d(np.arange(units), own)
        chosen = np.random.default_rng([seed, *(own + 1).tolist()]).choice(left, min(RANDOM, len(left)), replace=False)
        drawn[np.ix_(np.flatnonzero((important == own).all(1)), chosen)] = True
    return drawn


def groups_of(one: Moved, drawn: np.ndarray, units: int) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield groups of units: what they are important to, their rank, and bool (row, unit)."""
    rows = np.arange(len(one.slot))
    taken = np.zeros((len(rows), units), bool)
    for at in range(one.important.shape[1]):
        members = np.zeros((len(rows), units), bool)
        known = one.important[:, at] >= 0
        members[rows[known], one.important[known, at]] = True
        taken |= members
        half = one.important.shape[1] // 2
        yield "source" if at < half else "target", at % half + 1, members
    yield "random", 0, drawn
    yield "others", 0, ~taken & ~drawn


def of_group(values: np.ndarray, members: np.ndarray) -> np.ndarray:
    """Return the mean of each row over the members that are known, (row,); NaN without any."""
    known = members & ~np.isnan(values)
    count = known.sum(1)
    total = np.where(known, values, 0).sum(1)
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def by_image(slots: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the mean of the known values of each image, over the pairs that it was attacked for."""
    known = ~np.isnan(values)
    _, place = np.unique(slots, return_inverse=True)
    count = np.bincount(place, known, minlength=place.max(initial=-1) + 1)
    total = np.bincount(place, np.where(known, values, 0), minlength=len(count))
    return np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0)


def deviation(slots: np.ndarray, peaks: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each unit's peak over images, each once."""
    _, first = np.unique(slots, return_index=True)
    return peaks[first].astype(np.float64).std(0) if len(first) else np.zeros(peaks.shape[1])


def most_moved(
    name: str, one: Moved, pairs: Sequence[Pair], names: Sequence[str], order: np.ndarray
) -> Iterator[list[Any]]:
    """Yield the units whose peaks change most on each pair."""
    delta = one.arrays["peak_attacked"].astype(np.float64) - one.arrays["peak"]
    for place, pair in enumerate(pairs):
        own = delta[one.pair == place]
        if not len(own):
            continue
        absolute, signed = np.abs(own).mean(0), own.mean(0)
        for at, unit in enumerate(np.argsort(-absolute, kind="stable")[:MOVED].tolist()):
            ranks = ["" if each is None else rank_of(order[each], unit) for each in (pair.source, pair.target)]
            classes = [class_name(each, names) for each in (pair.source, pair.target)]
            yield [name, *classes, at + 1, unit, len(own), number(absolute[unit]), number(signed[unit]), *ranks]


def rank_of(order: np.ndarray, unit: int) -> int | str:
    """Return a unit's rank, from 1 on; empty where a class has no ranking."""
    place = np.flatnonzero(order == unit)
    return int(place[0]) + 1 if len(place) else ""


def foretelling(attack: Attack, one: Moved, found: Found) -> Iterator[list[Any]]:
    """Yield how well margins tell which images are easily attacked: without the source's units, with all, the loss."""
    attacked = [own["state"] >= FAILED for own in found.values()]
    good = np.concatenate([own["state"][rows] == SUCCEEDED for own, rows in zip(found.values(), attacked, strict=True)])
    l2 = np.concatenate([own["l2"][rows] for own, rows in zip(found.values(), attacked, strict=True)])
    without, before = (one.arrays[key].astype(np.float64) for key in ("margin_without", "margin_before"))
    known = ~np.isnan(without)
    easy, said = good, "it succeeds"
    if attack.epsilon is None and known.any():
        reach = np.where(good, l2, math.inf)
        easy, said = reach < np.median(reach[known]), "its change is shorter than the median"
    scores = {"margin_without": -without, "margin_before": -before, "loss_of_margin": before - without}
    rows = rows_of_images(one.slot[known])
    for by in FORETELL:
        value, low, high = resampled(statistic(scores[by][known], easy[known], rows), len(rows))
        yield [attack.name, said, by, int(known.sum()), int(easy[known].sum()), *map(number, (value, low, high))]


def rows_of_images(slots: np.ndarray) -> list[np.ndarray]:
    """Return the rows of each image."""
    order = np.argsort(slots, kind="stable")
    _, first = np.unique(slots[order], return_index=True)
    return np.split(order, first[1:]) if len(slots) else []


def statistic(scores: np.ndarray, easy: np.ndarray, rows: Sequence[np.ndarray]) -> Callable[[np.ndarray], float]:
    """Return the AUROC of images that are drawn again, each with all its rows."""

    def of(drawn: np.ndarray) -> float:
        chosen = np.concatenate([rows[at] for at in drawn]) if len(rows) < len(scores) else single[drawn]
        return auroc(scores[chosen], easy[chosen])

    single = np.concatenate(list(rows)) if len(rows) else np.zeros(0, np.int64)
    return of
