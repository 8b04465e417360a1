"""What workers do for the stage `audit`: put the explanations of some shards to every test that lacks them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.errors import DamagedError, MicrotomeError
from pipeline.networks.forward import Model
from pipeline.networks.gradients import Logit
from pipeline.stages.attribute.explaining import seed_of
from pipeline.stages.attribute.inputs import Shard
from pipeline.stages.attribute.options import METHODS
from pipeline.stages.attribute.tasks import Given
from pipeline.stages.attribute.work import Work
from pipeline.stages.audit import results
from pipeline.stages.audit.batch import Batch, Shared
from pipeline.stages.audit.controls import CONTROLS
from pipeline.stages.audit.declared import Measure, TestOptions
from pipeline.stages.audit.results import Cell, Name
from pipeline.stages.audit.trials.registry import FUNCTIONS
from pipeline.stages.concepts.results import Category
from pipeline.storage.manifest import Files
from pipeline.storage.store import StoreRef, write
from pipeline.workers.resumable import Done
from pipeline.workers.tasks import computing

MAP = "attribution"


@dataclass(frozen=True)
class Auditing:
    """What all shards of a network on a data set have in common.

    Attributes
    ----------
    work : of the explanations. tests : options by name.
    cells : by key.
    dataset : the configuration of the data set, as JSON. models : the audit's networks on it, by name.
    twin : the untrained control. categories : of label maps, where a test or a method reads them.
    given : what `Test.prepare` made, by test. measures : the arrays of its cells, by test.
    """

    work: Work
    tests: Mapping[str, TestOptions]
    cells: Mapping[str, Cell]
    dataset: Mapping[str, Any]
    split: str
    class_names: Sequence[str]
    models: Mapping[str, Model]
    twin: Model | None = None
    categories: Mapping[str, Category] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, Measure]] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """What a task reads of one shard: stores of images, label maps, maps, and relevance of units by layer.

    `rows` are, by test, those of the shard's explained images that are audited.
    """

    given: Given
    maps: Mapping[str, StoreRef]
    units: Mapping[str, Mapping[str, StoreRef]]
    rows: Mapping[str, Sequence[int]]

    @property
    def shard(self) -> Shard:
        return self.given.shard


Stored = Mapping[str, Mapping[str, np.ndarray]]
"""What the stores of each method have of a shard's explained images."""
Kept = dict[tuple[tuple[str, tuple[int, ...]], ...], Shared]
"""What all cells of the same images have in common, by their shards and rows."""


def audit_shards(auditing: Auditing, several: Sequence[Read], keys: Sequence[str]) -> list[Done]:
    """Audit the explanations of some shards, and write the shards of each of these cells. Runs on a worker.

    A shard of a method that refuses a test has NaN, and its entry of the ledger says why; so it does of parts of a test
    that the method refuses, by their names.
    """
    shared: Kept = {}
    files: dict[str, dict[str, Files]] = {each.shard.part: {} for each in several}
    refused: dict[str, dict[str, Any]] = {each.shard.part: {} for each in several}
    stored = [{name: _stored(auditing.work, name, each) for name in each.maps} for each in several]
    for key in keys:
        cell = auditing.cells[key]
        there = [(each, values) for each, values in zip(several, stored, strict=True) if cell.test in each.rows]
        for some, found, reasons in _measured(auditing, cell, there, shared):
            at = 0
            for each, _ in some:
                taken, part = each.rows[cell.test], each.shard.part
                own = slice(at, at := at + len(taken))
                if isinstance(found, str):
                    refused[part][key] = {"refused": found}
                elif reasons:
                    refused[part][key] = {"reasons": reasons}
                files[part][key] = _written(auditing, cell, each, taken, None if isinstance(found, str) else found, own)
    return [Done(part, of_part, own=refused[part]) for part, of_part in files.items()]


