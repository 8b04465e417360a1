"""What the stage `audit` found, as the report reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.stages.attribute.options import METHODS
from pipeline.stages.audit.axioms import FUNCTIONS_ROW
from pipeline.stages.audit.declared import TestOptions
from pipeline.stages.audit.options import TESTS
from pipeline.stages.audit.results import COLUMNS, CONCEPT_COLUMNS, CONCEPTS, Audited, Outcome, Row, Shares
from pipeline.storage.read_back import read_text
from pipeline.storage.tables import read_rows


@dataclass(frozen=True)
class Audit:
    """One audit: all rows of its table.

    Attributes
    ----------
    facts : what the manifest says. tests : options of each test by name.
    concepts : the rows of its table of concepts; none without the test `ablation`.
    """

    name: str
    facts: Audited
    tests: Mapping[str, TestOptions]
    rows: list[Row]
    concepts: list[Shares]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(data set, network), in their order."""
        return [(dataset, network) for dataset, network in self.facts.pairs]

    @cached_property
    def titles(self) -> dict[str, str]:
        """The methods' names for readers, with their names in the configuration where two are alike."""
        plain = {name: METHODS[kind].title for name, kind in self.facts.methods.items()}
        many = list(plain.values())
        return {name: f"{title} ({name})" if many.count(title) > 1 else title for name, title in plain.items()}

    def told(self, dataset: str, network: str, test: str) -> dict[str, dict[str, Outcome]]:
        """Return the outcomes of a test on a network, of methods and then of controls."""
        found: dict[str, dict[str, Outcome]] = {}
        for row in self.of(dataset, network, test):
            found.setdefault(row.method, {})[row.outcome.measure] = row.outcome
        return found

    def of(self, dataset: str, network: str, test: str) -> list[Row]:
        """Return the rows of a test on a network."""
        wanted = dataset, network, test
        return [row for row in self.rows if (row.dataset, row.network, row.test) == wanted]

    def laws(self) -> list[tuple[str, str]]:
        """Return what the laws were measured on: small functions, and each network; (data set, network)."""
        every = [("", FUNCTIONS_ROW), *self.pairs]
        return [pair for pair in every if any(self.of(*pair, "axioms"))]


def read_audit(results: Path, name: str, told: Mapping[str, Any], settings: Mapping[str, Any]) -> Audit:
    """Read the tables of an audit, verified.

    Parameters
    ----------
    told : what its manifest says. settings : the options of its tests by name.

    Raises
    ------
    MicrotomeError
        A table is not what the stage writes.
    """
    folder = results / "audit" / name
    file, concepts = folder / "audit.csv", list[Shares]()
    try:
        facts = Audited.read(told)
        tests = {test: TESTS[test].options.model_validate(settings[test]) for test in facts.tests}
        with read_text(file) as stream:
            rows = list(rows_of(read_rows(stream)))
        if "ablation" in tests:
            file = folder / CONCEPTS
            with read_text(file) as stream:
                concepts = list(shares_of(read_rows(stream)))
    except (KeyError, ValueError) as error:
        raise MicrotomeError(f"{file} is not what the stage `audit` writes ({error}): run `make verify`") from error
    return Audit(name, facts, tests, rows, concepts)


def rows_of(lines: Iterable[Mapping[str, str]]) -> Iterable[Row]:
    """Yield the rows of audit.csv."""
    for line in lines:
        if missing := set(COLUMNS) - set(line):
            raise ValueError(f"no column {sorted(missing)[0]}")
        value, low, high, control, forwards = (
            float(line[key]) if line[key] else math.nan for key in ("value", "low", "high", "control", "forwards")
        )
        outcome = Outcome(line["measure"], value, low, high, int(line["images"]), line["state"], line["note"])  # type: ignore[arg-type]
        named = line["dataset"], line["network"], line["method"], line["kind"], line["test"]
        yield Row(*named, outcome, control, forwards)


def shares_of(lines: Iterable[Mapping[str, str]]) -> Iterable[Shares]:
    """Yield what audit-concepts.csv says of each class."""

    def named(line: Mapping[str, str]) -> list[str]:
        return [line[key] for key in CONCEPT_COLUMNS[:5]]

    for (dataset, network, method, layer, of_class), several in groupby(lines, named):
        told = {line["concept"]: (float(line["relevance"]), float(line["loss"])) for line in several}
        relevance, loss = ({concept: each[at] for concept, each in told.items()} for at in range(2))
        yield Shares(dataset, network, method, layer, of_class, relevance, loss)
