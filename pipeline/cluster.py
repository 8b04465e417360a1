"""Dask workers for the stages: one client, one context manager, one thread a worker.

A run of the workflow starts one pool of workers (`python -m pipeline.cluster`), which serves all its jobs one after the
other, so that torch is imported once and not once a job. A stage used without Snakemake starts its own pool. The pool
holds a pipe to the process that started it: when that process is gone, however it went, the pipe closes and the pool
ends within a second, workers included.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline import processes
from pipeline.config import Cluster
from pipeline.errors import MicrotomeError

ADDRESS = "MICROTOME_POOL"  # environment variable: the file that holds the pool's address
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

WORKER_BASE = 600 << 20  # bytes of a worker that has imported torch and the kernels
STARTS = 3  # of the workers, before the pool is given up
ALONE = 60  # seconds without any worker after which the pool gives up
DEATHS = 10  # of workers, after which the task that each was computing is at fault

# Dask has workers give freed memory back to the system at once; torch takes it again in every step, and a training
# costs twice the CPU time (26.9 s against 13.0 s for 60 steps of the demo's ViT).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}


@contextlib.contextmanager
def client(cluster: Cluster, scratch: Path) -> Iterator[Any]:
    """Yield a `distributed.Client` on the run's pool, or on a pool of its own where there is none.

    `scratch` is a folder for the pool's address file and the workers' local files.

    Raises
    ------
    MicrotomeError
        When the pool is gone, from the start or later.
    """
    from distributed import Client
    from distributed.client import FutureCancelledError
    from distributed.utils import silence_logging_cmgr

    check_memory(cluster, 0, "Python with torch alone", "there is less than that for a worker: use a larger machine")
    with contextlib.ExitStack() as stack:
        address_file = (
            Path(os.environ[ADDRESS]) if ADDRESS in os.environ else stack.enter_context(pool(cluster, scratch))
        )
        address = _wait_for(address_file)
        # A lost connection is told once, by the error below, and not by everything that notices.
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        found = None
        try:
            found = stack.enter_context(Client(address, timeout=60, set_as_default=False))
            found.wait_for_workers(1, timeout=120)
            yield found
        except MicrotomeError:
            raise
        except Exception as error:  # each call on a client without a scheduler fails in its own way
            if found is not None and found.status == "running" and not isinstance(error, FutureCancelledError):
                raise
            why = "ended from outside, or for lack of memory"
            with contextlib.suppress(OSError, ValueError):
                why = json.loads(address_file.read_text()).get("error", why)
            raise MicrotomeError(
                f"the pool of workers at {address} is gone: {why}; finished shards are kept, run again to go on"
            ) from error


@contextlib.contextmanager
def pool(cluster: Cluster, scratch: Path) -> Iterator[Path]:
    """Start a pool in a process of its own; yield the file that will hold its address; end it on leaving."""
    process, address_file = start_pool(cluster, scratch)
    try:
        yield address_file
    finally:
        stop_pool(process)


def start_pool(cluster: Cluster, scratch: Path) -> tuple[subprocess.Popen, Path]:
    """Start a pool without waiting for it. Closing the process's stdin, or dying, ends it."""
    scratch.mkdir(parents=True, exist_ok=True)
    address_file = scratch / f"pool-{os.getpid()}-{time.time_ns()}.json"
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cluster", str(address_file), cluster.model_dump_json()],
        stdin=subprocess.PIPE,
        env=os.environ
        | THREADS
        | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            # The pool ends at once when it is not needed; what it leaves the operating system clears.
            "PYTHONWARNINGS": "ignore:resource_tracker",
        },
        # Ctrl-C in the terminal reaches the stages; the pool ends when they have closed their clients.
        start_new_session=True,
    )
    # Until the pool says where it is, its file says who it is.
    with contextlib.suppress(FileExistsError), address_file.open("x") as file:
        json.dump({"pid": process.pid}, file)
    return process, address_file


def stop_pool(process: subprocess.Popen) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def clear(scratch: Path) -> None:
    """Remove what pools that were killed left behind; none may be running."""
    for file in scratch.glob("pool-*.json"):
        file.unlink(missing_ok=True)
    shutil.rmtree(scratch / "dask", ignore_errors=True)


def _wait_for(address_file: Path, seconds: float = 120) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(address_file.read_text())
            if "error" in found:
                raise MicrotomeError(f"the pool of workers did not start: {found['error']}")
            if not processes.lives(found["pid"]):
                raise MicrotomeError("the pool of workers has ended: run again to go on")
            if "address" in found:
                return found["address"]
        time.sleep(0.02)
    raise MicrotomeError(f"the pool of workers did not start within {seconds:.0f} s (no {address_file})")


def workers(cluster: Cluster) -> int:
    """Return how many workers the pool has: as configured, else one a GPU or one a core."""
    if cluster.workers is not None:
        return cluster.workers
    if cluster.kind == "gpu":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible:
            return len(visible.split(","))
        import torch

        if not torch.cuda.is_available():
            raise MicrotomeError("cluster.kind is gpu, but torch sees no GPU: use `kind: local`")
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def memory(cluster: Cluster) -> int:
    """Return how many bytes a worker may use: as configured, else its share of the machine's memory."""
    if cluster.memory is not None:
        from dask.utils import parse_bytes

        return int(parse_bytes(cluster.memory))
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT) // workers(cluster)


