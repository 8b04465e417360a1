"""How many workers and threads there are, and how much memory each may use."""

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import devices

# While the GPU computes one shard, its worker reads, compresses and writes others. Results do not depend on this.
GPU_THREADS = 3


WORKER_BASE = 600 << 20  # bytes of a worker that has imported torch and the kernels


def workers(cluster: Cluster) -> int:
    """Return the number of workers: as configured, else one per GPU or one per core.

    Return 1 if the number is unknown here: with `kind: address`, or with GPUs on other machines.
    """
    if cluster.workers is not None:
        return cluster.workers
    if cluster.kind == "gpu":
        return max(1, len(devices.gpus()))
    return 1 if cluster.kind == "address" else devices.cores()


def threads(cluster: Cluster) -> int:
    """Return how many tasks a worker runs at a time."""
    return GPU_THREADS if cluster.kind == "gpu" else 1


def memory(cluster: Cluster) -> int:
    """Return how many bytes a worker may use: as configured, else its share of the machine's memory."""
    if cluster.memory is not None:
        from dask.utils import parse_bytes

        return int(parse_bytes(cluster.memory))
    return devices.memory() // workers(cluster)


def check_memory(cluster: Cluster, need: float, what: str, remedy: str) -> None:
    """Refuse tasks that need `need` bytes each, besides a worker's own, if a worker may not use that many.

    Raises
    ------
    MicrotomeError
        With both figures and the remedy, before anything is computed.
    """
    allowed, need = memory(cluster), threads(cluster) * need
    if WORKER_BASE + need > allowed:
        raise MicrotomeError(
            f"{what} needs about {(WORKER_BASE + need) / 1e9:.2f} GB per worker, and a worker may use "
            f"{allowed / 1e9:.2f} GB: {remedy}, or raise `cluster.memory`, or lower `cluster.workers`"
        )
