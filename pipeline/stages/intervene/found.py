"""What the stage `intervene` found, as its page reads it."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Experiment
from pipeline.stages.intervene.results import OUTCOMES, Intervened
from pipeline.stages.intervene.settings import Settings
from pipeline.storage.manifest import Manifest
from pipeline.storage.read_back import read_text
from pipeline.storage.store import StoreRef

Interval = tuple[float, float, float]
"""A value with the ends of its 95 % interval."""


@dataclass(frozen=True)
class Row:
    """One trial, or the random sets of one size: what was done, and what came of it."""

    what: str
    rank: str
    replace: str
    k: int
    at: str
    outcomes: dict[str, Interval]

    @property
    def key(self) -> tuple[str, str, str, int, str]:
        return self.what, self.rank, self.replace, self.k, self.at


@dataclass(frozen=True)
class Area:
    """The change of one concept's area by one trial, relative to its area before; `share` of the pictures before."""

    row: tuple[str, str, str, int, str]
    category: str
    concept: str
    share: float
    change: Interval


@dataclass(frozen=True)
class Interventions:
    """One experiment on a generator and a data set of its images."""

    dataset: str
    network: str
    experiment: str
    settings: Settings
    facts: Intervened
    rows: list[Row]
    areas: list[Area]
    trials: StoreRef

    def row(self, what: str, **named: object) -> Row | None:
        """Return the first row of a kind with these properties."""
        fits = (each for each in self.rows if each.what == what)
        return next((each for each in fits if all(getattr(each, key) == value for key, value in named.items())), None)

    def curve(self, what: str, rank: str = "", replace: str = "") -> list[Row]:
        """Return the rows of a kind by rising number of units."""
        found = [each for each in self.rows if each.what == what and (each.rank, each.replace) == (rank, replace)]
        return sorted(found, key=lambda each: each.k)


def read_interventions(results: Path, dataset: str, network: str, experiment: str, id: str) -> Interventions:
    """Read an experiment without its pictures.

    Raises
    ------
    MicrotomeError
        If its files are not what the stage writes.
    """
    folder = results / dataset / network / "interventions" / experiment
    try:
        manifest = Manifest.read(folder / "done" / f"intervene.{id}.json")
        rows = [
            Row(*_trial(each), outcomes={name: _interval(each, name) for name in OUTCOMES})
            for each in _table(folder / "interventions.csv")
        ]
        areas = [
            Area(_trial(each), each["category"], each["concept"], _float(each["share"]), _interval(each, "change"))
            for each in _table(folder / "interventions-areas.csv")
        ]
        settings = Settings.read({name: manifest.settings[name] for name in Settings.model_fields})
        store = StoreRef.of_manifest(folder, "trials.zarr", manifest.files)
    except (FileNotFoundError, KeyError, ValueError) as error:
        raise MicrotomeError(
            f"{folder} is not what the stage `intervene` writes ({error}): run `make verify`"
        ) from error
    return Interventions(dataset, network, experiment, settings, Intervened.read(manifest.result), rows, areas, store)


def _table(file: Path) -> list[dict[str, str]]:
    with read_text(file) as stream:
        return list(csv.DictReader(stream))


def _trial(row: dict[str, str]) -> tuple[str, str, str, int, str]:
    return row["what"], row["rank"], row["replace"], int(row["k"] or 0), row["at"]


def _float(cell: str) -> float:
    return float(cell) if cell else math.nan


def _interval(row: dict[str, str], name: str) -> Interval:
    return _float(row[name]), _float(row[f"{name}_low"]), _float(row[f"{name}_high"])


def interventions(experiment: Experiment) -> list[Interventions]:
    """Return all experiments of a configuration, in its order."""
    return experiment.once(_interventions)


def _interventions(experiment: Experiment) -> list[Interventions]:
    return [
        read_interventions(experiment.results, str(one.dataset), str(one.network), str(one.experiment), one.id)
        for one in experiment.of_stage("intervene")
    ]
