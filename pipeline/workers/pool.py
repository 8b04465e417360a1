"""Dask workers for the stages: one client, one context manager, one thread a worker.

A run of the workflow starts one pool of workers (`python -m pipeline.workers.pool`), which serves all its jobs one after the
other, so that torch is imported once and not once a job. A stage used without Snakemake starts its own pool. The pool
holds a pipe to the process that started it: when that process is gone, however it went, the pipe closes and the pool
ends within a second, workers included. With `kind: address` there is no pool: somebody else's scheduler is asked.
"""

import contextlib
import copy
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config.core import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import devices, processes, tls

ADDRESS = "MICROTOME_POOL"  # environment variable: the file that holds the pool's address
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

# A worker with a GPU reads, compresses and writes other shards while the GPU computes one. Numbers do not depend on it.
GPU_THREADS = 3

WORKER_BASE = 600 << 20  # bytes of a worker that has imported torch and the kernels
STARTS = 3  # of the workers, before the pool is given up
CONNECT = 60  # seconds to reach a scheduler
ALONE = 60  # seconds without any worker after which the pool gives up
REFRESH = 1.0  # seconds after which a client asks again how many workers there are: the answer grows with their number
IN_FLIGHT = 4  # tasks a worker that are submitted at a time
DEATHS = 10  # of workers, after which the task that each was computing is at fault

LEAVE = 2, 30  # seconds that a pool has to end in good order, of processes and of jobs of a queue

WORKER_SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    # A paused worker would wait for memory that its own task holds; beyond the limit it is ended and restarted.
    "distributed.worker.memory.pause": False,
}

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
        When the pool is gone, from the start or later; when a scheduler of others cannot be reached, or its workers
        would give other numbers.
    """
    from distributed import Client
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from distributed.utils import silence_logging_cmgr

    check_memory(cluster, 0, "Python with torch alone", "there is less than that for a worker: use a larger machine")
    with contextlib.ExitStack() as stack:
        address_file, security = None, None
        if cluster.address is not None:
            address, what = cluster.address, f"the scheduler at {cluster.address}"
            security = tls.security(cluster.tls.model_dump()) if cluster.tls else None
        else:
            address_file = (
                Path(os.environ[ADDRESS]) if ADDRESS in os.environ else stack.enter_context(pool(cluster, scratch))
            )
            started = _wait_for(address_file)
            address, what = started["address"], f"the pool of workers at {started['address']}"
            if "tls" in started:
                security = tls.security({key: str(address_file.parent / name) for key, name in started["tls"].items()})
        # A lost connection is told once, by the error below, and not by everything that notices.
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))
        found = None
        try:
            found = stack.enter_context(Client(address, timeout=CONNECT, set_as_default=False, security=security))
            found.wait_for_workers(1, timeout=60 * cluster.slurm.wait if cluster.kind == "slurm" else 120)
            if cluster.kind in ("address", "slurm"):
                _check_workers(found, cluster, what)
            yield found
        except MicrotomeError:
            raise
        except Exception as error:  # each call on a client without a scheduler fails in its own way
            # A connection that closes is noticed before the client itself says that it is closed.
            lost = isinstance(error, FutureCancelledError | CommClosedError)
            if found is not None and found.status == "running" and not lost:
                raise
            if found is None and address_file is None:
                raise MicrotomeError(f"{what} cannot be reached: {type(error).__name__}: {error}") from None
            why = "ended from outside, or for lack of memory"
            with contextlib.suppress(OSError, ValueError):
                if address_file is not None:
                    why = json.loads(address_file.read_text()).get("error", why)
            raise MicrotomeError(f"{what} is gone: {why}; finished shards are kept, run again to go on") from error


def _check_workers(client: Any, cluster: Cluster, what: str) -> None:
    """Refuse workers that this run did not start itself where they would give other numbers than it says.

    Raises `MicrotomeError` that names a worker and what is different there.
    """
    wanted = facts() | {"device": "cuda" if cluster.on_gpus else "cpu", "threads": 1}
    try:
        client.run_on_scheduler(code)
        there = client.run(facts)
    except ModuleNotFoundError as error:
        raise MicrotomeError(
            f"{what}: it, or its workers, cannot import this code ({error}): start both with PYTHONPATH, as "
            "docs/clusters.md says"
        ) from None
    known = client.scheduler_info(n_workers=-1)["workers"]
    for worker, said in there.items():
        said = said | {"threads": known.get(worker, {}).get("nthreads", 1)}
        for key, value in wanted.items():
            if key == "folder" and said[key] != value:
                raise MicrotomeError(
                    f"{what}: worker {worker} was started in {said[key]}, and this run in {value}: start it in "
                    "the same folder, since paths may be relative to it"
                )
            if said[key] != value:
                raise MicrotomeError(
                    f"{what}: worker {worker} has {key} {said[key]}, and this run {value}: its numbers would differ; "
                    "start it as docs/clusters.md says"
                )


def facts() -> dict[str, Any]:
    """On a worker, and here: what else decides the numbers that come from it, and where paths begin."""
    return {
        "code": code(),
        "device": device(),
        "torch": ".".join(version("torch").split(".")[:2]),
        "folder": str(Path.cwd()),
    }


@functools.cache
def code() -> str:
    """A digest of the code of stages and kernels, as it lies on the disk."""
    own = Path(__file__).parents[1]
    files = sorted(path for folder in (own, own.parent / "kernels") for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


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
        [sys.executable, "-m", "pipeline.workers.pool", str(address_file), cluster.model_dump_json()],
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
    tls.clear(scratch)


def _wait_for(address_file: Path, seconds: float = 120) -> dict[str, Any]:
    """What a pool says of itself: `address`, and where connections are encrypted the files of `tls`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(address_file.read_text())
            if "error" in found:
                raise MicrotomeError(f"the pool of workers did not start: {found['error']}")
            if not processes.lives(found["pid"]):
                raise MicrotomeError("the pool of workers has ended: run again to go on")
            if "address" in found:
                return found
        time.sleep(0.02)
    raise MicrotomeError(f"the pool of workers did not start within {seconds:.0f} s (no {address_file})")


