"""Sentences about attributions, computed from the numbers: true for any numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.report.words import decimal, number, percent, plural
from pipeline.stages.attribute.found import Attributions, MethodMaps
from pipeline.stages.attribute.options import METHODS

STABLE = 0.9
"""Rank correlation of two halves of the copies below which a local model depends on the draw."""
NORMAL = 1.96
"""Standard errors on each side of a 95 % interval."""


@dataclass(frozen=True)
class Means:
    """Means over images, NaN where no image has a value, and half of their 95 % intervals, NaN for fewer than two.

    `count` is the number of images behind each.
    """

    mean: np.ndarray
    half: np.ndarray
    count: np.ndarray

    @staticmethod
    def of(values: Mapping[int, np.ndarray], shape: tuple[int, ...]) -> Means:
        """Average arrays of one shape by image; images without a value at a place are left out there."""
        every = np.stack(list(values.values())) if values else np.empty((0, *shape))
        known = ~np.isnan(every)
        count = known.sum(0)
        mean = np.where(count > 0, np.where(known, every, 0).sum(0) / np.maximum(count, 1), np.nan)
        square = np.where(known, (every - mean) ** 2, 0).sum(0) / np.maximum(count - 1, 1)
        return Means(mean, np.where(count > 1, NORMAL * np.sqrt(square / np.maximum(count, 1)), np.nan), count)

    def say(self, *at: int) -> str:
        """Put one of them into words, with its interval if it has one."""
        mean, half = float(self.mean[at]), float(self.half[at])
        if math.isnan(half):
            return decimal(mean, 2)
        return f"{decimal(mean, 2)} (95\u00a0% interval {decimal(mean - half, 2)} to {decimal(mean + half, 2)})"


def median(values: np.ndarray) -> float:
    return float(np.median(values))


def named(names: Sequence[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def what_was_explained(found: Attributions) -> str:
    """Say how many images are explained, of which class, by how many methods."""
    score = str(found.settings["score"]).replace("_", " ")
    words = {
        "predicted": f"the {score} of the class that the network predicts",
        "label": f"the {score} of its label",
        "top": f"the {score} of each of its {number(found.ranks)} most probable classes",
    }
    wanted = found.settings["targets"]
    if found.kind == "class":
        words["class"] = f"the {score} of {found.class_name(int(wanted['class']))}"
    elif found.kind == "contrast":
        first, second = (found.class_name(int(each)) for each in wanted["contrast"])
        words["contrast"] = f"the {score} of {first} less that of {second}"
    return (
        f"Of each of {plural(len(found.slots), 'image')} of split {found.settings['split']}, {words[found.kind]} is "
        f"explained by {plural(len(found.methods), 'method')}."
    )


def of_baseline(found: Attributions) -> str:
    """Say what image the methods that compare with a baseline take; empty if none does."""
    titles = zip(found.titles(), found.methods, strict=True)
    compared = {title: method for title, method in titles if METHODS[method.facts.method].baseline}
    if not compared:
        return ""
    told: Any = next(iter(compared.values())).store.open().attrs["baseline"]
    words = {"blur": "the image, blurred", "uniform": "an image of uniform noise, by the image’s id"}
    if isinstance(told, Mapping):
        what = f"the mean of the images of split {told['mean']}" if "mean" in told else "an image file"
    else:
        what = words.get(str(told), f"a {told} image")
    return f"The baseline of {named(list(compared))} is {what}."


def of_laws(found: Attributions) -> Iterator[str]:
    """Say which methods keep their laws, how often others miss them, and which laws are not measured."""
    laws = [(title, each) for title, each in zip(found.titles(), found.methods, strict=True) if each.facts.law]
    measured = [(title, each) for title, each in laws if each.known.size]
    if not laws:
        yield "None of the methods has a law that its maps could be held against."
        return
    kept = [title for title, each in measured if not each.beyond.any()]
    if kept:
        every = "image" if found.ranks == 1 else "image and class"
        whose = "whose law is measured " if len(measured) > 1 else ""
        yield (
            f"{number(len(kept))} of {plural(len(measured), 'method')} {whose or 'with a measured law '}"
            f"{'keeps' if len(kept) == 1 else 'keep'} it within the tolerance on every {every}: {named(kept)}."
        )
    for title, each in measured:
        if each.beyond.any():
            yield misses(title, each, found.ranks)
    unknown = [title for title, each in laws if not each.known.size]
    if unknown:
        yield f"No residual is known of {named(unknown)}: on this network the law is not measured."


def of_biases(found: Attributions) -> Iterator[str]:
    """Say how much of the score biases and constants keep, by methods that account for it."""
    for title, method in zip(found.titles(), found.methods, strict=True):
        if (bias := method.fact("bias")) is None:
            continue
        scores = np.abs(found.score[method.explained])
        shares = np.abs(bias)[scores > 0] / scores[scores > 0]
        if shares.size:
            noun = "images" if found.ranks == 1 else "explanations"
            yield (
                f"By {title}, biases and constants keep {percent(median(shares))} of the score in magnitude (median "
                f"over {noun}), which the map does not show."
            )


def of_fits(found: Attributions) -> Iterator[str]:
    """Say how well surrogate models fit, and whether other copies would give other maps."""
    for title, method in zip(found.titles(), found.methods, strict=True):
        fit, stability = method.fact("r2"), method.fact("stability")
        if fit is None or stability is None or np.isnan(fit).all() or np.isnan(stability).all():
            continue
        players, samples = method.fact("players"), method.fact("samples")
        drawn = players is None or samples is None or not bool((samples >= np.exp2(players)).all())
        good, alike = float(np.nanmedian(fit)), float(np.nanmedian(stability))
        yield (
            f"The local models of {title} have a median R² of {decimal(good, 2)}, and the weights that "
            f"two halves of the copies give a median rank correlation of {decimal(alike, 2)}"
            + (": other copies would give other maps, so draw more samples." if alike < STABLE and drawn else ".")
        )


def misses(title: str, method: MethodMaps, ranks: int) -> str:
    """Say how often a method misses its law."""
    noun = "image" if ranks == 1 else "explanation"
    return (
        f"{title} misses its law by more than the tolerance of {method.tolerance:g} on "
        f"{number(int(method.beyond.sum()))} of {plural(int(method.known.size), noun)}; the largest residual is "
        f"{float(method.known.max()):.2g}."
    )


def of_likeness(found: Attributions, means: Means) -> Iterator[str]:
    """Say which methods' maps are most and least alike."""
    titles = found.titles()
    pairs = [(a, b) for a in range(len(titles)) for b in range(a) if not math.isnan(means.mean[a, b])]
    if not pairs:
        return
    order = sorted(pairs, key=lambda pair: -means.mean[pair])
    most, least = order[0], order[-1]
    images = plural(int(means.count[most]), "image")
    said = f"The maps of {titles[most[1]]} and {titles[most[0]]}"
    if most == least:
        yield f"{said} have a mean rank correlation of {means.say(*most)} over {images}."
    else:
        yield (
            f"{said} are the most alike, with a mean rank correlation of {means.say(*most)} over {images}, and those "
            f"of {titles[least[1]]} and {titles[least[0]]} the least, with {means.say(*least)}."
        )


def of_training(found: Attributions, means: Means) -> Iterator[str]:
    """Say which methods' maps are most and least like those of the untrained network."""
    titles = found.titles()
    known = np.flatnonzero(~np.isnan(means.mean)).tolist()
    if not known:
        return
    most, least = max(known, key=lambda at: means.mean[at]), min(known, key=lambda at: means.mean[at])
    images = plural(int(means.count[most]), "image")
    if most == least:
        yield (
            f"The maps of {titles[most]} of the trained and of the untrained network have a mean rank correlation of "
            f"{means.say(most)} over {images}."
        )
    else:
        yield (
            f"Beside the untrained network, the maps of {titles[most]} are the most alike, with a mean rank "
            f"correlation of {means.say(most)} over {images}, and those of {titles[least]} the least, with "
            f"{means.say(least)}."
        )


def how_compared(found: Attributions) -> str:
    """Say how maps were compared, and which without their signs."""
    unsigned = [title for title, each in zip(found.titles(), found.methods, strict=True) if not each.signed]
    said = "Spearman’s rank correlation over the pixels, after maps are enlarged to the size of the image"
    return f"{said}; by magnitude where one of two is unsigned ({named(unsigned)})." if unsigned else f"{said}."
