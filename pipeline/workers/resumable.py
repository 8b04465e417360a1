"""The resumable loop over parts of stores: parts in a ledger are done, the others become tasks.

A part is usually a shard. One task computes it for every store that lacks it, and each store's ledger records it as
soon as its files are in place. An interrupted run resumes after the last recorded part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.storage.manifest import Files
from pipeline.storage.store import Ledger
from pipeline.workers.tasks import run_tasks, workers_of


@dataclass(frozen=True)
class Done:
    """The result of a task: the files of a part that it wrote, by store, and facts for the ledger entries.

    `facts` go into every entry, `own` into those of single stores.
    """

    part: str
    files: Mapping[str, Files]
    facts: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Parts:
    """A store with the id of each of its parts, the digest of the part's inputs.

    If stores with several kinds of parts share a ledger, `suffix` keeps their keys apart.
    """

    def __init__(self, store: Path, ids: Mapping[str, str], ledger: Ledger | None = None, suffix: str = "") -> None:
        self.store, self.ids, self.suffix = store, ids, suffix
        self.ledger = Ledger(store.with_suffix(".ledger")) if ledger is None else ledger

    def missing(self) -> list[str]:
        """Return the parts that the store lacks or that are stale."""
        return [part for part, id in self.ids.items() if self.ledger.get(part + self.suffix, id, self.store) is None]

    def record(self, part: str, files: Files, **facts: Any) -> None:
        self.ledger.record(part + self.suffix, self.ids[part], files, **facts)

    def files(self) -> Files:
        """Return all chunk files of the parts with size and crc32c."""
        return self.ledger.files(part + self.suffix for part in self.ids)

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return the ledger's entry of each part."""
        return {part: self.ledger.entries[part + self.suffix] for part in self.ids}


def lacking(stores: Mapping[str, Parts]) -> dict[str, list[str]]:
    """Return the parts that some store lacks, in order, each with the names of these stores."""
    found: dict[str, list[str]] = {part: [] for parts in stores.values() for part in parts.ids}
    for name, parts in stores.items():
        for part in parts.missing():
            found[part].append(name)
    return {part: names for part, names in found.items() if names}


def resumed(
    client: Any,
    task: Callable[..., Done],
    stores: Mapping[str, Parts],
    arguments: Callable[[str, list[str]], tuple],
    label: str,
    remedy: str = "lower `shard_images` of the data set",
) -> set[str]:
    """Compute and record every part that some store lacks; return the parts computed now.

    Parameters
    ----------
    task : runs on a worker with `arguments(part, names)`, where `names` are the stores that lack the part.
    remedy : what to lower if memory runs out.
    """
    left = lacking(stores)
    tasks = (arguments(part, names) for part, names in left.items())
    for done in run_tasks(client, task, tasks, len(left), label, remedy):
        _record(done, stores)
    return set(left)


def resumed_in_groups(
    client: Any,
    task: Callable[..., Sequence[Done]],
    stores: Mapping[str, Parts],
    arguments: Callable[[list[str], list[str]], tuple],
    sizes: Mapping[str, int],
    batch: int,
    label: str,
    remedy: str,
) -> set[str]:
    """Do the same with tasks of several parts, where parts of few images would leave batches almost empty.

    Parameters
    ----------
    task : returns what became of each part, in the stores that have it. Which parts it gets together shows in no
        result.
    sizes : images of each part. batch : images of a task, unless workers would be left without any.
    """
    left = lacking(stores)
    full = min(batch, math.ceil(sum(sizes[part] for part in left) / workers_of(client)))
    having = {part: [name for name, parts in stores.items() if part in parts.ids] for part in left}
    groups = list(grouped(left, sizes, full, having))
    for several in run_tasks(client, task, (arguments(*group) for group in groups), len(groups), label, remedy):
        for done in several:
            _record(done, stores)
    return set(left)


def grouped(
    left: Mapping[str, list[str]], sizes: Mapping[str, int], full: int, having: Mapping[str, Sequence[str]]
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield parts in order, as many as make `full` images, with the stores that lack them.

    A store lacks all parts of a group that it has, or none of them. `having` are the stores that have each part.
    """
    group: list[str] = []
    wanted: dict[str, None] = {}
    done: set[str] = set()
    for part, names in left.items():
        there = set(having[part]).difference(names)
        if group and (sum(sizes[each] for each in group) >= full or done.intersection(names) or there & wanted.keys()):
            yield group, list(wanted)
            group, wanted, done = [], {}, set()
        group.append(part)
        wanted |= dict.fromkeys(names)
        done |= there
    if group:
        yield group, list(wanted)


def _record(done: Done, stores: Mapping[str, Parts]) -> None:
    for name, files in done.files.items():
        stores[name].record(done.part, files, **done.facts, **done.own.get(name, {}))
