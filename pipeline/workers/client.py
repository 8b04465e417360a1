"""The Dask client of a stage: connects to a pool or a scheduler and checks its workers."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import processes, tls
from pipeline.workers.devices import device
from pipeline.workers.memory import check_memory
from pipeline.workers.pool import pool

ADDRESS = "MICROTOME_POOL"  # environment variable: the file that holds the pool's address


CONNECT = 60  # seconds to reach a scheduler


@contextlib.contextmanager
def client(cluster: Cluster, scratch: Path) -> Iterator[Any]:
    """Yield a `distributed.Client` on the run's pool, or on a pool of its own if the run has none.

    `scratch` is a folder for the pool's address file and the workers' local files.

    Raises
    ------
    MicrotomeError
        The pool is gone, at the start or later; an external scheduler cannot be reached, or its workers would compute
        different numbers.
    """
    from distributed import Client
    from distributed.client import FutureCancelledError
    from distributed.comm import CommClosedError
    from distributed.utils import silence_logging_cmgr

    check_memory(cluster, 0, "Python with torch alone", "a worker has less memory than that: use a larger machine")
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
        # The error below reports a lost connection once; everything else that notices it stays silent.
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
        except Exception as error:  # without a scheduler, each call on a client fails in its own way
            # A closed connection is noticed before the client itself reports it.
            lost = isinstance(error, FutureCancelledError | CommClosedError)
            if found is not None and found.status == "running" and not lost:
                raise
            if found is None and address_file is None:
                raise MicrotomeError(f"{what} cannot be reached: {type(error).__name__}: {error}") from None
            why = "killed from outside, or out of memory"
            with contextlib.suppress(OSError, ValueError):
                if address_file is not None:
                    why = json.loads(address_file.read_text()).get("error", why)
            raise MicrotomeError(f"{what} is gone: {why}; finished shards are kept; rerun to resume") from error


def _check_workers(client: Any, cluster: Cluster, what: str) -> None:
    """Refuse workers that this run did not start if they would compute other numbers than the run states.

    Raises `MicrotomeError` with a worker and what differs there.
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
    """Return what else determines a worker's numbers, and where relative paths begin; runs on workers and here."""
    return {
        "code": code(),
        "device": device(),
        "torch": ".".join(version("torch").split(".")[:2]),
        "folder": str(Path.cwd()),
    }


@functools.cache
def code() -> str:
    """Return a digest of the code of stages and kernels on disk."""
    own = Path(__file__).parents[1]
    files = sorted(path for folder in (own, own.parent / "kernels") for path in folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _wait_for(address_file: Path, seconds: float = 120) -> dict[str, Any]:
    """Wait for a pool and return what it reports: `address`, and the files of `tls` if connections are encrypted."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(address_file.read_text())
            if "error" in found:
                raise MicrotomeError(f"the pool of workers did not start: {found['error']}")
            if not processes.lives(found["pid"]):
                raise MicrotomeError("the pool of workers has ended: rerun to resume")
            if "address" in found:
                return found
        time.sleep(0.02)
    raise MicrotomeError(f"the pool of workers did not start within {seconds:.0f} s (no {address_file})")
