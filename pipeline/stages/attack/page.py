"""The page of each network's attacks: what they reach, which units move, and whether they can be trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.pictures import JPEG, open_pictures
from pipeline.report.style import draw
from pipeline.report.tables import write_table
from pipeline.report.words import decimal, percent
from pipeline.stages.attack import figures, pictures, results
from pipeline.stages.attack.figures import TITLES
from pipeline.stages.attack.found import Attacks, Rows, attacks, by_step, page_of, shown_images, value
from pipeline.stages.attack.results import FAILED, IMPORTANT, SUCCEEDED, Reached
from pipeline.stages.attack.tables import class_name
from pipeline.stages.dissect.found import networks

PAIRS, IMAGES = 6, 3
"""Pairs of classes, and images of each, that are shown."""
PANELS = 4
"""Attacks in a figure of ranks."""
ROWS = 2000
"""Rows of a table on the page, at most: the CSV has all."""
MOVED = 5
"""Units of a pair on the page."""
ORDER = ("cw_l2", "apgd_ce", "apgd_dlr", "pgd", "square")
"""Methods in figures, those of the paper first."""
MEASURES = {
    "absolute": "mean absolute change",
    "signed": "mean signed change",
    "standardised": "in deviations of the peak",
}


@dataclass(frozen=True)
class Strip:
    """Images of a pair before and after an attack: files with what is said of each, and their size."""

    title: str
    files: list[tuple[str, str]]
    size: tuple[int, int]


@dataclass(frozen=True)
class Section:
    """One experiment as the page shows it."""

    found: Attacks
    findings: list[str]
    figures: list[Figure]
    strips: list[Strip]
    success: Rows
    moved: list[tuple[dict[str, str], str, str]]
    tables: dict[str, str]


def pages(experiment: Experiment) -> list[Page]:
    return [page(experiment, key, several) for key, several in attacks(experiment).items()]


def page(experiment: Experiment, key: tuple[str, str], several: Sequence[Attacks]) -> Page:
    """Return the page of one network on a data set."""
    dataset, network = key
    label = f"{network} on {dataset}" if len({of for of, _ in attacks(experiment)}) > 1 else network
    file = page_of(experiment, *key)
    sections = [
        section(experiment, one, f"attacks/{file.removesuffix('.html')}-{at}") for at, one in enumerate(several)
    ]
    files = [path for one in sections for path in one.tables.values()]
    return Page(
        file=file,
        title=f"Attacks, {label}",
        template="attacks.html.j2",
        values={"sections": sections, "network": network, "titles": TITLES, "rows": ROWS},
        summary=f"How small a change makes {label} say something else, and which units it moves.",
        findings=[finding for one in sections for finding in one.findings],
        figures=[figure for one in sections for figure in one.figures],
        files=files + [file for one in sections for strip in one.strips for file, _ in strip.files],
        methods="methods-attacks.html.j2",
        scripts=("audit.js",),
    )


def section(experiment: Experiment, one: Attacks, prefix: str) -> Section:
    """Return an experiment as the page shows it; write its pictures and tables."""
    name = prefix.partition("/")[2]
    tables = {}
    for what, rows in (
        *(("success", one.success), ("checks", one.checks), ("units", one.units)),
        *(("moved", one.moved), ("predicted", one.foretold)),
    ):
        if rows:
            tables[what] = f"tables/{name}-{what}.csv"
            write_table(experiment.out / tables[what], list(rows[0]), (list(row.values()) for row in rows))
    labels = labels_of(experiment, one)
    layer = one.facts.layer or ""
    moved = [
        (
            row,
            experiment.link_to(one.dataset, one.network, layer, int(row["unit"]))
            if (layer, int(row["unit"])) in labels
            else "",
            labels.get((layer, int(row["unit"])), ""),
        )
        for row in one.moved
        if int(row["place"]) <= MOVED
    ]
    said = list(findings(one, labels))
    return Section(
        one,
        said,
        list(draw_figures(experiment, one, name)),
        list(strips(experiment, one, prefix)),
        one.success[:ROWS],
        moved[:ROWS],
        tables,
    )


def labels_of(experiment: Experiment, one: Attacks) -> Mapping[tuple[str, int], str]:
    """Return the concept of each dissected unit of a network, empty for one that is no detector."""
    for each in networks(experiment):
        if (each.trained.dataset, each.trained.network) == (one.dataset, one.network):
            return {(u.layer, u.unit): u.concept if u.detector else "" for u in each.trained.units}
    return {}


def chosen(one: Attacks) -> list[str]:
    """Return the attacks of figures: of each method and norm that with the largest bound, those of the paper first."""
    last: dict[tuple[str, str], str] = {}
    for row in one.success:
        last[row["method"], row["norm"]] = row["attack"]
    return [last[key] for key in sorted(last, key=lambda key: (ORDER.index(key[0]), key[1] == "l2"))][:PANELS]


# Sentences ------------------------------------------------------------------------------------------------------------


def findings(one: Attacks, labels: Mapping[tuple[str, int], str]) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    for attack in chosen(one):
        row = one.overall(attack)
        if not int(row["attacked"]):
            continue
        said = (
            f"{TITLES[row['method']]}{bound_of(row)}: {percent(value(row['success']))} of {row['attacked']} attacks "
            f"succeed, judged on 8 bits; noise of the same norm changes {percent(value(row['changed_by_noise']))} of "
            f"the predictions"
        )
        wrong = int(row["images"]) - int(row["attacked"])
        said += f"; {wrong} more were not recognised before." if wrong else "."
        yield said
    broken = [row for row in one.checks if row["holds"] == "0"]
    if broken:
        first = broken[0]
        yield (
            f"{len(broken)} of {len(one.checks)} checks fail, the first: {first['check']} ({first['attack']}, "
            f"{decimal(value(first['value']))} against {decimal(value(first['other']))})."
        )
    elif one.checks:
        yield f"All {len(one.checks)} checks hold: of success and bounds, and against masked gradients."
    if one.facts.layer is not None:
        yield from of_units(one, labels)
    yield from (note[0].upper() + note[1:] + "." for note in one.facts.notes)


def bound_of(row: Mapping[str, str]) -> str:
    """Return an attack's bound for readers; empty without one."""
    if not row["epsilon"]:
        return ""
    return f", at most {row['epsilon']}/255 a pixel" if row["norm"] == "linf" else f", length at most {row['epsilon']}"


