"""Cores, GPUs and memory that this machine, or the queue job of this process, offers."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import psutil

CONTROL_GROUP = [
    f"/sys/fs/cgroup/{name}"
    for name in (
        "memory/memory.limit_in_bytes",
        "memory/memory.soft_limit_in_bytes",
        "memory.max",
        "memory.high",
        "memory.low",
    )
]
"""Files with the limits of this process's control group, of both versions."""


def cores() -> int:
    """Return how many cores this process may use: those the kernel allows, within the request of its SLURM job."""
    allowed = len(os.sched_getaffinity(0))
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(asked)) if asked.isdigit() and int(asked) else allowed


def memory() -> int:
    """Return how many bytes this process may use: within the machine, its control group and its SLURM job.

    As `distributed.system.memory_limit`, whose import takes two seconds.
    """
    limit = psutil.virtual_memory().total
    for file in CONTROL_GROUP:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            found = int(Path(file).read_text())
            limit = min(limit, found) if found > 0 else limit
    hard = resource.getrlimit(resource.RLIMIT_RSS)[1]
    limit = min(limit, hard) if hard > 0 else limit
    asked = os.environ.get("SLURM_MEM_PER_NODE", "")
    return min(limit, int(asked) << 20) if asked.isdigit() and int(asked) else limit


def gpus() -> list[str]:
    """List the GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them; empty if it sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(each) for each in range(count)]


def device() -> str:
    """Return `cuda` on a worker that was given a GPU, else `cpu`, without importing torch."""
    return "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
