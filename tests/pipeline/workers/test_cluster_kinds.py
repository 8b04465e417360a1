"""Workers beyond one pool of processes: GPUs, a scheduler that runs, jobs of a queue; and who can reach any of them."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import certificates
import experiments
import psutil
import pytest
import torch

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.run import experiment, planner, preflight
from pipeline.workers import client as workers_client
from pipeline.workers import devices, memory, slurm, tls
from pipeline.workers import pool as cluster
from pipeline.workers import tasks as workers_tasks

ROOT = Path(__file__).parents[3]
MINIMAL = {
    "name": "mini",
    "datasets": {"s": {"kind": "scenes"}},
    "networks": {"n": {"torchvision": "x", "weights": "random"}},
}
SECRET = "hunter2secret"


def refused(**given) -> str:
    with pytest.raises(MicrotomeError) as error:
        experiment.parse(MINIMAL | {"cluster": given})
    return str(error.value)


def square(value):
    return value * value


def threads():
    return os.environ.get("OMP_NUM_THREADS")


# The configuration ----------------------------------------------------------------------------------------------------


def test_addresses_that_are_refused():
    files = {"ca": "a.pem", "certificate": "b.pem", "key": "c.pem"}
    assert "`kind: address` and `address` go together" in refused(kind="address", memory="4 GB")
    assert "`kind: address` and `address` go together" in refused(address="tls://host:8786", tls=files)
    assert "say `insecure: true`" in refused(kind="address", address="tcp://host:8786", memory="4 GB")
    assert "say `insecure: true`" in refused(kind="address", address="tcp://127.evil.example:1", memory="4 GB")
    assert "say `insecure: true`" in refused(kind="address", address="tcp://localhost.evil:1", memory="4 GB")
    assert "section `tls` go together" in refused(kind="address", address="tls://host:8786", memory="4 GB")
    assert "section `tls` go together" in refused(kind="address", address="tcp://localhost:1", tls=files, memory="4 GB")
    assert "memory: say what a worker may use" in refused(kind="address", address="tcp://localhost:8786")
    assert "dashboard" in refused(kind="address", address="tcp://localhost:1", memory="4 GB", dashboard=True)
    assert "`tls` and `insecure` are for" in refused(insecure=True)
    for wrong in ("host:8786", "ucx://host:1", "tls://host", "http://host:80", "tls://ho st:1", "tls://host:1/path"):
        assert "expected tls://host:port" in refused(kind="address", address=wrong, memory="4 GB")


def test_addresses_that_are_taken():
    for address in ("tcp://127.0.0.1:8786", "tcp://localhost:1", "tcp://[::1]:1"):
        Cluster(kind="address", address=address, memory="4 GB")
    Cluster(kind="address", address="tcp://node7:8786", memory="4 GB", insecure=True)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    said = refused(kind="address", address=f"tls://me:{SECRET}@host:8786", memory="4 GB")
    assert "an address holds no user or password" in said
    assert SECRET not in said


def test_queues_that_are_refused():
    assert "workers: say how many" in refused(kind="slurm", memory="4 GB")
    assert "memory: say what" in refused(kind="slurm", workers=2)
    assert "`slurm` is for `kind: slurm`" in refused(slurm={"partition": "long"})
    assert "gpus: use `kind: gpu`" in refused(gpus=True)
    two = {"processes": 2}
    assert "with GPUs a job holds one worker" in refused(kind="slurm", workers=2, memory="4 GB", gpus=True, slurm=two)
    for wrong in ("a b", "$(touch x)", "-x", "a\nb", ""):
        assert "slurm.partition" in refused(kind="slurm", workers=2, memory="4 GB", slurm={"partition": wrong})
    assert "directives" in refused(kind="slurm", workers=2, memory="4 GB", slurm={"directives": ["-C a\nrm -rf x"]})


def test_what_computes_on_a_gpu():
    assert [Cluster(kind=kind).on_gpus for kind in ("local", "gpu")] == [False, True]
    assert Cluster(kind="slurm", workers=1, memory="4 GB", gpus=True).on_gpus


# This machine ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [
        (None, 2, ["0", "1"]),
        ("2,5", 2, ["2", "5"]),
        ("GPU-8f1, MIG-3a", 2, ["GPU-8f1", "MIG-3a"]),
        ("0,-1,1", 1, ["0"]),  # what follows an invalid number is not visible, and torch does not count it
        ("", 0, []),
        (None, 0, []),
    ],
)
def test_the_gpus_are_those_that_torch_sees(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices.gpus() == expected
    # Where there is none, as on a login node, a plan can still be made.
    assert memory.workers(Cluster(kind="gpu")) == max(1, count)


def test_one_worker_a_gpu(monkeypatch):
    made = {}
    monkeypatch.setattr("distributed.SpecCluster", lambda **given: made.update(given) or "pool")
    monkeypatch.setattr(devices, "gpus", lambda: ["GPU-a", "GPU-b"])
    gpus = Cluster(kind="gpu", memory="4 GB")
    assert cluster._processes(gpus, Path("scratch"), 2) == "pool"
    environments = [each["options"]["env"] for each in made["workers"].values()]
    assert environments == [{"CUDA_VISIBLE_DEVICES": "GPU-a"}, {"CUDA_VISIBLE_DEVICES": "GPU-b"}]
    with pytest.raises(MicrotomeError, match=r"torch sees 2 GPUs here for 3 workers, which need one each: lower"):
        cluster._processes(gpus, Path("scratch"), 3)
    monkeypatch.setattr(devices, "gpus", list)
    with pytest.raises(MicrotomeError, match=r"torch sees 0 GPUs here .*: use `kind: local`"):
        cluster._processes(gpus, Path("scratch"), 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is told so")
def test_a_pool_of_gpus_where_there_is_none_says_so(tmp_path, monkeypatch):
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    began = time.monotonic()
    with (
        pytest.raises(MicrotomeError, match=r"did not start: cluster\.kind is gpu, and torch sees 0 GPUs"),
        workers_client.client(Cluster(kind="gpu", memory="4 GB"), tmp_path),
    ):
        pass
    assert time.monotonic() - began < 100


def test_what_a_slurm_job_may_use(monkeypatch):
    allowed, there = len(os.sched_getaffinity(0)), devices.memory()
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "1")
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1000")
    assert devices.cores() == 1
    assert devices.memory() == 1000 << 20
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(allowed + 7))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "0")  # `--mem=0`: all of the node's
    assert devices.cores() == allowed
    assert devices.memory() == there


# Who can reach a pool -------------------------------------------------------------------------------------------------


def listening(pid: int) -> set[str]:
    """The hexadecimal addresses that a process and those below it listen on, as the kernel has them."""
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    sockets = set()
    for process in processes:
        for link in Path(f"/proc/{process.pid}/fd").iterdir():
            try:
                sockets |= set(re.findall(r"socket:\[(\d+)\]", str(link.readlink())))
            except FileNotFoundError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text().splitlines()[1:] if path.exists() else ():
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and inode in sockets:
                found.add(local.rpartition(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
@pytest.mark.parametrize("dashboard", [False, True])
def test_nothing_of_a_pool_is_reached_from_elsewhere(tmp_path, monkeypatch, dashboard):
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    asked = Cluster(workers=1, dashboard=dashboard)
    with cluster.pool(asked, tmp_path) as address_file:
        monkeypatch.setenv(workers_client.ADDRESS, str(address_file))
        with workers_client.client(asked, tmp_path):
            found = listening(json.loads(address_file.read_text())["pid"])
    assert found == {"0100007F"}  # 127.0.0.1


# A scheduler that runs, with TLS --------------------------------------------------------------------------------------


@pytest.fixture
def started(tmp_path):
    """Starts processes by hand, as a person does, and ends them."""
    running = []

    def start(*command: str, **environment: str) -> subprocess.Popen:
        said = (tmp_path / f"said-{len(running)}").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            stdout=said,
            stderr=subprocess.STDOUT,
            cwd=tmp_path,
            env=os.environ
            | cluster.THREADS
            | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests/support")])}
            | environment,
        )
        running.append((process, said))
        return process

    yield start
    for process, said in running:
        process.terminate()
        process.wait()
        said.close()


def tls_options(files: dict[str, str]) -> list[str]:
    return ["--tls-ca-file", files["ca"], "--tls-cert", files["certificate"], "--tls-key", files["key"]]


WORKER = [
    "--nthreads",
    "1",
    "--no-nanny",
    "--no-dashboard",
    "--dashboard-address",
    "127.0.0.1:0",
    "--host",
    "127.0.0.1",
]


def test_two_workers_of_a_scheduler_with_tls(tmp_path, monkeypatch, started):
    """Started by hand: a stage runs on them, and a client without the right certificate does not get in."""
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    monkeypatch.chdir(tmp_path)
    files = certificates.make(tmp_path / "certificates")
    told = tmp_path / "scheduler.json"
    started(
        "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--protocol", "tls", "--no-dashboard",
        "--dashboard-address", "127.0.0.1:0", "--scheduler-file", str(told), *tls_options(files),
    )  # fmt: skip
    end = time.monotonic() + 60
    while not told.exists() and time.monotonic() < end:
        time.sleep(0.1)
    address = json.loads(told.read_text())["address"]
    assert address.startswith("tls://127.0.0.1:")
    for _ in range(2):
        started("distributed.cli.dask_worker", address, *WORKER, *tls_options(files))
    asked = {"kind": "address", "address": address, "tls": files, "memory": "4 GB"}
    own = planner.make(experiment.parse(experiments.scenes(tmp_path, cluster=asked)))
    with workers_client.client(own.config.cluster, own.scratch) as found:
        found.wait_for_workers(2, timeout=60)
        assert workers_tasks.workers_of(found) == 2
        assert found.security.require_encryption
        tasks = ((value,) for value in range(20))
        assert sorted(workers_tasks.run_tasks(found, square, tasks, 20, "squares")) == [n * n for n in range(20)]
        # What a person forgot: another device than the configuration says.
        with (
            pytest.raises(MicrotomeError, match=r"worker tls://127\.0\.0\.1:\d+ has device cpu, and this run cuda"),
            workers_client.client(own.config.cluster.model_copy(update={"gpus": True}), own.scratch),
        ):
            pass
    ingest = experiments.job(own, "ingest", "scenes")
    ingest.stage.run(ingest)
    assert ingest.manifest.exists()
    # Another authority's certificate, which anybody can make.
    monkeypatch.setattr(workers_client, "CONNECT", 3)
    strange = certificates.make(tmp_path / "strange")
    with (
        pytest.raises(MicrotomeError, match=r"the scheduler at tls://127\.0\.0\.1:\d+ cannot be reached"),
        workers_client.client(Cluster(**asked | {"tls": strange}), own.scratch),
    ):
        pass


def test_a_key_that_is_not_there_is_told_without_its_path(tmp_path):
    files = certificates.make(tmp_path / "certificates")
    Path(files["key"]).unlink()
    with pytest.raises(MicrotomeError, match=r"^cluster\.tls\.key: the file cannot be read: No such file") as error:
        tls.security(files)
    assert str(tmp_path) not in str(error.value)
    # And before any work, even in a dry run.
    section = {"kind": "address", "address": "tls://host:1", "memory": "4 GB", "tls": files}
    asked = SimpleNamespace(config=SimpleNamespace(cluster=Cluster(**section)))
    with pytest.raises(MicrotomeError, match=r"^cluster\.tls\.key: the file cannot be read"):
        preflight.check(asked)


def test_workers_with_other_code_are_refused(monkeypatch, client):
    asked = Cluster(workers=1)
    workers_client._check_workers(client, asked, "the pool")
    monkeypatch.setattr(workers_client, "code", lambda: "another")
    with pytest.raises(MicrotomeError, match=r"the pool: worker .* has code [0-9a-f]{12}, and this run another"):
        workers_client._check_workers(client, asked, "the pool")


class Elsewhere:
    """A client whose one worker somebody else started, and says this of itself."""

    def __init__(self, threads, said):
        self.threads, self.said = threads, said

    def run(self, function):
        return {"tls://node7:1": function() | self.said}

    def run_on_scheduler(self, function):
        return function()

    def scheduler_info(self, n_workers):
        return {"workers": {"tls://node7:1": {"nthreads": self.threads}}}


@pytest.mark.parametrize(
    ("threads", "said", "message"),
    [
        (4, {}, r"node7:1 has threads 4, and this run 1: its numbers would differ"),
        (1, {"torch": "1.13"}, r"node7:1 has torch 1\.13, and this run \d+\.\d+: its"),
        (1, {"device": "cuda"}, r"node7:1 has device cuda, and this run cpu: its"),
        (1, {"folder": "/other"}, r"node7:1 was started in /other, and this run in .*: start it in the same folder"),
    ],
)
def test_workers_that_would_give_other_numbers_are_refused(threads, said, message):
    asked = Cluster(kind="address", address="tcp://localhost:1", memory="4 GB")
    workers_client._check_workers(Elsewhere(1, {}), asked, "the scheduler")
    with pytest.raises(MicrotomeError, match=message):
        workers_client._check_workers(Elsewhere(threads, said), asked, "the scheduler")


def test_a_scheduler_without_this_code_is_refused(monkeypatch):
    def lacks(self, function):
        raise ModuleNotFoundError("No module named 'pipeline'")

    monkeypatch.setattr(Elsewhere, "run_on_scheduler", lacks)
    asked = Cluster(kind="address", address="tcp://localhost:1", memory="4 GB")
    with pytest.raises(
        MicrotomeError, match=r"the scheduler: it, or its workers, cannot import this code .*PYTHONPATH"
    ):
        workers_client._check_workers(Elsewhere(1, {}), asked, "the scheduler")


@pytest.fixture
def client(workers, tmp_path):
    with workers_client.client(Cluster(workers=1), tmp_path) as found:
        yield found


# Jobs of a queue ------------------------------------------------------------------------------------------------------


def queue(**changes) -> Cluster:
    return Cluster(**{"kind": "slurm", "workers": 4, "memory": "3 GB", "slurm": {"interface": "lo"}} | changes)


def script(asked: Cluster, scratch: Path) -> str:
    """What would be given to `sbatch`."""
    scratch.mkdir(parents=True, exist_ok=True)
    files = tls.temporary(scratch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slurm, "check", lambda script: None)
        with slurm.start(asked, scratch, tls.security(files), cluster.THREADS) as made:
            address = made.scheduler_address
            text = made.job_script()
    assert address.startswith("tls://127.0.0.1:")
    return text


def test_the_script_of_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = queue(
        slurm={"interface": "lo", "partition": "long", "account": "lab", "walltime": "2-00:00:00", "processes": 4}
    )
    text = script(asked, Path("results/.microtome"))
    for line in (
        "#!/usr/bin/env bash",
        "#SBATCH -J microtome",
        "#SBATCH -p long",
        "#SBATCH -A lab",
        "#SBATCH -n 1",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --mem=12G",
        "#SBATCH -t 2-00:00:00",
        "#SBATCH -o results/.microtome/slurm/microtome-%J.out",
    ):
        assert line in text.splitlines(), text
    command = text.splitlines()[-1]
    assert command.startswith("env OMP_NUM_THREADS=1 ")
    assert " CUDA_VISIBLE_DEVICES= " in command
    assert "--gres" not in text
    for part in (
        "-m distributed.cli.dask_worker tls://127.0.0.1:",
        "--nthreads 1 --memory-limit 2.79GiB --nworkers 4 --nanny --death-timeout 60",
        "--interface lo --protocol tls:// --tls-ca-file results/.microtome/tls-",
        "--no-dashboard --dashboard-address 127.0.0.1:0",
    ):
        assert part in command, command
    assert "PRIVATE KEY" not in text


def test_the_script_of_a_job_with_a_gpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = queue(gpus=True, slurm={"interface": "lo", "directives": ["--constraint=a100"]})
    text = script(asked, Path("results/.microtome"))
    assert "#SBATCH --gres=gpu:1" in text
    assert "#SBATCH --constraint=a100" in text
    assert "CUDA_VISIBLE_DEVICES" not in text  # SLURM sets it


def test_a_script_does_not_tell_where_home_is(tmp_path, monkeypatch):
    home = tmp_path / "markedhome"
    for python, expected in (
        (home / "venv/bin/python", '"$HOME"/venv/bin/python'),
        (home / "work/v/python", "v/python"),
    ):
        (home / "work").mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.chdir(home / "work")
        text = script(queue(), Path("results/.microtome"))
        assert f" {expected} -m distributed" in text
        assert "markedhome" not in text


def test_keys_are_ours_alone_and_go_with_their_pool(tmp_path):
    files = tls.temporary(tmp_path)
    assert Path(files["key"]).stat().st_mode & 0o777 == 0o600
    assert Path(files["key"]).parent.stat().st_mode & 0o777 == 0o700
    tls.clear(tmp_path)
    assert not list(tmp_path.iterdir())


# It kills its job and does not wait for it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_stage_on_jobqueues_local_cluster(tmp_path, monkeypatch):
    """dask-jobqueue's own stand-in for a queue, given what SLURM's is given: it runs the jobs' command at once."""
    from dask_jobqueue.local import LocalCluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = queue(workers=1)
    own = planner.make(experiment.parse(experiments.scenes(Path(), cluster=asked.model_dump())))
    own.scratch.mkdir(parents=True, exist_ok=True)
    files = tls.temporary(own.scratch)
    given = slurm.options(asked, own.scratch, tls.security(files), cluster.THREADS)
    with LocalCluster(**given, n_workers=1) as made:
        address_file = own.scratch / "pool.json"
        names = {key: str(Path(name).relative_to(own.scratch)) for key, name in files.items()}
        address_file.write_text(json.dumps({"pid": os.getpid(), "address": made.scheduler_address, "tls": names}))
        monkeypatch.setenv(workers_client.ADDRESS, str(address_file.absolute()))
        ingest = experiments.job(own, "ingest", "scenes")
        ingest.stage.run(ingest)
    assert ingest.manifest.exists()