def workers(cluster: Cluster) -> int:
    """Return how many workers there are, as configured, else one a GPU or one a core.

    One where that is not known from here: those of an address, or GPUs of other machines than this one.
    """
    if cluster.workers is not None:
        return cluster.workers
    if cluster.kind == "gpu":
        return max(1, len(devices.gpus()))
    return 1 if cluster.kind == "address" else devices.cores()


def threads(cluster: Cluster) -> int:
    """Return how many tasks a worker has at a time."""
    return GPU_THREADS if cluster.kind == "gpu" else 1


def memory(cluster: Cluster) -> int:
    """Return how many bytes a worker may use: as configured, else its share of the machine's memory."""
    if cluster.memory is not None:
        from dask.utils import parse_bytes

        return int(parse_bytes(cluster.memory))
    return devices.memory() // workers(cluster)


def check_memory(cluster: Cluster, need: float, what: str, remedy: str) -> None:
    """Refuse tasks that need `need` bytes each beside what every worker takes, if a worker may not use so many.

    Raises
    ------
    MicrotomeError
        With both figures and the remedy; before anything is computed.
    """
    allowed, need = memory(cluster), threads(cluster) * need
    if WORKER_BASE + need > allowed:
        raise MicrotomeError(
            f"{what} needs about {(WORKER_BASE + need) / 1e9:.2f} GB a worker, and a worker may use "
            f"{allowed / 1e9:.2f} GB: {remedy}, or raise `cluster.memory`, or lower `cluster.workers`"
        )


