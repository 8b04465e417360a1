"""What workers do for the stage `audit`: put the explanations of one shard to every test that lacks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import Model
from pipeline.networks.gradients import Logit
from pipeline.stages.attribute.explaining import seed_of
from pipeline.stages.attribute.inputs import Shard
from pipeline.stages.attribute.options import METHODS
from pipeline.stages.attribute.work import Work
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
    cells : by key. chosen : by test and shard, which of the shard's explained images are audited.
    dataset : the configuration of the data set, as JSON. models : the audit's networks on it, by name.
    untrained : the description of the untrained control. categories : of label maps, where a test reads them.
    given : what `Test.prepare` made, by test. measures : the arrays of its cells, by test.
    """

    work: Work
    tests: Mapping[str, TestOptions]
    cells: Mapping[str, Cell]
    chosen: Mapping[str, Mapping[str, Sequence[int]]]
    dataset: Mapping[str, Any]
    split: str
    class_names: Sequence[str]
    models: Mapping[str, Model]
    untrained: Network | None = None
    categories: Mapping[str, Category] | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Mapping[str, Measure]] = field(default_factory=dict)


@dataclass(frozen=True)
class Read:
    """The stores that a shard is read from: images, label maps, maps of methods, and by layer relevance of units."""

    images: StoreRef
    concepts: StoreRef | None
    maps: Mapping[str, StoreRef]
    units: Mapping[str, Mapping[str, StoreRef]]


def audit_shard(auditing: Auditing, stores: Read, shard: Shard, keys: Sequence[str]) -> Done:
    """Audit the explanations of one shard, and write the shard of each of these cells. Runs on a worker.

    A method that refuses a test has a cell of NaN, and the entry of its
    ledger says why.
    """
    start, stop = shard.bounds
    whole = torch.from_numpy(stores.images.open()["image"][start:stop])
    read = {name: _stored(auditing.work, name, stores, shard) for name in stores.maps}
    shared: dict[tuple[int, ...], Shared] = {}
    files: dict[str, Files] = {}
    own: dict[str, dict[str, Any]] = {}
    for key in keys:
        cell = auditing.cells[key]
        rows = tuple(auditing.chosen[cell.test][shard.part])
        if rows not in shared:
            shared[rows] = _shared(auditing, whole, stores.concepts, shard, rows, read)
        options, arrays = auditing.tests[cell.test], _blank(auditing, cell.test, stop - start)
        places = [shard.places[row] for row in rows]
        try:
            with computing:
                found = FUNCTIONS[cell.test](_batch(shared[rows], cell.name, read, rows), options)
        except MicrotomeError as error:
            own[key] = {"refused": str(error)}
        else:
            for name, values in arrays.items():
                values[places] = found[name]
        files[key] = write(cell.store, {name: ((start, *[0] * (v.ndim - 1)), v) for name, v in arrays.items()})
    return Done(shard.part, files, own=own)


def _stored(work: Work, name: str, stores: Read, shard: Shard) -> dict[str, np.ndarray]:
    """Return what the stores of a method have of a shard's explained images: of several classes, the first.

    The relevance of a layer's units, (image, unit), is called `relevance.<layer>`.
    """
    reader, (start, stop) = stores.maps[name].open(), shard.bounds
    arrays = {array: reader[array] for array in (MAP, "target", "score", "residual")}
    arrays |= {array: reader[array] for array in METHODS[work.methods[name].kind].facts}
    for layer, store in stores.units.get(name, {}).items():
        arrays[f"relevance.{layer}"] = store.open()["relevance"]
    found = {}
    for array, stored in arrays.items():
        values = np.asarray(stored[start:stop])[list(shard.places)]
        found[array] = values[:, 0] if work.targets.kind == "top" else values
    return found


def _shared(
    auditing: Auditing,
    whole: torch.Tensor,
    concepts: StoreRef | None,
    shard: Shard,
    rows: Sequence[int],
    read: Mapping[str, Mapping[str, np.ndarray]],
) -> Shared:
    work, places = auditing.work, [shard.places[row] for row in rows]
    classes = torch.from_numpy(next(iter(read.values()))["target"][list(rows)])
    targets, against = work.targets, None
    if len(targets.classes) > 1:
        against = torch.full_like(classes, targets.classes[1])
    ids = [shard.image_ids[row] for row in rows]
    return Shared(
        work,
        whole[places],
        np.array([shard.labels[row] for row in rows]),
        np.array(places) + shard.bounds[0],
        ids,
        [seed_of(each) for each in ids],
        Logit(classes, against, targets.link, work.explainable.normalised == "softmax"),
        auditing.dataset,
        auditing.split,
        auditing.class_names,
        auditing.models,
        auditing.untrained,
        None if concepts is None or auditing.categories is None else (concepts, auditing.categories),
        auditing.given,
    )


def _batch(shared: Shared, name: Name, read: Mapping[str, Mapping[str, np.ndarray]], rows: Sequence[int]) -> Batch:
    if not name.control:
        stored = {array: values[list(rows)] for array, values in read[name.name].items()}
        return Batch(shared, name.name, "", stored.pop(MAP), stored)
    batch = Batch(shared, name.name, name.name)
    if name.name not in CONTROLS:
        return batch
    return batch.of(name.name, name.name, CONTROLS[name.name](batch), {})


def _blank(auditing: Auditing, test: str, images: int) -> dict[str, np.ndarray]:
    return {name: np.full((images, *measure.shape), np.nan) for name, measure in auditing.measures[test].items()}