def of_units(one: Attacks, labels: Mapping[tuple[str, int], str]) -> Iterator[str]:
    """Say how much the important units move, beside the others, and what removing them foretells."""
    attack = chosen(one)[0]
    own = {
        (row["important_to"], row["rank"]): row
        for row in one.units
        if row["attack"] == attack and row["shown"] == "attack"
    }
    if ("source", "1") in own and ("others", "") in own:
        parts = [
            f"{told} {value(own[key]['absolute']):.3g} (99 % interval {value(own[key]['absolute_low']):.3g} to "
            f"{value(own[key]['absolute_high']):.3g})"
            for key, told in (
                *((("source", "1"), "most important to the source"), (("target", "1"), "to the target")),
                *((("random", ""), "of four random units"), (("others", ""), "of all others")),
            )
            if key in own and own[key]["absolute"]
        ]
        yield f"{attack}, mean absolute change of the peak in {one.facts.layer}: of the unit {', '.join(parts)}."
    most = next((row for row in one.moved if row["attack"] == attack), None)
    if most is not None:
        concept = labels.get((str(one.facts.layer), int(most["unit"])), "")
        yield (
            f"{attack}, {most['source']} → {most['target']}: unit {most['unit']}{f' ({concept})' if concept else ''} "
            f"moves most, by {value(most['signed']):+.3g} on average; its rank for the source is "
            f"{most['rank_for_source'] or '–'}, for the target {most['rank_for_target'] or '–'}."
        )
    for row in one.foretold:
        if row["attack"] == attack and row["by"] == "margin_without" and row["auroc"]:
            with_all = next(each for each in one.foretold if each["attack"] == attack and each["by"] == "margin_before")
            yield (
                f"Easily attacked ({row['easy']}): the margin without the source’s {IMPORTANT} units tells with an "
                f"AUROC of {decimal(value(row['auroc']), 2)} ({decimal(value(row['low']), 2)} to "
                f"{decimal(value(row['high']), 2)}), the margin with all units with "
                f"{decimal(value(with_all['auroc']), 2)}."
            )