SBATCH = """#!/usr/bin/env bash
# Runs a job at once, as a child of nobody, and says its number.
[ "$1" = --test-only ] && exit 0
cp "$1" job.sh
setsid bash job.sh > job.out 2>&1 &
echo "Submitted batch job $!"
"""
SCANCEL = """#!/usr/bin/env bash
echo "$@" >> cancelled
kill -- -"$1"
"""


def test_what_sbatch_refuses_is_told_in_its_words(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MicrotomeError, match="there is no `sbatch` here"):
        slurm.check("")
    (tmp_path / "sbatch").write_text('#!/bin/sh\necho "sbatch: error: invalid partition: long" >&2\nexit 1\n')
    (tmp_path / "sbatch").chmod(0o755)
    with pytest.raises(
        MicrotomeError, match=r"rejects jobs of `cluster.slurm`: sbatch: error: invalid partition: long"
    ):
        slurm.check("")


def test_a_pool_of_slurm_jobs(tmp_path, monkeypatch):
    """With stand-ins for `sbatch` and `scancel`: the script is run as it is, and the job is cancelled at the end."""
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv(workers_client.ADDRESS, raising=False)
    monkeypatch.chdir(tmp_path)
    scratch = Path("results/.microtome")
    asked = queue(workers=1)
    with workers_client.client(asked, scratch) as found:
        squares = workers_tasks.run_tasks(found, square, ((n,) for n in range(5)), 5, "squares")
        assert sorted(squares) == [0, 1, 4, 9, 16]
        (said,) = found.run(workers_client.facts).values()
        assert said["device"] == "cpu"
        (key,) = scratch.glob("tls-*/key.pem")
        assert set(found.run(threads).values()) == {"1"}
    assert Path("cancelled").read_text().strip().isdigit()
    assert not key.exists()
