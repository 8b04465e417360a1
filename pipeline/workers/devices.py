"""Cores, GPUs and memory that this machine, or the queue job of this process, offers."""

from __future__ import annotations

import os


def cores() -> int:
    """Return how many cores this process may use: those the kernel allows, within the request of its SLURM job."""
    allowed = len(os.sched_getaffinity(0))
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(asked)) if asked.isdigit() and int(asked) else allowed


def memory() -> int:
    """Return how many bytes this process may use: within the machine, its control group and its SLURM job."""
    from distributed.system import MEMORY_LIMIT

    asked = os.environ.get("SLURM_MEM_PER_NODE", "")
    return min(int(MEMORY_LIMIT), int(asked) << 20) if asked.isdigit() and int(asked) else int(MEMORY_LIMIT)


def gpus() -> list[str]:
    """List the GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them; empty if it sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(each) for each in range(count)]


def device() -> str:
    """Return `cuda` on a worker that was given a GPU, else `cpu`, without importing torch."""
    return "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