# Figures --------------------------------------------------------------------------------------------------------------


def draw_figures(experiment: Experiment, one: Attacks, name: str) -> Iterator[Figure]:
    overall = [one.overall(attack) for attack in one.attacks]
    steps = {
        attack: by_step(one, attack)
        for attack in chosen(one)
        if not attack.startswith("square") and int(one.overall(attack)["attacked"])
    }
    labels = {"network": one.network, "data set": one.dataset, "experiment": one.experiment}
    yield draw(
        experiment,
        f"{name}-success",
        partial(figures.success, rows=overall, shortest=shortest(one), steps=steps),
        kind="attacks",
        alt=f"Curves: share of attacks on {one.network} that succeed, over the bound of the change and over steps",
        caption="Share of attacked images that become the target, or anything else where there is none, judged as they "
        "are stored; bars are 95 % intervals. Over steps: the share for which some point did, before rounding.",
        header=results.COLUMNS,
        rows=[list(row.values()) for row in overall],
        labels=labels,
    )
    if one.facts.layer is None:
        return
    for measure, said in MEASURES.items():
        yield draw(
            experiment,
            f"{name}-{measure}",
            partial(figures.ranks, rows=one.units, attacks=chosen(one), measure=measure),
            kind="attacks",
            alt=f"Points: {said} of the peak of units of {one.facts.layer} by their rank of importance",
            caption=f"{said[0].upper()}{said[1:]} of the peak activation in {one.facts.layer}, by the unit’s rank of "
            "importance to the class that is left and to the one that is reached, beside four random units and all "
            "others, with 99 % intervals over images.",
            header=results.UNIT_COLUMNS,
            rows=[list(row.values()) for row in one.units],
            labels=labels,
        )


def shortest(one: Attacks) -> np.ndarray:
    """Return the length of the shortest change of each attack by `cw_l2`, infinite where none succeeded."""
    found = [np.zeros(0)]
    for reached in one.facts.reached:
        if reached.attack == "cw_l2":
            store = one.store("cw_l2", reached.group)
            state, l2 = results.whole(store, "state"), results.whole(store, "l2")
            found.append(np.where(state == SUCCEEDED, l2, np.inf)[state >= FAILED])
    return np.concatenate(found)


def strips(experiment: Experiment, one: Attacks, prefix: str) -> Iterator[Strip]:
    """Draw images of the first pairs, before and after an attack, with the maps of the units that matter."""
    attack = chosen(one)[0]
    opened = open_pictures(experiment.results / one.dataset / "images.zarr")
    (experiment.out / prefix).parent.mkdir(parents=True, exist_ok=True)
    some = [each for each in one.facts.reached if each.attack == attack and each.attacked]
    for at, reached in enumerate(some[:PAIRS]):
        reader = one.store(attack, reached.group).open()
        units = one.units_of(attack, reached.group).open() if one.facts.layer is not None else None
        files, size = [], (0, 0)
        for slot in shown_images(one, attack, reached.group, IMAGES):
            changes = list(np.asarray(units["change"][slot])) if units is not None else []
            drawn = pictures.strip(np.asarray(opened.pixels[slot]), np.asarray(reader["image"][slot]), changes)
            file = f"{prefix}-{at}-{slot}.jpg"
            drawn.save(experiment.out / file, **JPEG)
            size = drawn.size
            before, after = (
                class_name(int(reader[key][slot]), opened.names) for key in ("predicted_before", "predicted")
            )
            files.append((file, f"{before}, then {after}; length of the change {float(reader['l2'][slot]):.3g}"))
        yield Strip(title_of(reached, opened.names), files, size)


def title_of(reached: Reached, names: Sequence[str]) -> str:
    """Return a pair for readers."""
    return f"{class_name(reached.source, names)} → {class_name(reached.target, names)}"
