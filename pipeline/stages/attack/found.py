"""What the stage `attack` found, as pages read it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.report.experiment import Experiment, file_names
from pipeline.stages.attack import results
from pipeline.stages.attack.results import FAILED, SUCCEEDED, Attacked
from pipeline.storage.manifest import Manifest, latest
from pipeline.storage.read_back import read_text
from pipeline.storage.store import StoreRef
from pipeline.storage.tables import read_rows

Rows = list[dict[str, str]]


@dataclass(frozen=True)
class Attacks:
    """One experiment on a network and a data set.

    Attributes
    ----------
    facts : what the manifest says. settings : the content of the id, as JSON.
    success, checks, units, moved, foretold : rows of the tables.
    folder, files : where the stores are.
    """

    dataset: str
    network: str
    experiment: str
    facts: Attacked
    settings: Mapping[str, Any]
    success: Rows
    checks: Rows
    units: Rows
    moved: Rows
    foretold: Rows
    folder: Path
    files: Mapping[str, tuple[int, int]]

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, in the order of the results."""
        return list(dict.fromkeys(one.attack for one in self.facts.reached))

    def overall(self, attack: str) -> dict[str, str]:
        """Return the row of all pairs together, or of the only one."""
        return [row for row in self.success if row["attack"] == attack][-1]

    def store(self, attack: str, group: str) -> StoreRef:
        """Return the attacked images of a pair."""
        return StoreRef.of_manifest(self.folder, f"{attack}.zarr/{group}", dict(self.files))

    def units_of(self, attack: str, group: str) -> StoreRef:
        """Return the units of a pair."""
        return StoreRef.of_manifest(self.folder, f"{attack}{results.UNITS}.zarr/{group}", dict(self.files))


def value(cell: str) -> float:
    """Return a number of a table; NaN for an empty cell."""
    return float(cell) if cell else math.nan


def read_attacks(results_folder: Path, dataset: str, network: str, experiment: str, id: str = "") -> Attacks:
    """Read an experiment without its images, verified.

    Raises
    ------
    MicrotomeError
        If there is none that finished, or a table is not what the stage writes.
    """
    folder = results_folder / dataset / network / "attacks" / experiment
    try:
        done = folder / "done"
        manifest = Manifest.read(done / f"attack.{id}.json") if id else latest(done, "attack")
        if manifest is None:
            raise FileNotFoundError(f"no manifest in {done}")
        facts = Attacked.read(manifest.result)
        told: dict[str, Rows] = {}
        for name in (results.TABLE, results.CHECKS_TABLE, *results.OF_UNITS):
            if name in results.OF_UNITS and facts.layer is None:
                told[name] = []
                continue
            with read_text(folder / name) as stream:
                told[name] = list(read_rows(stream))
        return Attacks(
            dataset,
            network,
            experiment,
            facts,
            manifest.settings,
            success=told[results.TABLE],
            checks=told[results.CHECKS_TABLE],
            units=told[results.UNITS_TABLE],
            moved=told[results.MOVED_TABLE],
            foretold=told[results.PREDICTED_TABLE],
            folder=folder,
            files=manifest.files,
        )
    except (FileNotFoundError, KeyError, IndexError, ValueError) as error:
        raise MicrotomeError(f"{folder} is not what the stage `attack` writes ({error}): run `make verify`") from error


def by_step(one: Attacks, attack: str) -> np.ndarray:
    """Return the share of attacked images for which some point succeeded by each step, before rounding, (step,)."""
    first, attacked = [], 0
    for reached in one.facts.reached:
        if reached.attack == attack:
            store = one.store(attack, reached.group)
            own = results.whole(store, "state") >= FAILED
            first.append(results.whole(store, "first_step")[own])
            attacked += int(own.sum())
    steps = np.concatenate(first) if first else np.zeros(0, np.int64)
    count = int(steps.max(initial=0)) + 1
    return np.bincount(steps[steps >= 0], minlength=count).cumsum() / max(1, attacked)


def shown_images(one: Attacks, attack: str, group: str, count: int) -> Sequence[int]:
    """Return slots of images of a pair, those that succeeded first, ascending within."""
    state = results.whole(one.store(attack, group), "state")
    return [*np.flatnonzero(state == SUCCEEDED), *np.flatnonzero(state == FAILED)][:count]


# In a report ----------------------------------------------------------------------------------------------------------


def attacks(experiment: Experiment) -> dict[tuple[str, str], list[Attacks]]:
    """Return the experiments of each data set and network, in configuration order."""
    return experiment.once(_attacks)


def _attacks(experiment: Experiment) -> dict[tuple[str, str], list[Attacks]]:
    found: dict[tuple[str, str], list[Attacks]] = {}
    for one in experiment.of_stage("attack"):
        key = str(one.dataset), str(one.network)
        found.setdefault(key, []).append(read_attacks(experiment.results, *key, str(one.experiment), one.id))
    return found


def page_of(experiment: Experiment, dataset: str, network: str) -> str:
    """Return the file of the page of a network's attacks."""
    return f"attacks-{file_names(attacks(experiment))[dataset, network]}.html"
