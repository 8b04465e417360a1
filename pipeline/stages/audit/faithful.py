"""Tests of faithfulness: does the score follow the map?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from pipeline.stages.attribute.options import BACKWARD, METHODS, Method
from pipeline.stages.audit.declared import Measure, Test, TestOptions

Filler = Literal["black", "blur", "mean"]
Share = Annotated[float, Field(gt=0, lt=1)]
FILLED = "what removed pixels show: `black`, the image under a `blur`, or the `mean` colour of the image"
ORDERS = ("most_first", "least_first")


def _ascend(values: list[float]) -> list[float]:
    if any(second <= first for first, second in pairwise(values)):
        raise ValueError(f"{', '.join(f'{each:g}' for each in values)}: expected ascending numbers")
    return values


Shares = Annotated[list[Share], Field(min_length=1), AfterValidator(_ascend)]


def _once(fillers: list[Filler]) -> list[Filler]:
    if len(set(fillers)) < len(fillers):
        raise ValueError(f"{', '.join(fillers)}: each filler once")
    return fillers


Fillers = Annotated[list[Filler], Field(min_length=1), AfterValidator(_once)]


class Removal(TestOptions):
    steps: Annotated[int, Field(ge=2, le=10_000)] = Field(32, description="equal parts in which the pixels change")
    fillers: Fillers = Field(["black"], description=FILLED)


class Deletion(Removal):
    """Remove the pixels of the largest values first, and follow the score."""


class Insertion(Removal):
    """Begin with the filler, show the pixels of the largest values first, and follow the score."""

    fillers: Fillers = Field(["blur"], description=FILLED)


class Road(TestOptions):
    """Remove shares of the pixels, most and least relevant first, and fill them from their neighbours."""

    shares: Shares = Field([0.1, 0.3, 0.5, 0.7, 0.9], description="shares of the pixels that are removed, ascending")
    noise: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01, description="standard deviation of what is added to filled pixels, as a share of black to white"
    )


class Sets(TestOptions):
    sets: Annotated[int, Field(ge=3)] = Field(50, description="sets of pixels drawn for each image, the same for all")
    filler: Filler = Field("black", description=FILLED)


class SensitivityN(Sets):
    """Correlate the sum of the map over random sets of n pixels with what removing them does to the score."""

    shares: Shares = Field([0.01, 0.1, 0.3, 0.5, 0.7, 0.9], description="n, as shares of the pixels, ascending")


class Infidelity(Sets):
    """Compare the sum of the map over random squares with what removing them does to the score."""

    side: Annotated[float, Field(gt=0, le=1)] = Field(0.25, description="of a square, as a share of the shorter side")


class LogOdds(TestOptions):
    """Erase the pixels that speak most for one class and against another."""

    share: Share = Field(0.2, description="of the pixels that are erased at most")
    filler: Filler = Field("black", description=FILLED)


class Stability(TestOptions):
    """Explain noisy copies of an image, and compare the maps."""

    noise: Annotated[float, Field(gt=0, le=1)] = Field(
        0.02, description="standard deviation, as a share of black to white; pixels are rounded to whole levels"
    )
    draws: PositiveInt = Field(4, description="noisy copies of an image")


class LinearView(TestOptions):
    """How far around an image the score is the linear function that its gradient gives."""

    radii: Annotated[list[Annotated[float, Field(gt=0, le=255)]], Field(min_length=1), AfterValidator(_ascend)] = Field(
        [1.0, 4.0, 16.0, 64.0], description="standard deviations of noise around the image, in levels of 0 to 255"
    )
    draws: Annotated[int, Field(ge=3)] = Field(24, description="noisy copies of an image at each radius")


def labelled(values: list[float]) -> tuple[str, ...]:
    return tuple(f"{each:g}" for each in values)


def shares_of(steps: int) -> list[float]:
    """Return the shares of a curve, from 0 to 1."""
    return [step / steps for step in range(steps + 1)]


def _curves(better: Literal["higher", "lower"]) -> Callable[[Removal], Mapping[str, Measure]]:
    def measures(options: Removal) -> Mapping[str, Measure]:
        labels = {"filler": tuple(options.fillers), "share": labelled(shares_of(options.steps))}
        found = {
            f"{score}_curve": Measure(f"{title} by share of pixels", ("filler", "share"), labels)
            for score, title in (("probability", "Probability"), ("score", "Score"))
        }
        for filler in options.fillers:
            found[f"probability_{filler}"] = Measure(f"Area under the probability, {filler}", better=better)
            found[f"score_{filler}"] = Measure(f"Area under the score, {filler}", better=better)
        return found

    return measures


def _removals(options: Removal, own: float, size: tuple[int, int]) -> float:
    return len(options.fillers) * (options.steps - 1.0)


def _road(options: Road) -> Mapping[str, Measure]:
    labels = {"order": ORDERS, "share": labelled(options.shares)}
    found = {
        f"{what}_curve": Measure(f"{title} by share of pixels", ("order", "share"), labels)
        for what, title in (("accuracy", "Same prediction"), ("probability", "Probability"))
    }
    for order, better in zip(ORDERS, ("lower", "higher"), strict=True):
        for what, title in (("accuracy", "Same prediction"), ("probability", "Probability")):
            words = order.replace("_", " relevant ")
            found[f"{what}_{order}"] = Measure(f"{title}, {words}", better=better)  # type: ignore[arg-type]
    return found


def _sensitivity(options: SensitivityN) -> Mapping[str, Measure]:
    return {
        "correlation": Measure(
            "Correlation by n as a share of pixels", ("share",), {"share": labelled(options.shares)}, "higher"
        ),
        "mean_correlation": Measure("Correlation, mean over n", better="higher"),
    }


def _infidelity(options: Infidelity) -> Mapping[str, Measure]:
    return {
        "infidelity": Measure("Infidelity", better="lower"),
        "scaled_infidelity": Measure("Infidelity of the map at its best scale", better="lower"),
    }


def _log_odds(options: LogOdds) -> Mapping[str, Measure]:
    return {"change": Measure("Fall of the log-odds", better="higher")}


def _stability(options: Stability) -> Mapping[str, Measure]:
    return {
        "rank_correlation": Measure("Rank correlation with the maps of noisy copies", better="higher"),
        "largest_change": Measure("Largest change of the map, relative to it", better="lower"),
    }


def _linear(options: LinearView) -> Mapping[str, Measure]:
    return {"r2": Measure("R\u00b2 of the linear view by radius", ("radius",), {"radius": labelled(options.radii)})}


def _only_gradient(options: LinearView, method: Method) -> str:
    return "" if method is METHODS["saliency"] else "the linear view is that of the gradient: of saliency alone"


MAPS = ("random", "edges")
TESTS: dict[str, Test] = {
    "deletion": Test(
        "Deletion",
        "The pixels of the largest values are removed first: a faithful map makes the score fall at once.",
        Deletion,
        _curves("lower"),
        _removals,
        controls=MAPS,
        control="random",
    ),
    "insertion": Test(
        "Insertion",
        "The pixels of the largest values are shown first: a faithful map makes the score rise at once.",
        Insertion,
        _curves("higher"),
        _removals,
        controls=MAPS,
        control="random",
    ),
    "road": Test(
        "ROAD",
        "Removed pixels are filled from their neighbours, so that the shape of what is missing says little.",
        Road,
        _road,
        lambda options, own, size: 2.0 * len(options.shares),
        controls=MAPS,
        control="random",
    ),
    "sensitivity_n": Test(
        "Sensitivity-n",
        "The sum of a map over random sets of n pixels should rise and fall with what removing them does.",
        SensitivityN,
        _sensitivity,
        lambda options, own, size: float(options.sets * len(options.shares)),
        controls=MAPS,
        control="random",
    ),
    "infidelity": Test(
        "Infidelity",
        "The sum of a map over a square should be what removing the square does to the score.",
        Infidelity,
        _infidelity,
        lambda options, own, size: float(options.sets),
        controls=MAPS,
        control="random",
    ),
    "log_odds": Test(
        "Log-odds",
        "The pixels that speak most for the explained class and against the next are erased: the log-odds should fall.",
        LogOdds,
        _log_odds,
        lambda options, own, size: 2 * own + 1,
        controls=MAPS,
        control="random",
    ),
    "stability": Test(
        "Stability",
        "Noise that hardly anybody sees should hardly change the map.",
        Stability,
        _stability,
        lambda options, own, size: options.draws * own,
    ),
    "linear_view": Test(
        "Linear view",
        "How well the gradient, as a linear function, says the scores of images around the image.",
        LinearView,
        _linear,
        lambda options, own, size: BACKWARD + options.draws * len(options.radii),
        defined=_only_gradient,
    ),
}
