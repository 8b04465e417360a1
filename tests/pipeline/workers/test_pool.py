"""The pool of workers: results and errors of tasks, and that nothing outlives the run that started it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dask
import pytest
from distributed import Client, LocalCluster

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.workers import client as workers_client
from pipeline.workers import devices, memory
from pipeline.workers import pool as cluster
from pipeline.workers import tasks as workers_tasks

ROOT = Path(__file__).parents[3]
START = """
import sys, time
from pathlib import Path
from pipeline.config.cluster import Cluster
from pipeline.workers import client, pool
process, address_file = pool.start_pool(Cluster(workers=1), Path(sys.argv[1]))
client._wait_for(address_file)
print(address_file.read_text(), flush=True)
time.sleep(600)
"""


@pytest.fixture
def client(workers, tmp_path):
    with workers_client.client(Cluster(workers=1), tmp_path) as found:
        yield found


def square(value):
    return value * value


def fail(value):
    raise MicrotomeError(f"task {value} failed")


def holds_the_device():
    """Whether the thread of this task is the one that computes: another one cannot."""

    def free():
        got = workers_tasks.computing.acquire(blocking=False)
        if got:
            workers_tasks.computing.release()
        return got

    with ThreadPoolExecutor(1) as other:
        return not other.submit(free).result()


def slow(folder, value):
    time.sleep(0.02)
    Path(folder, str(value)).touch()
    if value == 3:
        fail(value)


def hungry(kind):
    import torch

    if kind == "numpy":
        raise MemoryError("Unable to allocate 8 TiB")
    if kind == "torch":
        torch.empty(1 << 50)
    raise RuntimeError("something else")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def environment():
    return {name: os.environ.get(name) for name in (*cluster.ARITHMETIC, "CUDA_VISIBLE_DEVICES")}


def test_results_of_all_tasks(client):
    tasks = ((value,) for value in range(50))
    assert sorted(workers_tasks.run_tasks(client, square, tasks, 50, "squares")) == [
        value * value for value in range(50)
    ]
    assert list(workers_tasks.run_tasks(client, square, [], 0, "nothing")) == []


def test_the_first_error_is_raised_and_the_rest_is_not_done(client, tmp_path):
    tasks = ((str(tmp_path), value) for value in range(1000))
    with pytest.raises(MicrotomeError, match="task 3 failed"):
        list(workers_tasks.run_tasks(client, slow, tasks, 1000, "slow"))
    assert 4 <= len(list(tmp_path.glob("[0-9]*"))) < 30


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_out_of_memory_says_what_to_lower(client, kind):
    with pytest.raises(
        MicrotomeError, match=r"feast: out of memory \(.*\): lower the portions, or lower `cluster.work"
    ):
        list(workers_tasks.run_tasks(client, hungry, [(kind,)], 1, "feast", "lower the portions"))
    with pytest.raises(RuntimeError, match="something else"):
        list(workers_tasks.run_tasks(client, hungry, [("else",)], 1, "feast"))


def test_memory():
    assert memory.memory(Cluster(memory="3 GB", workers=7)) == 3_000_000_000
    one, two = (memory.memory(Cluster(workers=count)) for count in (1, 2))
    assert 0 < two <= one // 2
    memory.check_memory(Cluster(memory="1 GB"), 300e6, "a feast", "lower the portions")
    with pytest.raises(MicrotomeError) as error:
        memory.check_memory(Cluster(memory="1 GB"), 900e6, "a feast", "lower the portions")
    assert str(error.value) == (
        "a feast needs about 1.53 GB per worker, and a worker may use 1.00 GB: lower the portions, or raise "
        "`cluster.memory`, or lower `cluster.workers`"
    )


def test_a_worker_with_a_gpu_has_several_tasks_of_which_one_computes():
    gpu = Cluster(kind="gpu", workers=1, memory="3 GB")
    assert memory.threads(gpu) == memory.GPU_THREADS > 1 == memory.threads(Cluster())
    memory.check_memory(gpu, 700e6, "a feast", "lower the portions")
    with pytest.raises(MicrotomeError, match=r"about 3\.03 GB per worker"):
        memory.check_memory(gpu, 800e6, "a feast", "lower the portions")

    beside, most, seen = threading.Barrier(3), [0], []

    def computes(share):
        most[0] += 1
        seen.append(most[0])
        time.sleep(share)
        most[0] -= 1

    @workers_tasks.overlapping
    def overlaps(share):
        beside.wait(20)  # all three are here at a time
        with workers_tasks.computing:
            computes(share)
        beside.wait(20)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(overlaps, [0.02] * 3))
        list(threads.map(lambda share: workers_tasks.alone(computes, share), [0.02] * 3))
    assert seen == [1] * 6
    assert overlaps in workers_tasks.OVERLAPPING and computes not in workers_tasks.OVERLAPPING
    workers_tasks.OVERLAPPING.discard(overlaps)


def test_tasks_are_alone_unless_they_say_otherwise(client):
    assert list(workers_tasks.run_tasks(client, holds_the_device, [()], 1, "alone")) == [True]
    workers_tasks.overlapping(holds_the_device)
    try:
        assert list(workers_tasks.run_tasks(client, holds_the_device, [()], 1, "beside others")) == [False]
    finally:
        workers_tasks.OVERLAPPING.discard(holds_the_device)


def test_too_little_memory_for_any_worker(tmp_path):
    with (
        pytest.raises(
            MicrotomeError, match=r"torch alone needs about 0\.63 GB per worker, .* may use 0\.40 GB: .*raise"
        ),
        workers_client.client(Cluster(memory="400 MB"), tmp_path),
    ):
        pass


def test_a_task_that_kills_its_workers():
    """It is given up after some deaths, with a reason, and the pool goes on."""
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None, silence_logs=50) as local,
        Client(local) as found,
    ):
        with pytest.raises(MicrotomeError, match="deadly: of 1 workers each died while computing one task"):
            list(workers_tasks.run_tasks(found, die, [()], 1, "deadly"))
        assert list(workers_tasks.run_tasks(found, square, [(3,)], 1, "after")) == [9]


def test_tasks_are_drawn_a_few_at_a_time(client):
    drawn = []

    def tasks():
        for value in range(100):
            drawn.append(value)
            yield (value,)

    results = workers_tasks.run_tasks(client, square, tasks(), 100, "few")
    for _ in range(10):
        next(results)
    assert len(drawn) <= 10 + 4 * workers_tasks.workers_of(client)
    results.close()


def test_a_worker_has_one_thread_and_no_gpu(client):
    (found,) = workers_tasks.run_tasks(client, environment, [()], 1, "environment")
    assert found == cluster.ARITHMETIC | {"CUDA_VISIBLE_DEVICES": ""}
    assert workers_tasks.workers_of(client) == 1


def test_only_this_machine_is_listened_to(client):
    info = client.scheduler_info(n_workers=-1)
    addresses = [info["address"], *info["workers"], *(worker["nanny"] for worker in info["workers"].values())]
    assert len(addresses) == 3
    assert all(address.startswith("tcp://127.0.0.1:") for address in addresses)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids, seconds=20) -> bool:
    end = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return not any(map(alive, pids))


def descendants(pid: int) -> list[int]:
    children = [child for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]
    return [pid, *(one for child in children for one in descendants(int(child)))]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_the_pool_ends_with_the_process_that_started_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", START, str(tmp_path)],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        pids = descendants(json.loads(process.stdout.readline())["pid"])
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert len(pids) >= 2  # the pool itself and its worker
    assert gone(pids)
    assert not list(tmp_path.glob("pool-*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_a_pool_that_is_killed_is_told_in_one_line(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    with cluster.pool(Cluster(workers=1), tmp_path) as address_file:
        monkeypatch.setenv(workers_client.ADDRESS, str(address_file))
        with (
            pytest.raises(MicrotomeError, match="is gone: killed from outside"),
            workers_client.client(Cluster(workers=1), tmp_path) as found,
        ):
            for _ in workers_tasks.run_tasks(found, square, ((at,) for at in range(1000)), 1000, "killed"):
                for pid in descendants(json.loads(address_file.read_text())["pid"]):
                    os.kill(pid, signal.SIGKILL)
    assert "Traceback" not in capfd.readouterr().err


def test_a_pool_that_is_gone_before_the_next_tasks(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    with (
        pytest.raises(MicrotomeError, match="is gone: killed from outside"),
        cluster.pool(Cluster(workers=1), tmp_path) as address_file,
    ):
        monkeypatch.setenv(workers_client.ADDRESS, str(address_file))
        with workers_client.client(Cluster(workers=1), tmp_path) as found:
            os.kill(json.loads(address_file.read_text())["pid"], signal.SIGKILL)
            found.close()  # as it does by itself when it has waited long enough
            list(workers_tasks.run_tasks(found, square, [(2,)], 1, "gone"))
    assert "Traceback" not in capfd.readouterr().err


def test_a_pool_that_ends_before_it_is_ready_is_told_at_once(tmp_path):
    with cluster.pool(Cluster(workers=1), tmp_path) as address_file:
        os.kill(json.loads(address_file.read_text())["pid"], signal.SIGKILL)
        began = time.monotonic()
        with pytest.raises(MicrotomeError, match="the pool of workers has ended"):
            workers_client._wait_for(address_file)
    assert time.monotonic() - began < 10


def test_a_pool_that_does_not_start(tmp_path):
    with pytest.raises(MicrotomeError, match="did not start within 0 s"):
        workers_client._wait_for(tmp_path / "absent.json", seconds=0.1)


def test_a_pool_that_says_why_it_does_not_start(tmp_path):
    (tmp_path / "pool.json").write_text(json.dumps({"error": "Nanny failed to start."}))
    with pytest.raises(MicrotomeError, match=r"did not start: Nanny failed to start\."):
        workers_client._wait_for(tmp_path / "pool.json")


def test_the_number_of_workers(monkeypatch):
    assert memory.workers(Cluster(workers=3)) == 3
    assert memory.workers(Cluster()) == len(os.sched_getaffinity(0))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2")
    assert devices.device() == "cuda"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.device() == "cpu"


def test_progress_says_where_it_is(capsys):
    bar = workers_tasks.Progress("shards", 3)
    bar.step(2)
    bar.shown -= 11
    bar.step()
    bar.close()
    assert capsys.readouterr().err == "  shards: 3/3, 0 s\n"


def test_where_processes_can_share_nothing_it_says_so(tmp_path, monkeypatch):
    def refuse(self, *_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Semaphore", refuse)
    with pytest.raises(MicrotomeError, match=r"\(Read-only file system\): have /dev/shm mounted"):
        cluster._processes(Cluster(workers=1), tmp_path, 1)


def test_a_site_that_demands_encryption_has_it_on_one_machine_too(tmp_path, monkeypatch):
    pytest.importorskip("cryptography")
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    monkeypatch.setenv("DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION", "True")
    with workers_client.client(Cluster(workers=1), tmp_path) as found:
        assert found.scheduler.address.startswith("tls://127.0.0.1:")
        assert found.submit(square, 3).result(60) == 9
    assert not list(tmp_path.glob("tls-*"))
