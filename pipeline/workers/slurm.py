"""Workers as jobs of a SLURM queue, through dask-jobqueue: `cluster: {kind: slurm}`.

The scheduler runs beside Snakemake, for example on the login node, and listens on one address of that host, with keys
made for this pool. Jobs need the same file system; they find the results folder from the folder in which `sbatch` was
called.
"""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MicrotomeError
from pipeline.storage.redact import home

if TYPE_CHECKING:
    from distributed import Security

    from pipeline.config.cluster import Cluster

DEATH = 60  # seconds after which a worker without a scheduler ends, and its job with it


def start(cluster: Cluster, scratch: Path, security: Security, environment: dict[str, str]) -> Any:
    """Return a `SLURMCluster` without jobs; its `scale` submits them."""
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise MicrotomeError("cluster.kind is slurm, which needs the package dask-jobqueue: install .[slurm]") from None
    finally:
        signal.signal(signal.SIGINT, interrupt)  # the import installs its own handler
    asked = cluster.slurm
    directives = list(asked.directives)
    if cluster.gpus:
        directives.append("--gres=gpu:1")
    made = SLURMCluster(
        **options(cluster, scratch, security, environment),
        queue=asked.partition,
        account=asked.account,
        walltime=asked.walltime,
        job_extra_directives=directives,
    )
    try:
        check(made.job_script())
    except MicrotomeError:
        made.close()
        raise
    return made


def check(script: str) -> None:
    """Have SLURM check a job script without submitting it. Raises `MicrotomeError` with SLURM's own message.

    Otherwise, dask-jobqueue would log the error and retry, and the run would wait for a job that never comes.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
        except FileNotFoundError:
            raise MicrotomeError("cluster.kind is slurm, and there is no `sbatch` here") from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise MicrotomeError(f"SLURM rejects jobs of `cluster.slurm`: {said}")


def options(cluster: Cluster, scratch: Path, security: Security, environment: dict[str, str]) -> dict[str, Any]:
    """Return the options of any dask-jobqueue queue: one job holds `processes` workers of one thread each."""
    from dask.utils import parse_bytes
    from distributed.utils import get_ip

    asked, count = cluster.slurm, cluster.slurm.processes
    assert cluster.memory is not None
    # A worker on the cores must not see its node's GPUs; for a worker with a GPU, SLURM selects which.
    own = environment if cluster.gpus else environment | {"CUDA_VISIBLE_DEVICES": ""}
    listens = {"interface": asked.interface} if asked.interface else {"host": get_ip()}
    return {
        "cores": count,
        "processes": count,
        "memory": f"{count * int(parse_bytes(cluster.memory))} B",
        "python": " ".join(["env", *(shlex.quote(f"{key}={value}") for key, value in own.items()), python()]),
        "job_name": "microtome",
        "log_directory": str(scratch / "slurm"),
        "local_directory": str(scratch / "dask"),
        "death_timeout": DEATH,
        "interface": asked.interface,
        "protocol": "tls://",
        "security": security,
        # A worker's dashboard would show its work to everyone who can reach it.
        "worker_extra_args": ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"],
        "scheduler_options": {
            **listens,
            "dashboard": cluster.dashboard,
            "dashboard_address": "127.0.0.1:8787" if cluster.dashboard else "127.0.0.1:0",
        },
        "silence_logs": 50,
    }


def python() -> str:
    """Return this Python for a job script: relative to the folder in which jobs start, or with `$HOME`, if possible."""
    path, folder = Path(sys.executable), home()
    if path.is_relative_to(Path.cwd()):
        return shlex.quote(str(path.relative_to(Path.cwd())))
    if folder is not None and path.is_relative_to(folder):
        return '"$HOME"/' + shlex.quote(str(path.relative_to(folder)))
    return shlex.quote(str(path))