def _measured(
    auditing: Auditing, cell: Cell, there: Sequence[tuple[Read, Stored]], shared: Kept
) -> Iterator[tuple[Sequence[tuple[Read, Stored]], dict[str, np.ndarray] | str, dict[str, str]]]:
    """Yield shards with the numbers of all their images, or with the reason why the test is refused.

    Behind them are the reasons why parts of the test are, by their names.

    Of shards that are refused together each is put to the test by itself: what is refused is the same however shards
    are grouped. Damage is no refusal.
    """
    rows = [tuple(each.rows[cell.test]) for each, _ in there]
    chosen, stored = [each for each, _ in there], [values for _, values in there]
    same = tuple((each.shard.part, own) for each, own in zip(chosen, rows, strict=True))
    if same not in shared:
        shared[same] = _shared(auditing, chosen, rows, stored)
    found: dict[str, np.ndarray] | str
    reasons: dict[str, str] = {}
    try:
        with computing:
            batch = _batch(shared[same], cell.name, stored, rows, reasons)
            found = FUNCTIONS[cell.test](batch, auditing.tests[cell.test])
    except DamagedError:
        raise
    except MicrotomeError as error:
        if len(there) > 1:
            for each in there:
                yield from _measured(auditing, cell, [each], shared)
            return
        found = str(error)
    yield there, found, reasons


def _written(
    auditing: Auditing,
    cell: Cell,
    read: Read,
    rows: Sequence[int],
    found: Mapping[str, np.ndarray] | None,
    some: slice,
) -> Files:
    """Write a shard of a cell, of which `some` of what was found are the audited images."""
    (start, stop), measures, numbers = read.shard.bounds, auditing.measures[cell.test], {}
    for name, measure in measures.items():
        numbers[name] = np.full((stop - start, *measure.shape), np.nan)
        if found is not None:
            numbers[name][[read.shard.places[row] for row in rows]] = found[name][some]
    blocks = results.joined(measures, numbers)
    return write(cell.store, {array: ((start, *[0] * (values.ndim - 1)), values) for array, values in blocks.items()})


def _stored(work: Work, name: str, read: Read) -> dict[str, np.ndarray]:
    """Return what the stores of a method have of a shard's explained images: of several classes, the first.

    The relevance of a layer's units, (image, unit), is called `relevance.<layer>`.
    """
    reader, (start, stop) = read.maps[name].open(), read.shard.bounds
    arrays = {array: reader[array] for array in (MAP, "target", "score", "residual")}
    arrays |= {array: reader[array] for array in METHODS[work.methods[name].kind].facts}
    for layer, store in read.units.get(name, {}).items():
        arrays[f"relevance.{layer}"] = store.open()["relevance"]
    found = {}
    for array, stored in arrays.items():
        values = np.asarray(stored[start:stop])[list(read.shard.places)]
        found[array] = values[:, 0] if work.targets.kind == "top" else values
    return found


def _joined(several: Sequence[np.ndarray], rows: Sequence[Sequence[int]]) -> np.ndarray:
    return np.concatenate([values[list(own)] for values, own in zip(several, rows, strict=True)])


def _shared(
    auditing: Auditing,
    several: Sequence[Read],
    rows: Sequence[Sequence[int]],
    stored: Sequence[Stored],
) -> Shared:
    """Return what all cells of these images have in common."""
    work, shards = auditing.work, [each.shard for each in several]
    classes = torch.from_numpy(_joined([next(iter(each.values()))["target"] for each in stored], rows))
    targets, against = work.targets, None
    if len(targets.classes) > 1:
        against = torch.full_like(classes, targets.classes[1])
    ids = [shard.image_ids[row] for shard, own in zip(shards, rows, strict=True) for row in own]
    slots = [np.array(shard.places) + shard.bounds[0] for shard in shards]

    def read_labels(place: int) -> np.ndarray:
        return _joined([each.given.label_maps(place) for each in several], rows)

    return Shared(
        work,
        torch.from_numpy(_joined([each.given.pixels() for each in several], rows)),
        _joined([np.array(shard.labels) for shard in shards], rows),
        _joined(slots, rows),
        ids,
        [seed_of(each) for each in ids],
        Logit(classes, against, targets.link, work.explainable.normalised == "softmax"),
        auditing.dataset,
        auditing.split,
        auditing.class_names,
        auditing.models,
        auditing.twin,
        auditing.categories,
        read_labels,
        auditing.given,
    )


def _batch(
    shared: Shared,
    name: Name,
    stored: Sequence[Stored],
    rows: Sequence[Sequence[int]],
    reasons: dict[str, str],
) -> Batch:
    if not name.control:
        arrays = {array: _joined([each[name.name][array] for each in stored], rows) for array in stored[0][name.name]}
        return Batch(shared, name.name, "", arrays.pop(MAP), arrays, reasons)
    batch = Batch(shared, name.name, name.name, reasons=reasons)
    if name.name not in CONTROLS:
        return batch
    return batch.of(name.name, name.name, CONTROLS[name.name](batch), {})