def serve(address_file: Path, cluster: Cluster) -> None:
    """Run the pool until stdin closes."""
    import dask

    from pipeline.storage.manifest import write_atomically

    dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": THREADS | ALLOCATOR,
            **WORKER_SETTINGS,
            "distributed.scheduler.allowed-failures": DEATHS,
            "distributed.admin.low-level-log-length": 0,
            "distributed.comm.timeouts.connect": "60s",
        }
    )
    scratch, count = address_file.parent, workers(cluster)
    found: dict[str, Any] = {"pid": os.getpid()}
    for attempt in range(STARTS):
        try:
            if cluster.kind == "slurm":
                found["tls"] = files = tls.temporary(scratch)
                local = _jobs(cluster, scratch, files)
            else:
                local = _processes(cluster, scratch, count)
            break
        except MicrotomeError as error:
            write_atomically(address_file, json.dumps({"error": str(error)}))
            os._exit(1)
        except (OSError, RuntimeError) as error:  # a worker that is killed while it starts takes the others with it
            if attempt == STARTS - 1:
                write_atomically(address_file, json.dumps({"error": f"{error} {error.__cause__ or ''}".strip()}))
                os._exit(1)
    found["address"] = local.scheduler_address
    if "tls" in found:
        found["tls"] = {key: str(Path(name).relative_to(scratch)) for key, name in found["tls"].items()}
    write_atomically(address_file, json.dumps(found))
    asked_to_end = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.buffer.read()
        asked_to_end.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    # Jobs may wait in their queue for hours before the first of them begins.
    seen, patience = time.monotonic(), 60 * cluster.slurm.wait if cluster.kind == "slurm" else ALONE
    while not asked_to_end.wait(1):
        # One whose restart failed is started anew, which by itself Dask does not.
        local.scale(count)
        if local.scheduler is None or local.scheduler.workers:
            seen = time.monotonic()
        elif time.monotonic() - seen > patience:
            why = f"its {count} workers ended, and none has lived for {patience} s"
            write_atomically(address_file, json.dumps(found | {"error": why}))
            os._exit(1)
    address_file.unlink(missing_ok=True)
    # Closing in good order removes the workers' folders, and jobs from their queue. If it hangs, the pool still goes,
    # and the workers with it.
    threading.Timer(LEAVE[cluster.kind == "slurm"] + 1, lambda: os._exit(0)).start()
    with contextlib.suppress(TimeoutError):
        local.close(timeout=LEAVE[cluster.kind == "slurm"])
    if "tls" in found:
        shutil.rmtree(scratch / Path(found["tls"]["key"]).parent, ignore_errors=True)
    os._exit(0)


def _processes(cluster: Cluster, scratch: Path, count: int) -> Any:
    """Workers as processes of this machine, which only this machine can reach."""
    from distributed import Nanny, Scheduler, SpecCluster

    visible = [""] * count
    if cluster.kind == "gpu":
        visible = devices.gpus()
        if count > len(visible):
            raise MicrotomeError(
                f"cluster.kind is gpu, and torch sees {len(visible)} GPUs here for {count} workers, one each: "
                + ("lower `cluster.workers`" if visible else "use `kind: local`")
            )
    options = {
        "nthreads": threads(cluster),
        "host": "127.0.0.1",
        "local_directory": str(scratch / "dask"),
        "memory_limit": memory(cluster),
        "silence_logs": 50,  # a task's error is raised where its result is wanted
        "dashboard": False,
    }
    nannies = {
        index: {"cls": Nanny, "options": options | {"env": {"CUDA_VISIBLE_DEVICES": visible[index]}}}
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
    return SpecCluster(workers=copy.deepcopy(nannies), scheduler=copy.deepcopy(scheduler), silence_logs=50)


def _jobs(cluster: Cluster, scratch: Path, files: dict[str, str]) -> Any:
    """Workers as jobs of a queue, encrypted and with keys of this pool alone."""
    from pipeline.workers import slurm

    settings = {
        "DASK_" + key.upper().replace(".", "__").replace("-", "_"): str(value) for key, value in WORKER_SETTINGS.items()
    }
    return slurm.start(cluster, scratch, tls.security(files), THREADS | ALLOCATOR | settings)


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
            # Counted again and again: the first tasks of a run begin when one worker is there, and others join.
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
"""On a worker: held by whoever computes on its device. Networks are shared by its threads, with hooks on them."""

OVERLAPPING: set[Callable[..., Any]] = set()


def overlapping(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a task that itself holds `computing` where it computes, so that others read and write beside it."""
    OVERLAPPING.add(function)
    return function


def alone(function: Callable[..., Any], *task: Any) -> Any:
    """On a worker: a task during which no other computes."""
    with computing:
        return function(*task)


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
