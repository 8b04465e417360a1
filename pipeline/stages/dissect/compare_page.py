"""The page that compares networks: members of a group with mean and spread, and networks before and after."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure as Drawing
from matplotlib.ticker import PercentFormatter

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.style import COLOURS, MUTED, draw, shorten
from pipeline.report.tables import write_table
from pipeline.stages.dissect.compared import Group, Replaced, changes, groups, replaced

RELABELLED = 30
"""Relabelled units that the page lists; the CSV has all."""


def pages(experiment: Experiment) -> list[Page]:
    compared, changed = groups(experiment), list(replaced(experiment))
    if not compared and not changed:
        return []
    drawn = [group_figure(experiment, group) for group in compared]
    tables = [relabelled_table(experiment, one) for one in changed]
    return [
        Page(
            file="compare.html",
            title="Comparison",
            template="compare.html.j2",
            values={
                "groups": list(zip(compared, drawn, strict=True)),
                "replaced": list(zip(changed, tables, strict=True)),
                "changes": changes,
                "shown": RELABELLED,
            },
            summary="Networks of one group beside each other, and networks before and after other weights.",
            findings=[*map(of_group, compared), *map(of_replaced, changed)],
            figures=drawn,
            files=tables,
        )
    ]


def of_group(group: Group) -> str:
    mean, spread = group.spread(len(group.layers) - 1)
    return (
        f"Over the {words.plural(len(group.members), 'network')} of {group.name}, {words.percent(mean)} "
        f"(standard deviation {words.percent(spread, 1)}) of the units of {group.layers[-1]} are detectors."
    )


def of_replaced(one: Replaced) -> str:
    before = one.before[0]
    known = {(unit.layer, unit.unit) for unit in before.units}
    shared = sum((unit.layer, unit.unit) in known for unit in one.now.units)
    return (
        f"{one.network.trained.network} was replaced: {words.number(before.detectors)} detectors before, "
        f"{words.number(one.now.detectors)} now; accuracy {words.percent(before.accuracy, 1)} before, "
        f"{words.percent(one.now.accuracy, 1)} now; {words.number(len(one.relabelled))} of "
        f"{words.plural(shared, 'unit')} have another label."
    )


def group_figure(experiment: Experiment, group: Group) -> Figure:
    return draw(
        experiment,
        f"group-{group.dataset}-{group.name}",
        lambda width: spread(width, group),
        kind="group",
        alt=f"Line chart: share of detectors in each layer, mean and spread over the networks of {group.name}",
        caption=f"Share of each layer's units that are detectors: each network of {group.name} (points), their mean "
        "(line) and one standard deviation of the sample to each side (band).",
        header=("layer", *(member.trained.network for member in group.members), "mean", "standard_deviation"),
        rows=[(layer, *group.share(at), *group.spread(at)) for at, layer in enumerate(group.layers)],
        labels={"group": group.name, "data set": group.dataset},
    )


def spread(width: float, group: Group) -> Drawing:
    figure = Drawing(figsize=(width, 2.3), layout="constrained")
    panel = figure.subplots()
    x = np.arange(len(group.layers))
    mean, deviation = np.array([group.spread(at) for at in range(len(x))]).T
    panel.fill_between(x, mean - deviation, mean + deviation, color=COLOURS[0], alpha=0.2, linewidth=0)
    panel.plot(x, mean, color=COLOURS[0])
    for at, member in enumerate(group.members):
        share = [group.share(layer)[at] for layer in range(len(x))]
        panel.plot(x, share, linestyle="none", marker="osD^vPX*"[at % 8], color=COLOURS[(at + 1) % len(COLOURS)],
                   label=shorten(member.trained.network, 28))  # fmt: skip
    panel.set_xticks(x, [shorten(layer, 22) for layer in group.layers], rotation=30, ha="right")
    panel.set_ylim(0, 1)
    panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panel.set_ylabel("detectors", color=MUTED)
    panel.grid(axis="y")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def relabelled_table(experiment: Experiment, one: Replaced) -> str:
    """Write the relabelled units as CSV; return its file."""
    name = experiment.name(one.network.trained.dataset, one.network.trained.network)
    file = f"tables/relabelled-{name}.csv"
    rows: Sequence[Sequence[object]] = [
        (new.layer, new.unit, old.concept, old.iou, new.concept, new.iou) for old, new in one.relabelled
    ]
    header = ("layer", "unit", "concept_before", "iou_before", "concept", "iou")
    write_table(experiment.out / file, header, rows)
    return file
