"""(To be said.)"""

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import devices

# A worker with a GPU reads, compresses and writes other shards while the GPU computes one. Numbers do not depend on it.
GPU_THREADS = 3


WORKER_BASE = 600 << 20  # bytes of a worker that has imported torch and the kernels


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
