"""The page of how networks look at images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.words import SURE, with_error
from pipeline.stages.sight import figures
from pipeline.stages.sight.found import (  # fmt: skip
    ATTENTION_COLUMNS,
    PLACE_COLUMNS,
    RATIO_COLUMNS,
    REACH_COLUMNS,
    REMOVED_COLUMNS,
    Sight,
    attention_rows,
    place_rows,
    ratio_rows,
    reach_rows,
    read_sight,
    removed_rows,
)
from pipeline.stages.sight.results import NO_POSITIONS

ABSENT = {
    "receptive_field": "No receptive fields",
    "attention": "No attention distances",
    "skips": "No skip ratios",
    "localisation": "No localisation",
    "accuracy": "No accuracy without skips",
}


@dataclass(frozen=True)
class Section:
    """One network as the page shows it."""

    label: str
    found: Sight
    findings: list[str]
    absent: list[str]
    figures: list[Figure]


def pages(experiment: Experiment) -> list[Page]:
    made = experiment.of_stage("sight")
    if not made:
        return []
    sections = []
    for at, one in enumerate(made):
        assert one.dataset is not None and one.network is not None
        found = read_sight(experiment.results, one.dataset, one.network)
        several = len({each.dataset for each in made}) > 1
        label = f"{one.network} on {one.dataset}" if several else one.network
        absent = [f"{ABSENT[name]}: {why}." for name, why in found.settings.absent.items()]
        said = [f"{label}: {sentence}" for sentence in findings(found)]
        name = f"{one.dataset}-{one.network}"
        if name in (f"{each.dataset}-{each.network}" for each in made[:at]):
            name = f"{name}-{at + 1}"
        sections.append(Section(label, found, said, absent, list(drawn(experiment, found, name))))
    return [
        Page(
            file="sight.html",
            title="Receptive fields, attention distance, skip connections",
            template="sight.html.j2",
            values={"sections": sections},
            summary="How far networks look, what their skip connections pass on, and whether they know where things "
            "are.",
            findings=[sentence for one in sections for sentence in one.findings],
            figures=[figure for one in sections for figure in one.figures],
            methods="methods-sight.html.j2",
        )
    ]


def findings(found: Sight) -> Iterator[str]:
    """Say what the numbers show, whatever they are, and what could not be read."""
    values = found.values
    yield from of_what_is_not_read(found)
    if found.has("receptive_field") and found.reach:
        first, last = found.reach[0], found.reach[-1]
        radius, error = values["receptive_radius"], values["receptive_radius_standard_error"]
        layers = found.names("layer")
        yield (
            f"the effective receptive field has a radius of {pixels(radius[first], error[first])} in {layers[first]} "
            f"and of {pixels(radius[last], error[last])} in {layers[last]}."
        )
    if found.has("attention"):
        distance, names = values["attention_distance"], found.names("attention")
        heads = words.plural(int(np.count_nonzero(~np.isnan(distance[0]))), "head")
        yield (
            f"in {names[0]} {heads} attend over {np.nanmin(distance[0]):.1f} to {np.nanmax(distance[0]):.1f} px on "
            f"average, in {names[-1]} over {np.nanmin(distance[-1]):.1f} to {np.nanmax(distance[-1]):.1f} px; "
            f"attention that is the same for all patches would reach {values['attention_uniform_distance'][0]:.1f} px."
        )
    if found.has("skips"):
        yield from of_skips(found)
    if found.has("localisation"):
        yield from of_places(found)


def of_what_is_not_read(found: Sight) -> Iterator[str]:
    """Say of a measure that was made what it leaves out."""
    if found.has("receptive_field"):
        layers, said = found.names("layer"), [str(each) for each in found.values["receptive_note"]]
        for note in dict.fromkeys(each for each in said if each and each != NO_POSITIONS):
            yield f"{', '.join([layer for layer, each in zip(layers, said, strict=True) if each == note])}: {note}."
    for why in found.settings.attention_not_read or ():
        yield f"attention that is not measured: {why}."
    if found.settings.skips_not_read:
        names = ", ".join([each or "the network's own forward" for each in found.settings.skips_not_read])
        yield f"additions that cannot be read as units at positions, and are not measured: those of {names}."


def of_skips(found: Sight) -> Iterator[str]:
    values, names = found.values, found.names("skip")
    ratio = values["skip_ratio_spatial"]
    if not np.isnan(ratio).all():
        most, least = int(np.nanargmax(ratio)), int(np.nanargmin(ratio))
        times = f"{ratio[most]:.2f} times ({names[most]})"
        if most != least:
            times = f"{ratio[least]:.2f} ({names[least]}) to {times}"
        yield f"what skips a branch is {times} as large as what the branch adds."
    loss, error = values["accuracy_loss"], values["accuracy_loss_standard_error"]
    if not np.isnan(loss).all():
        accuracy, most = found.settings.accuracy, int(np.nanargmax(loss))
        assert accuracy is not None
        sure = int(np.count_nonzero(loss > SURE * error))
        yield (
            f"of its accuracy of {words.percent(accuracy, 1)} it loses most without the skip of "
            f"{names[most]}: {points(loss[most], error[most])}; beyond {SURE} standard errors it loses with {sure} of "
            f"{words.plural(len(names), 'skip')}."
        )


def of_places(found: Sight) -> Iterator[str]:
    facts, layer = found.settings.localisation, found.settings.localised_layer
    assert facts is not None
    (own, own_error), (others, _), (difference, error) = (facts[key] for key in ("own", "others", "difference"))
    if own is None or others is None:
        return
    said = (
        f"a position of {layer} has a CKA of {with_error(own, own_error)} with the patch at its own place and of "
        f"{others:.3f} with the others"
    )
    if error is None or difference is None:
        yield f"{said}; one minibatch gives no standard error."
    elif difference > SURE * error:
        yield f"{said}: it knows where things are, by {with_error(difference, error)}."
    else:
        yield f"{said}: within {SURE} standard errors ({error:.3f}) it does not know where things are."


def pixels(value: float, error: float) -> str:
    return f"{value:.1f}" + ("" if np.isnan(error) else f" ± {error:.1f}") + " px"


def points(value: float, error: float) -> str:
    """A difference of accuracies."""
    return f"{100 * value:.1f}" + ("" if np.isnan(error) else f" ± {100 * error:.1f}") + " points"


def drawn(experiment: Experiment, found: Sight, name: str) -> Iterator[Figure]:
    labels = {"network": found.network, "data set": found.dataset}
    if found.has("receptive_field") and found.reach:
        shown, every = len(figures.shown_layers(found)), len(found.reach)
        yield draw(
            experiment,
            f"receptive-fields-{name}",
            partial(figures.fields, found=found),
            kind="receptive-fields",
            alt=f"Maps: which pixels the centre of {shown} layers of {found.network} depends on",
            caption="Effective receptive fields: how much each pixel changes what the centre position of a layer "
            f"gives, relative to the pixel that matters most; {shown} of {words.plural(every, 'layer')}.",
            header=REACH_COLUMNS,
            rows=reach_rows(found),
            labels=labels,
        )
    if found.has("attention"):
        yield draw(
            experiment,
            f"attention-{name}",
            partial(figures.attention, found=found),
            kind="attention-distances",
            alt=f"Lines: mean attention distance of the heads of {found.network}, sorted, one line a layer",
            caption="Mean distance over which heads attend between patches (class and register tokens left out), "
            "sorted within each layer; dashed: attention that is the same for all patches.",
            header=ATTENTION_COLUMNS,
            rows=attention_rows(found),
            labels=labels,
        )
    if found.has("skips"):
        yield draw(
            experiment,
            f"skip-ratios-{name}",
            partial(figures.ratios, found=found),
            kind="skip-ratios",
            alt=f"How large what skips each branch of {found.network} is, relative to what the branch adds",
            caption="Norm of what skips a branch over the norm of what the branch adds, in the order of the forward.",
            header=RATIO_COLUMNS,
            rows=ratio_rows(found),
            labels=labels,
        )
        yield draw(
            experiment,
            f"skips-removed-{name}",
            partial(figures.removed, found=found),
            kind="skips-removed",
            alt=f"Accuracy that {found.network} loses without each skip connection, and CKA of its layers",
            caption="The network without one skip connection at a time: accuracy that it loses, and linear CKA "
            "(unbiased) of each layer with itself in the whole network.",
            header=REMOVED_COLUMNS,
            rows=removed_rows(found),
            labels=labels,
        )
    if found.has("localisation") and not np.isnan(found.values["localisation"]).all():
        outputs = figures.shown_outputs(found)
        yield draw(
            experiment,
            f"localisation-{name}",
            partial(figures.places, found=found),
            kind="localisation",
            alt=f"Maps: CKA of positions of {found.settings.localised_layer} with every patch of the image",
            caption=f"Linear CKA (unbiased) of a position of {found.settings.localised_layer} with the patch of the "
            "image at each place; a ring where the position itself is.",
            header=PLACE_COLUMNS,
            rows=place_rows(found, outputs),
            labels=labels,
        )
