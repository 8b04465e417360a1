"""What a scheduler does for many workers: tasks a second, CPU and memory a task, as stages submit them.

    python -m tests.bench.bench_scheduler [--workers 1000] [--tasks 5000]    writes build/bench-scheduler.json
    python -m tests.bench.bench_scheduler --hosts                            1, 2 and 4 workers of one host

The scheduler and the client are real and in this process; the workers are in another, and are all that a scheduler
sees of a worker: connections, answers, results, a pulse. So what is measured is what a task costs to hand out. Tasks
come through `pipeline.workers.tasks.run_tasks`, with arguments of the size that those of `extract` have. CPU seconds
are those of the scheduler's own thread.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import dask
import psutil

from pipeline.workers.tasks import IN_FLIGHT, REFRESH, run_tasks, workers_of

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "build" / "bench-scheduler.json"
# Thirteen layers, each with its folder and facts, take so many bytes in a task of `extract`.
ARGUMENT = b"x" * 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--tasks", type=int, default=5000)
    parser.add_argument("--hosts", action="store_true")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        asyncio.run(serve(given.serve[0], int(given.serve[1])))
    elif given.hosts:
        for line in hosts():
            print(line)
    else:
        found = measure(given.workers, given.tasks)
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        print(json.dumps(found, indent=1))


async def serve(address: str, count: int) -> None:
    """So many workers in this process, until it is ended."""
    from distributed.core import Server, Status
    from distributed.protocol import to_serialize
    from distributed.protocol.pickle import dumps

    kind = dumps(int)

    class Worker(Server):
        """It registers, answers tasks at once, gives results, and has a pulse."""

        def __init__(self) -> None:
            super().__init__({"get_data": self.get_data})

        async def start_unsafe(self) -> "Worker":
            await self.listen("tcp://127.0.0.1")
            await self.rpc.start()
            self.comm = await self.rpc.connect(address)
            self.comm.name = "worker"
            about = {
                "op": "register-worker", "reply": False, "address": self.address, "status": "running", "nthreads": 1,
                "name": self.address, "now": time.time(), "resources": {}, "memory_limit": None, "services": {},
                "local_directory": "", "nanny": None, "pid": 0, "versions": {}, "metrics": self.metrics(), "extra": {},
                "stimulus_id": "register", "server_id": self.id,
            }  # fmt: skip
            await self.comm.write(about, serializers=["msgpack"])
            answer = await self.comm.read(deserializers=["msgpack"])
            assert answer["status"] == "OK", answer
            self.tasks = [asyncio.ensure_future(self.work()), asyncio.ensure_future(self.pulse(answer))]
            return self

        def metrics(self) -> dict[str, Any]:
            return {
                "task_counts": {}, "bandwidth": {"total": 1e8, "workers": {}, "types": {}}, "managed_bytes": 0,
                "digests_total_since_heartbeat": {}, "spilled_bytes": {"memory": 0, "disk": 0}, "memory": 1,
                "transfer": {"incoming_bytes": 0, "incoming_count": 0, "incoming_count_total": 0, "outgoing_bytes": 0,
                "outgoing_count": 0, "outgoing_count_total": 0}, "event_loop_interval": 0.02, "cpu": 0, "num_fds": 9,
                "time": time.time(), "host_net_io": {"read_bps": 0, "write_bps": 0},
                "host_disk_io": {"read_bps": 0, "write_bps": 0},
            }  # fmt: skip

        async def work(self) -> None:
            while True:
                done = [
                    {
                        "op": "task-finished", "status": "OK", "key": message["key"], "run_id": message["run_id"],
                        "nbytes": 28, "type": kind, "typename": "int", "metadata": {}, "thread": 0, "startstops": (),
                        "stimulus_id": "done",
                    }
                    for message in await self.comm.read()
                    if message["op"] == "compute-task" and not message["key"].startswith("wait")
                ]  # fmt: skip
                if done:
                    await self.comm.write(done)

        async def pulse(self, answer: dict[str, Any]) -> None:
            scheduler = self.rpc(address)
            while True:
                await asyncio.sleep(answer.get("heartbeat-interval", 1))
                answer = await scheduler.heartbeat_worker(
                    address=self.address, now=time.time(), metrics=self.metrics(), executing={}, extensions={}
                )

        async def get_data(self, comm: Any, keys: Any, **_: Any) -> Any:
            await comm.write({"status": "OK", "data": {key: to_serialize(0) for key in keys}})
            await comm.read()
            return Status.dont_reply

    workers = [await Worker() for _ in range(count)]
    await asyncio.gather(*(task for worker in workers for task in worker.tasks))


def measure(count: int, tasks: int) -> dict[str, Any]:
    from distributed import Client, Scheduler, SpecCluster

    dask.config.set({"distributed.admin.low-level-log-length": 0, "distributed.comm.timeouts.connect": "120s"})
    options = {"host": "127.0.0.1", "dashboard": False, "dashboard_address": "127.0.0.1:0"}
    with SpecCluster(scheduler={"cls": Scheduler, "options": options}, silence_logs=50) as made:
        command = [sys.executable, "-m", "tests.bench.bench_scheduler", "--serve", made.scheduler_address, str(count)]
        child = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"DASK_LOGGING__DISTRIBUTED": "critical"})
        try:
            with Client(made.scheduler_address, timeout=120, set_as_default=False) as client:
                client.wait_for_workers(count, timeout=1200)
                return {"workers": count} | counted(made, client, count, tasks)
        finally:
            child.kill()
            child.wait()


def counted(made: Any, client: Any, count: int, tasks: int) -> dict[str, Any]:
    """The figures of one scheduler with its workers."""

    async def spent() -> float:
        return time.thread_time()

    def own() -> float:
        return made.sync(spent)

    # From before the first task: what the tasks before these have freed stays with the process, and is used again.
    memory = psutil.Process().memory_info().rss
    list(run_tasks(client, nothing, ((ARGUMENT, n) for n in range(count)), count, "first"))
    idle, began = own(), time.perf_counter()
    time.sleep(5)
    idle = (own() - idle) / (time.perf_counter() - began)
    asking, before = own(), time.perf_counter()
    for _ in range(3):
        workers_of(client)
    asking, answer = (own() - asking) / 3, (time.perf_counter() - before) / 3

    most = 0

    def given() -> Any:
        nonlocal most
        for n in range(tasks):
            most = max(most, len(made.scheduler.tasks))
            yield ARGUMENT, n

    cpu, process, clock = own(), time.process_time(), time.perf_counter()
    done = sum(1 for _ in run_tasks(client, nothing, given(), tasks, "tasks"))
    clock, cpu, process = time.perf_counter() - clock, own() - cpu, time.process_time() - process
    assert done == tasks

    held = [client.submit(wait, ARGUMENT, n, pure=False) for n in range(IN_FLIGHT * count)]
    while len(made.scheduler.tasks) < len(held):
        time.sleep(0.1)
    memory = psutil.Process().memory_info().rss - memory
    client.cancel(held)
    return {
        "tasks": tasks,
        "in flight": most,
        "tasks a second by the clock": round(done / clock, 1),
        "CPU of the scheduler, ms a task": round(1e3 * cpu / tasks, 3),
        "CPU of scheduler and client, ms a task": round(1e3 * process / tasks, 3),
        "most tasks a second of the scheduler's thread": round(tasks / cpu, 1),
        "heartbeats and events, share of the thread": round(idle, 4),
        "to ask for the workers, ms of the scheduler": round(1e3 * asking, 2),
        "to ask for the workers, ms by the clock": round(1e3 * answer, 2),
        "asked once in seconds": REFRESH,
        "memory of scheduler and client, kB a task in flight": round(memory / len(held) / 1e3, 1),
    }


def nothing(argument: bytes, number: int) -> int:
    return number


def wait(argument: bytes, number: int) -> None:
    time.sleep(600)


def hosts() -> list[str]:
    """1, 2 and 4 workers of one host on ResNet-18: CPU of an image and images a second, against a bare forward."""
    from tests.bench.bench_costs import on_workers

    cores = len(os.sched_getaffinity(0))
    lines = [f"{cores} cores; ratios to a bare forward on one thread, measured beside it"]
    with tempfile.TemporaryDirectory() as name:
        for one in on_workers(Path(name), count=32, of=(1, 2, 4)):
            part = min(one["workers"], cores)
            lines.append(
                f"{one['workers']} workers: {one['cpu'] / one['bare_cpu']:.2f} of the CPU an image, "
                f"{one['rate'] / one['bare_rate']:.2f} times the images a second of the clock, "
                f"{100 * one['rate'] / one['bare_rate'] / part:.0f} % of {part} bare threads"
            )
    return lines


if __name__ == "__main__":
    main()
