"""Pools of Dask workers for the stages.

A run of the workflow starts one pool (`python -m pipeline.workers.pool`), which serves all its jobs in turn, so that
torch is imported once per run and not once per job. A stage used without Snakemake starts its own pool. The pool holds
a pipe to the process that started it. When that process ends, for whatever reason, the pipe closes and the pool ends
within a second, workers included. With `kind: address` there is no pool: the stages use an external scheduler.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import devices, processes, tls
from pipeline.workers.memory import memory, threads, workers

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
# A product in a batch of matrices of odd sizes begins at any offset from a cache line, and MKL rounds by it: an image
# would get other bits at another place of its batch. This costs no time that could be measured.
ARITHMETIC = THREADS | {"MKL_CBWR": "AUTO,STRICT"}


STARTS = 3  # attempts to start the workers before the pool gives up
ALONE = 60  # seconds without any worker before the pool gives up
DEATHS = 10  # worker deaths after which the task that each was computing is at fault

LEAVE = 2, 30  # seconds for a clean shutdown, of processes and of queue jobs

WORKER_SETTINGS = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    # A paused worker would wait for memory that its own task holds; beyond the limit, it is ended and restarted
    # instead.
    "distributed.worker.memory.pause": False,
}

# Dask makes workers return freed memory to the system at once; torch takes it again in every step, and a training run
# costs twice the CPU time (26.9 s against 13.0 s for 60 steps of the demo's ViT).
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 31)}


@contextlib.contextmanager
def pool(cluster: Cluster, scratch: Path) -> Iterator[Path]:
    """Start a pool in its own process, yield the file that will hold its address, and end the pool on leaving."""
    process, address_file = start_pool(cluster, scratch)
    try:
        yield address_file
    finally:
        stop_pool(process)


def start_pool(cluster: Cluster, scratch: Path) -> tuple[subprocess.Popen, Path]:
    """Start a pool without waiting for it. It ends when its stdin closes, or when this process dies."""
    scratch.mkdir(parents=True, exist_ok=True)
    address_file = scratch / f"pool-{os.getpid()}-{time.time_ns()}.json"
    process = subprocess.Popen(
        processes.program("pipeline.workers.pool", str(address_file), cluster.model_dump_json()),
        stdin=subprocess.PIPE,
        env=os.environ
        | ARITHMETIC
        | processes.own_imports()
        | {
            # The pool ends at once when it is no longer needed; the operating system clears what it leaves.
            "PYTHONWARNINGS": "ignore:resource_tracker",
        },
        # Ctrl-C in the terminal reaches the stages; the pool ends once they have closed their clients.
        start_new_session=True,
    )
    # Until the pool writes its address, the file holds its pid.
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
    """Remove what killed pools left behind. No pool may be running."""
    for file in scratch.glob("pool-*.json"):
        file.unlink(missing_ok=True)
    shutil.rmtree(scratch / "dask", ignore_errors=True)
    tls.clear(scratch)


def serve(address_file: Path, cluster: Cluster) -> None:
    """Run the pool until stdin closes."""
    import dask

    from pipeline.storage.atomic import write_atomically

    dask.config.set(
        {
            "distributed.nanny.pre-spawn-environ": ARITHMETIC | ALLOCATOR,
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
            files = None
            # A site may demand it of all that Dask does, of processes of one machine too.
            if cluster.kind == "slurm" or dask.config.get("distributed.comm.require-encryption", None):
                found["tls"] = files = tls.temporary(scratch)
            if cluster.kind == "slurm":
                assert files is not None
                local = _jobs(cluster, scratch, files)
            else:
                local = _processes(cluster, scratch, count, files)
            break
        except MicrotomeError as error:
            write_atomically(address_file, json.dumps({"error": str(error)}))
            os._exit(1)
        except (OSError, RuntimeError) as error:  # a worker killed while it starts takes the others down
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
    # Jobs may wait in their queue for hours before the first one starts.
    seen, patience = time.monotonic(), 60 * cluster.slurm.wait if cluster.kind == "slurm" else ALONE
    while not asked_to_end.wait(1):
        # Replace a worker whose restart failed, which Dask does not do by itself.
        local.scale(count)
        if local.scheduler is None or local.scheduler.workers:
            seen = time.monotonic()
        elif time.monotonic() - seen > patience:
            why = f"its {count} workers ended, and none has lived for {patience} s"
            write_atomically(address_file, json.dumps(found | {"error": why}))
            os._exit(1)
    address_file.unlink(missing_ok=True)
    # A clean shutdown removes the workers' folders, and jobs from their queue. If it hangs, the pool still ends, and
    # the workers with it.
    threading.Timer(LEAVE[cluster.kind == "slurm"] + 1, lambda: os._exit(0)).start()
    with contextlib.suppress(TimeoutError):
        local.close(timeout=LEAVE[cluster.kind == "slurm"])
    if "tls" in found:
        shutil.rmtree(scratch / Path(found["tls"]["key"]).parent, ignore_errors=True)
    os._exit(0)


def _processes(cluster: Cluster, scratch: Path, count: int, files: dict[str, str] | None = None) -> Any:
    """Start workers as processes of this machine, which only this machine can reach; over TLS if `files` are given."""
    from distributed import Nanny, Scheduler, SpecCluster

    try:
        multiprocessing.get_context("spawn").Semaphore()
    except OSError as error:
        raise MicrotomeError(
            f"this system has no place for what processes share ({error.strerror}): have /dev/shm mounted so that it "
            "can be written, in a container for example with `--shm-size 1g`"
        ) from None
    visible = [""] * count
    if cluster.kind == "gpu":
        visible = devices.gpus()
        if count > len(visible):
            raise MicrotomeError(
                f"cluster.kind is gpu, and torch sees {len(visible)} GPUs here for {count} workers, "
                "which need one each: " + ("lower `cluster.workers`" if visible else "use `kind: local`")
            )
    encrypted = {"protocol": "tls", "security": tls.security(files)} if files else {}
    options = encrypted | {
        "nthreads": threads(cluster),
        "host": "127.0.0.1",
        "local_directory": str(scratch / "dask"),
        "memory_limit": memory(cluster),
        "silence_logs": 50,  # a task's error is raised where its result is used
        "dashboard": False,
    }
    nannies = {
        index: {"cls": Nanny, "options": options | {"env": {"CUDA_VISIBLE_DEVICES": visible[index]}}}
        for index in range(count)
    }
    scheduler = {
        "cls": Scheduler,
        "options": encrypted
        | {
            "host": "127.0.0.1",
            "dashboard": cluster.dashboard,
            "dashboard_address": "127.0.0.1:8787" if cluster.dashboard else "127.0.0.1:0",
        },
    }
    return SpecCluster(
        workers=copy.deepcopy(nannies),
        scheduler=copy.deepcopy(scheduler),
        security=encrypted.get("security"),
        silence_logs=50,
    )


def _jobs(cluster: Cluster, scratch: Path, files: dict[str, str]) -> Any:
    """Start workers as queue jobs, encrypted with keys made for this pool."""
    from pipeline.workers import slurm

    settings = {
        "DASK_" + key.upper().replace(".", "__").replace("-", "_"): str(value) for key, value in WORKER_SETTINGS.items()
    }
    return slurm.start(cluster, scratch, tls.security(files), ARITHMETIC | ALLOCATOR | processes.SAFE_PATH | settings)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Cluster.model_validate_json(sys.argv[2]))
