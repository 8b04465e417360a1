"""The page of the ablation: which units each class depends on, and what is lost without sets of them."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.tables import write_table
from pipeline.stages.ablate import figures
from pipeline.stages.ablate.found import Ablation, read_ablation
from pipeline.stages.ablate.results import Ablated
from pipeline.stages.dissect.found import Unit, networks


@dataclass(frozen=True)
class Row:
    """A unit in the table of a class: its pictures (none: not drawn), its dissection, and losses on both splits."""

    unit: Unit
    file: str
    images: int
    link: str
    rank_loss: float
    judge_loss: float


@dataclass(frozen=True)
class Section:
    """One ablated layer as the page shows it: a table for each class, and figures by kind."""

    found: Ablation
    label: str
    tables: list[tuple[str, float, list[Row]]]
    concepts: list[tuple[str, str]]
    figures: dict[str, Figure]
    table: str


def pages(experiment: Experiment) -> list[Page]:
    ablated = experiment.of_stage("ablate")
    if not ablated:
        return []
    sections = []
    for one in ablated:
        assert one.dataset is not None and one.network is not None
        for layer in Ablated.read(one.result).layers:
            sections.append(section(experiment, one.dataset, one.network, layer.layer))
    return [
        Page(
            file="ablation.html",
            title="Ablation",
            template="ablation.html.j2",
            values={"sections": sections},
            summary="What each class loses when single units are removed, and when sets of them are.",
            findings=[finding(one) for one in sections],
            figures=[figure for one in sections for figure in one.figures.values()],
            files=[one.table for one in sections],
            methods="methods-ablate.html.j2",
        )
    ]


def section(experiment: Experiment, dataset: str, network: str, layer: str) -> Section:
    of = next(
        each.trained
        for each in networks(experiment)
        if (each.trained.dataset, each.trained.network) == (dataset, network)
    )
    found = read_ablation(experiment.results, dataset, network, layer, of.units)
    position = of.layer_names.index(layer)
    name = experiment.name(dataset, network)
    pictures = f"units/{name}/{position:02d}-"
    tables = [
        (
            found.classes[c],
            float(found.balanced_accuracy[c]),
            [row(experiment, found, pictures, unit, c) for unit in found.top(c)],
        )
        for c in range(len(found.classes))
    ]
    concepts = [
        (found.classes[c], counted([found.units[unit].concept or f"unit {unit}" for unit in found.top(c)]))
        for c in found.by_dependence
    ]
    table = f"tables/ablation-{name}-{position:02d}.csv"
    write_table(
        experiment.out / table,
        ("class", "place", "unit", "concept", "category", "iou", "loss_rank", "loss_judge"),
        (
            (title, place, of.unit, of.concept, of.category, of.iou, each.rank_loss, each.judge_loss)
            for title, _, rows in tables
            for place, each in enumerate(rows, 1)
            for of in [each.unit]
        ),
    )
    label = experiment.label(dataset, network)
    drawn = {figure.kind: figure for figure in draw_all(experiment, found, f"{name}-{position:02d}", label)}
    return Section(found, label, tables, concepts, drawn, table)


def row(experiment: Experiment, found: Ablation, pictures: str, unit: int, c: int) -> Row:
    file = f"{pictures}{unit:04d}.jpg"
    images = 0
    if (experiment.out / file).exists():
        with Image.open(experiment.out / file) as strip:
            images = round(strip.width / strip.height)  # squares side by side
    return Row(
        found.units[unit],
        file if images else "",
        images,
        experiment.link_to(found.dataset, found.network, found.layer, unit),
        float(found.rank_loss[unit, c]),
        float(found.judge_loss[unit, c]),
    )


def finding(one: Section) -> str:
    """Say how many classes lose something by a single unit, and which loses most."""
    found = one.found
    rank, judge = found.measure.rank, found.measure.judge
    depending = sum(bool(found.top(c)) for c in found.by_dependence)
    text = (
        f"{one.label}, {found.layer}: of {len(found.classes)} classes, {depending} lose balanced accuracy on "
        f"split {rank} when one of {words.plural(len(found.units), 'unit')} is removed"
    )
    if not depending:
        return f"{text}."
    c = found.by_dependence[0]
    unit = int(found.order[c, 0])
    named = f" ({found.units[unit].concept})" if found.units[unit].concept else ""
    lost = [words.percent(float(loss[unit, c]), 1) for loss in (found.rank_loss, found.judge_loss)]
    return f"{text}; {found.classes[c]} most, {lost[0]} without unit {unit}{named}, and {lost[1]} on split {judge}."


def draw_all(experiment: Experiment, found: Ablation, name: str, label: str) -> Iterator[Figure]:
    labels = {"network": found.network, "data set": found.dataset}
    header = ("class", "kind", "size", "loss", "random_mean", "random_low", "random_high")
    shown = ""
    if len(found.by_dependence) > figures.CLASSES:
        shown = f" The {figures.CLASSES} classes that depend most on single units."
    if found.sizes and found.by_dependence:
        for kind, kinds, what in (
            ("ablation-removed", ("remove_most", "remove_least"), "are removed"),
            ("ablation-kept", ("keep_most",), "alone are kept"),
        ):
            yield draw(
                experiment,
                f"{kind}-{name}",
                partial(figures.curves, found=found, kinds=kinds),
                kind=kind,
                alt=f"Line charts, one a class: balanced accuracy that {label} loses when sets of units {what}",
                caption=f"Balanced accuracy that each class loses when units of {found.layer} {what}, ranked by their "
                f"loss on split {found.measure.rank}; measured on split {found.measure.judge}.{shown}",
                header=header,
                rows=figures.curve_rows(found, kinds),
                labels=labels,
            )
    if figures.shown_units(found):
        yield draw(
            experiment,
            f"ablation-classes-{name}",
            partial(figures.heatmap, found=found),
            kind="ablation-classes",
            alt=f"Heat map: balanced accuracy that each class of {label} loses without each unit",
            caption=f"Balanced accuracy that a class loses without a single unit of {found.layer}, on split "
            f"{found.measure.judge}: the units that any class depends on. Below zero it gains.{shown}",
            header=("class", "unit", "loss_rank", "loss_judge"),
            rows=figures.heatmap_rows(found),
            labels=labels,
        )
    if found.served_groups():
        yield draw(
            experiment,
            f"ablation-served-{name}",
            partial(figures.served, found=found),
            kind="ablation-served",
            alt=f"Bar chart: mean IoU of the units of {label} by the number of classes they are important to",
            caption=f"Mean IoU of the units of {found.layer} by the number of classes that count them among their four "
            "most important ones; above each bar, how many units.",
            header=("classes_served", "units", "mean_iou"),
            rows=found.served_groups(),
            labels=labels,
        )


def counted(names: Sequence[str]) -> str:
    """Return names in order of their first place; one that is there several times once, with its number."""
    return ", ".join(name if count == 1 else f"{name} × {count}" for name, count in Counter(names).items())
