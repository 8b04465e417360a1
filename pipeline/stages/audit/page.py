"""The page of audits: which laws explanations keep, what each test says of them, and all numbers in one table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.report import words
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.tables import write_table
from pipeline.stages.audit.axioms import AXIOMS, FUNCTIONS_ROW
from pipeline.stages.audit.figures import drawings, laws
from pipeline.stages.audit.found import Audit, read_audit
from pipeline.stages.audit.options import TESTS
from pipeline.stages.audit.results import COLUMNS, CONCEPT_COLUMNS, Outcome, Row, Shares, concept_rows
from pipeline.storage.manifest import Manifest

SHOWN = 4000  # rows of the sortable table, at most: the CSV has all
GROUPS = (".class.", ".kind.", ".size.")  # measures of parts of the images or objects
TOP = 3  # concepts of a class that its row names


@dataclass(frozen=True)
class Laws:
    """The laws on small functions, or on one network: a row a method, with the outcome of each law."""

    label: str
    rows: list[tuple[str, list[Outcome | None]]]
    figure: Figure


@dataclass(frozen=True)
class Tested:
    """One test on one network."""

    test: str
    label: str
    figures: list[Figure]


@dataclass(frozen=True)
class Section:
    """One audit as the page shows it."""

    found: Audit
    findings: list[str]
    laws: list[Laws]
    tested: list[Tested]
    rows: list[Row]
    table: str
    shares: list[tuple[Shares, str, str]]
    table_of_shares: str

    @property
    def tables(self) -> list[str]:
        return [self.table, *([self.table_of_shares] if self.shares else [])]


def pages(experiment: Experiment) -> list[Page]:
    sections = [section(experiment, one) for one in experiment.of_stage("audit")]
    if not sections:
        return []
    every = [
        figure
        for one in sections
        for figure in (*(each.figure for each in one.laws), *(f for each in one.tested for f in each.figures))
    ]
    return [
        Page(
            file="audit.html",
            title="Audit",
            template="audit.html.j2",
            values={"sections": sections, "axioms": AXIOMS, "tests": TESTS, "shown": SHOWN},
            summary="Whether explanations tell the truth: the laws that they keep, and what tests say of them.",
            findings=[sentence for one in sections for sentence in one.findings],
            figures=every,
            files=[file for one in sections for file in one.tables],
            methods="methods-audit.html.j2",
            methods_values={"axioms": AXIOMS, "tests": TESTS},
            scripts=("audit.js",),
        )
    ]


def section(experiment: Experiment, made: Made) -> Section:
    assert made.experiment is not None
    manifest = Manifest.read(experiment.results / "audit" / made.experiment / "done" / f"audit.{made.id}.json")
    found = read_audit(experiment.results, made.experiment, made.result, manifest.settings["tests"])
    table = f"tables/audit-{found.name}.csv"
    write_table(experiment.out / table, COLUMNS, (row.cells for row in found.rows))
    of_laws = [laws_of(experiment, found, number, *pair) for number, pair in enumerate(found.laws())]
    tested = list(tests_of(experiment, found))
    summary = [
        row
        for row in found.rows
        if row.test != "axioms" and row.outcome.measure and not any(each in row.outcome.measure for each in GROUPS)
    ]
    shares = f"tables/audit-concepts-{found.name}.csv"
    if found.concepts:
        write_table(experiment.out / shares, CONCEPT_COLUMNS, concept_rows(found.concepts))
    said = list(findings(found))
    told = [(each, most(each.relevance), most(each.loss)) for each in found.concepts[:SHOWN]]
    return Section(found, said, of_laws, tested, summary[:SHOWN], table, told, shares)


def most(shares: Mapping[str, float]) -> str:
    """Name the concepts with the largest shares, for example `sky 62 %, tree 20 %`."""
    first = sorted((name for name in shares if shares[name] > 0), key=lambda name: -shares[name])[:TOP]
    return ", ".join(f"{name} {words.percent(shares[name])}" for name in first) or "–"


def label_of(experiment: Experiment, dataset: str, network: str) -> str:
    return "small functions" if network == FUNCTIONS_ROW and not dataset else experiment.label(dataset, network)


def laws_of(experiment: Experiment, found: Audit, number: int, dataset: str, network: str) -> Laws:
    told = found.told(dataset, network, "axioms")
    label = label_of(experiment, dataset, network)
    rows = [(found.titles[name], [own.get(axiom) for axiom in AXIOMS]) for name, own in told.items()]
    shown = draw(
        experiment,
        f"audit-laws-{found.name}-{number}",
        partial(laws, told=told, titles=found.titles),
        kind="audit",
        alt=f"Matrix: which method keeps which law on {label}",
        caption=f"Laws on {label}: kept (blue), missed with the worst residual (orange), or refused (grey); white: not "
        f"defined for the method.",
        header=("method", "law", "residual", "state", "note"),
        rows=[
            (name, axiom, one.value, one.state, one.note)
            for name, own in told.items()
            for axiom in AXIOMS
            if (one := own.get(axiom)) is not None
        ],
        labels={"audit": found.name, "of": label},
    )
    return Laws(label, rows, shown)


def tests_of(experiment: Experiment, found: Audit) -> Iterator[Tested]:
    """Yield the figures of every test on every network."""
    for test, options in found.tests.items():
        for number, (dataset, network) in enumerate(found.pairs):
            told = found.told(dataset, network, test)
            if test == "axioms" or not told:
                continue
            figures = [
                draw(
                    experiment,
                    "-".join(filter(None, ("audit", found.name, test, drawing.name, str(number)))),
                    drawing.draw,
                    kind="audit",
                    alt=drawing.alt,
                    caption=drawing.caption,
                    header=COLUMNS,
                    rows=[row.cells for row in found.of(dataset, network, test)],
                    labels={"audit": found.name, "test": test, "network": network, "data set": dataset},
                )
                for drawing in drawings(test, told, found.titles, options)
            ]
            yield Tested(test, experiment.label(dataset, network), figures)


# Sentences ------------------------------------------------------------------------------------------------------------


def findings(found: Audit) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    for dataset, network in found.laws():
        told = found.told(dataset, network, "axioms")
        every = [one for own in told.values() for one in own.values() if one.state in ("holds", "fails")]
        kept = sum(one.state == "holds" for one in every)
        where = "small functions with exact answers" if not dataset else f"{network} on {dataset}"
        yield f"On {where}, {kept} of the {len(every)} laws that say something of a method hold."
        broken = invariance(found, told)
        if broken:
            yield f"Equivalent implementations have other maps there by {words_of(broken)}."
    for test in found.tests:
        yield from best(found, test)


def invariance(found: Audit, told: Any) -> list[str]:
    """Return the methods whose maps depend on how a function is written."""
    names = ("folded", "halves", "spelled", "implementation")
    fails = [method for method, own in told.items() if any(own[n].state == "fails" for n in names if n in own)]
    return [found.titles[method] for method in fails]


def best(found: Audit, test: str) -> Iterator[str]:
    """Say which method is first by the first measure of a test that has a better end, with its control beside it."""
    if test == "axioms":
        return
    for dataset, network in found.pairs:
        told = found.told(dataset, network, test)
        measures = list(dict.fromkeys(measure for own in told.values() for measure in own if measure))
        rows = {
            name: own[measures[0]]
            for name, own in told.items()
            if measures and measures[0] in own and name in found.titles and not math.isnan(own[measures[0]].value)
        }
        if not rows:
            continue
        low = better(found, test, measures[0]) == "lower"
        first = min(rows, key=lambda name: rows[name].value * (1 if low else -1))
        one = rows[first]
        said = f"{TESTS[test].title}, {network} on {dataset}: {found.titles[first]} is first, {measures[0]} "
        said += words.decimal(one.value)
        if not math.isnan(one.low):
            said += f" ({words.decimal(one.low)} to {words.decimal(one.high)})"
        control = told.get(f"control:{TESTS[test].control}", {}).get(measures[0])
        if control is not None and not math.isnan(control.value):
            said += f"; {TESTS[test].control} has {words.decimal(control.value)}"
        yield said + "."


def better(found: Audit, test: str, measure: str) -> str:
    """Return which end of a measure speaks for a method."""
    measures = TESTS[test].measures(found.tests[test])
    declared = measures.get(measure) or measures.get(measure.partition(".")[0])
    return declared.better if declared is not None else "higher"


def words_of(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
