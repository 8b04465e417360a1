"""The section `cluster`: workers, their scheduler, TLS files and SLURM jobs."""

import ipaddress
import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints, field_validator, model_validator

from pipeline.config.base import PathName, Strict


class Tls(Strict):
    """Files that authenticate scheduler, workers and this client. Results hold neither these files nor their paths."""

    ca: PathName = Field(description="certificate (PEM) of the authority that signed all others")
    certificate: PathName = Field(description="this client's certificate")
    key: PathName = Field(description="its private key")


Directive = Annotated[str, StringConstraints(pattern=r"^-[^\s][^\r\n]*$")]


Word = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._,:@+-]*$")]


class Slurm(Strict):
    """The jobs of the queue, with `kind: slurm`. Each holds `processes` workers, or a single worker with GPUs."""

    partition: Word | None = Field(None, description="`sbatch -p`")
    account: Word | None = Field(None, description="`sbatch -A`")
    walltime: Annotated[str, StringConstraints(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]{2}){0,2}$")] = Field(
        "24:00:00", description="`sbatch -t`; when a job ends, another one takes over its unfinished work"
    )
    processes: PositiveInt = Field(1, description="workers per job, all on one node")
    interface: Word | None = Field(
        None,
        description="network on which scheduler and workers listen, for example `ib0`; default: that of the "
        "host's address",
    )
    directives: list[Directive] = Field([], description="more options of `sbatch`, for example `--constraint=a100`")
    wait: PositiveInt = Field(60, description="minutes to wait for the first worker")


def _loopback(address: str) -> bool:
    """Return whether host:port is certainly on this machine; `localhost` is the only name that counts."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Cluster(Strict):
    """The workers of a run: single-threaded processes on this machine or, with the last two kinds, on others."""

    kind: Literal["local", "gpu", "address", "slurm"] = Field(
        "local", description="workers on the cores, on the visible GPUs, of a running scheduler, or in jobs of a queue"
    )
    workers: PositiveInt | None = Field(
        None, description="default: one per core, or one per GPU; `slurm` has no default"
    )
    memory: Annotated[str, StringConstraints(pattern=r"^[0-9]+(\.[0-9]+)? ?[kMGT]i?B$")] | None = Field(
        None, description="per worker, for example `4 GB`; default: its share of the machine's memory"
    )
    dashboard: bool = Field(False, description="serve Dask's dashboard on 127.0.0.1:8787")
    gpus: bool = Field(False, description="whether each worker of an `address` or of `slurm` has a GPU")
    address: str | None = Field(None, description="of a scheduler, for example `tls://host:8786`")
    tls: Tls | None = Field(None, description="files for a `tls://` address")
    insecure: bool = Field(
        False, description="allow a `tcp://` address on another host: whoever reaches that port can run code there"
    )
    slurm: Slurm = Field(Slurm(), description="the jobs of the queue")

    @field_validator("address")
    @classmethod
    def _plain(cls, address: str | None) -> str | None:
        # Do not repeat the address: it may hold a password.
        if address is not None and "@" in address:
            raise ValueError("an address holds no user or password: authenticate with `tls`")
        if address is not None and not re.fullmatch(
            r"(tls|tcp)://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\]):[0-9]{1,5}", address
        ):
            raise ValueError("expected tls://host:port or tcp://host:port")
        return address

    @model_validator(mode="before")
    @classmethod
    def _taken_out(cls, raw: object) -> object:
        """Drop null values: a profile removes a setting with null, which Snakemake passes on as a word."""
        if not isinstance(raw, dict):
            return raw
        return {key: value for key, value in raw.items() if value not in (None, "null")}

    @model_validator(mode="after")
    def _agrees(self) -> "Cluster":
        if (self.kind == "address") != (self.address is not None):
            raise ValueError("`kind: address` and `address` go together")
        if self.address is None and (self.tls is not None or self.insecure):
            raise ValueError("`tls` and `insecure` are for `kind: address`; jobs of `slurm` get keys of their own")
        if self.address is not None:
            scheme, _, host = self.address.partition("://")
            if (scheme == "tls") != (self.tls is not None):
                raise ValueError("a `tls://` address and a section `tls` go together")
            if scheme == "tcp" and not _loopback(host) and not self.insecure:
                raise ValueError(
                    "tcp:// to another host: whoever reaches that port can run code there; use tls://, or say "
                    "`insecure: true`"
                )
            if self.dashboard:
                raise ValueError("dashboard: it belongs to the scheduler of the address, which has its own")
        if self.kind in ("address", "slurm") and self.memory is None:
            raise ValueError("memory: say what a worker may use, which cannot be found from here")
        if self.kind == "slurm" and self.workers is None:
            raise ValueError("workers: say how many")
        if self.kind != "slurm" and "slurm" in self.model_fields_set and self.slurm != Slurm():
            raise ValueError("the section `slurm` is for `kind: slurm`")
        if self.gpus and self.kind == "local":
            raise ValueError("gpus: use `kind: gpu`")
        if self.on_gpus and self.slurm.processes > 1:
            raise ValueError("slurm.processes: with GPUs a job holds one worker")
        return self

    @property
    def on_gpus(self) -> bool:
        """Return whether workers compute on GPUs; results on CPU cores differ in the last bits."""
        return self.kind == "gpu" or self.gpus