def check_memory(cluster: Cluster, need: float, what: str, remedy: str) -> None:
    """Refuse tasks that need `need` bytes of a worker beside what every worker takes, if it may not use so many.

    Raises
    ------
    MicrotomeError
        With both figures and the remedy; before anything is computed.
    """
    allowed = memory(cluster)
    if WORKER_BASE + need > allowed:
        raise MicrotomeError(
            f"{what} needs about {(WORKER_BASE + need) / 1e9:.2f} GB a worker, and a worker may use "
            f"{allowed / 1e9:.2f} GB: {remedy}, or raise `cluster.memory`, or lower `cluster.workers`"
        )


def serve(address_file: Path, cluster: Cluster) -> None:
    """Run the pool until stdin closes."""
    import dask
    from distributed import Nanny, Scheduler, SpecCluster

    count = workers(cluster)
    dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": THREADS | ALLOCATOR,
            "distributed.worker.memory.target": False,
            "distributed.worker.memory.spill": False,
            # A paused worker would wait for memory that its own task holds; beyond the limit it is ended and restarted.
            "distributed.worker.memory.pause": False,
            "distributed.scheduler.allowed-failures": DEATHS,
            "distributed.admin.low-level-log-length": 0,
            "distributed.comm.timeouts.connect": "60s",
        }
    )
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    options = {
        "nthreads": 1,
        "host": "127.0.0.1",
        "local_directory": str(address_file.parent / "dask"),
        "memory_limit": memory(cluster),
        "silence_logs": 50,  # a task's error is raised where its result is wanted
        "dashboard": False,
    }
    nannies = {
        index: {
            "cls": Nanny,
            "options": options | {"env": {"CUDA_VISIBLE_DEVICES": devices[index] if cluster.kind == "gpu" else ""}},
        }
        for index in range(count)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": "127.0.0.1",
            "dashboard": cluster.dashboard,
            "dashboard_address": "127.0.0.1:8787" if cluster.dashboard else "127.0.0.1:0",
        },
    }
    from pipeline.manifest import write_atomically

    for attempt in range(STARTS):
        try:
            local = SpecCluster(workers=copy.deepcopy(nannies), scheduler=copy.deepcopy(scheduler), silence_logs=50)
            break
        except (OSError, RuntimeError) as error:  # a worker that is killed while it starts takes the others with it
            if attempt == STARTS - 1:
                write_atomically(address_file, json.dumps({"error": f"{error} {error.__cause__ or ''}".strip()}))
                os._exit(1)
    found = {"address": local.scheduler_address, "pid": os.getpid()}
    write_atomically(address_file, json.dumps(found))
    asked_to_end = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        asked_to_end.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    seen = time.monotonic()
    while not asked_to_end.wait(1):
        # One whose restart failed is started anew, which by itself Dask does not.
        local.scale(count)
        if local.scheduler is None or local.scheduler.workers:
            seen = time.monotonic()
        elif time.monotonic() - seen > ALONE:
            why = f"its {count} workers ended, and none has lived for {ALONE} s"
            write_atomically(address_file, json.dumps(found | {"error": why}))
            os._exit(1)
    address_file.unlink(missing_ok=True)
    # Closing in good order removes the workers' folders. If it hangs, the pool still goes, and the workers with it.
    threading.Timer(3, lambda: os._exit(0)).start()
    with contextlib.suppress(TimeoutError):
        local.close(timeout=2)
    os._exit(0)


def run_tasks(
    client: Any,
    function: Callable[..., Any],
    tasks: Iterable[tuple],
    total: int,
    label: str,
    remedy: str = "lower `shard_images` of the data set",
) -> Iterator[Any]:
    """Run `function(*task)` for every task on the workers and yield the results as they come, in any order.

    Only a few tasks a worker are in flight at a time, so neither the scheduler nor the results pile up. A task whose
    worker dies is given to another one. The first error cancels what is left and is raised here; where memory lacked,
    `remedy` says what to lower.
    """
    from distributed import KilledWorker, as_completed

    tasks = iter(tasks)
    bar = Progress(label, total)
    queue: Any = as_completed(loop=client.loop)
    pending = 0

    def submit() -> int:
        task = next(tasks, None)
        if task is None:
            return 0
        queue.add(client.submit(function, *task, pure=False))
        return 1

    try:
        while True:
            # Counted each time: the first tasks of a run begin when one worker is there, and others join.
            pending += sum(submit() for _ in range(4 * workers_of(client) - pending))
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


def _lacks_memory(error: Exception) -> bool:
    """Whether numpy or torch could not allocate: torch's allocator on the CPU has no exception of its own."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def device() -> str:
    """On a worker: `cuda` when it was given a GPU, else `cpu`; torch is not imported to find out."""
    return "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"


def workers_of(client: Any) -> int:
    """How many workers a client has, at least 1; a client whose pool is gone does not know of any."""
    return max(1, len(client.scheduler_info(n_workers=-1).get("workers", ())))


class Progress:
    """A progress line on stderr: redrawn in a terminal, a few lines elsewhere."""

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


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Cluster.model_validate_json(sys.argv[2]))
