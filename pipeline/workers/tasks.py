"""Tasks on Dask workers: submission, cancellation, out-of-memory errors and a progress line."""

import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, TypeVar

from pipeline.errors import MicrotomeError

Result = TypeVar("Result")

REFRESH = 1.0  # seconds between two counts of the workers: the answer grows with their number


IN_FLIGHT = 4  # tasks per worker that are submitted at a time


def run_tasks(
    client: Any,
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    total: int,
    label: str,
    remedy: str = "lower `shard_images` of the data set",
) -> Iterator[Any]:
    """Run `function(*task)` for every task on the workers and yield the results as they arrive, in any order.

    Only a few tasks per worker are in flight at a time, so neither the scheduler nor the results pile up. If a worker
    dies, another one takes over its task. The first error cancels the remaining tasks and is raised here. If memory ran
    out, `remedy` says what to lower.
    """
    from distributed import KilledWorker, as_completed

    tasks = iter(tasks)
    bar = Progress(label, total)
    queue: Any = as_completed(loop=client.loop)
    pending, room, asked = 0, 0, -math.inf

    def submit() -> int:
        task = next(tasks, None)
        if task is None:
            return 0
        if function in OVERLAPPING:
            queue.add(client.submit(function, *task, pure=False))
        else:
            queue.add(client.submit(alone, function, *task, pure=False))
        return 1

    try:
        while True:
            # Count repeatedly: the first tasks of a run start once one worker is there, and others join later.
            if time.monotonic() - asked > REFRESH:
                asked, room = time.monotonic(), IN_FLIGHT * workers_of(client)
            pending += sum(submit() for _ in range(room - pending))
            if not pending:
                break
            future = next(queue)
            try:
                result = future.result()
            except KilledWorker as error:
                raise MicrotomeError(
                    f"{label}: of {error.allowed_failures + 1} workers each died while computing one task: it needs "
                    f"more memory than a worker may use ({remedy}, or raise `cluster.memory`), or native code crashes"
                ) from None
            except Exception as error:
                if not _lacks_memory(error):
                    raise
                raise MicrotomeError(
                    f"{label}: out of memory ({error}): {remedy}, or lower `cluster.workers`"
                ) from error
            future.release()
            pending -= 1
            bar.step()
            yield result
    finally:
        bar.close()
        for future in list(queue.futures):
            future.cancel()


computing = threading.RLock()
"""The lock of a worker's device: a thread holds it while it computes, since networks, with their hooks, are shared."""


def run_in_order(client: Any, function: Callable[..., Result], tasks: Iterable[tuple], label: str) -> list[Result]:
    """Run `function(*task)` for every task on the workers; return the results in the order of the tasks.

    Whoever joins them, or adds up floats, gets the same bits whichever task ends first.
    """
    numbered = [(number, function, *task) for number, task in enumerate(tasks)]
    made = sorted(run_tasks(client, _numbered, numbered, len(numbered), label), key=itemgetter(0))
    return [result for _, result in made]


def _numbered(number: int, function: Callable[..., Result], *task: object) -> tuple[int, Result]:
    return number, function(*task)


OVERLAPPING: set[Callable[..., Any]] = set()


def overlapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a task that takes `computing` itself, so that other tasks can read and write while it computes."""
    OVERLAPPING.add(function)
    return function


def alone(function: Callable[..., Any], *task: Any) -> Any:
    """Run a task on a worker while no other task computes."""
    with computing:
        return function(*task)


def _lacks_memory(error: Exception) -> bool:
    """Return whether numpy or torch failed to allocate; torch's CPU allocator has no exception of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def workers_of(client: Any) -> int:
    """Return how many workers a client has, at least 1: a client whose pool is gone knows of none."""
    return max(1, len(client.scheduler_info(n_workers=-1).get("workers", ())))


class Progress:
    """A progress line on stderr: redrawn in a terminal, printed every 10 s elsewhere."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.last = label, total, 0, -1
        self.start = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def step(self, count: int = 1) -> None:
        self.done += count
        now = time.monotonic()
        if now - self.shown > (0.2 if self.live else 10):
            self.shown = now
            self._show("\r" if self.live else "", "" if self.live else "\n")

    def close(self) -> None:
        if self.done and (self.live or self.last < self.done):
            self._show("\r" if self.live else "", "\n")

    def _show(self, head: str, tail: str) -> None:
        self.last = self.done
        spent = time.monotonic() - self.start
        sys.stderr.write(f"{head}  {self.label}: {self.done}/{self.total}, {spent:.0f} s{tail}")
        sys.stderr.flush()
