"""What this machine, or the job of a queue that this process is in, offers: cores, GPUs and memory."""

from __future__ import annotations

import os


def cores() -> int:
    """How many cores are ours: those that the kernel allows, and of a SLURM job no more than it asked for."""
    allowed = len(os.sched_getaffinity(0))
    asked = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return min(allowed, int(asked)) if asked.isdigit() and int(asked) else allowed


def memory() -> int:
    """How many bytes are ours: the machine's, its control group's, or what a SLURM job asked for."""
    from distributed.system import MEMORY_LIMIT

    asked = os.environ.get("SLURM_MEM_PER_NODE", "")
    return min(int(MEMORY_LIMIT), int(asked) << 20) if asked.isdigit() and int(asked) else int(MEMORY_LIMIT)


def gpus() -> list[str]:
    """The GPUs that torch can use here, as CUDA_VISIBLE_DEVICES names them; none where it sees none."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [name.strip() for name in named.split(",")][:count] if named else [str(each) for each in range(count)]


def device() -> str:
    """On a worker: `cuda` when it was given a GPU, else `cpu`; torch is not imported to find out."""
    return "cuda" if os.environ.get("CUDA_VISIBLE_DEVICES") else "cpu"
