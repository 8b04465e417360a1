"""Networks that are used beside those that are examined: generators and experts, loaded once per worker."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks import identity
from pipeline.storage.identity import FileDigests
from pipeline.workers.devices import device

if TYPE_CHECKING:
    import torch


def made_of(spec: NetworkSpec, digests: FileDigests) -> dict[str, Any]:
    """Return what ids hold of a network by file: what builds it, and its weights."""
    return {"architecture": identity.architecture(spec, digests), "weights": identity.weights_digest(spec, digests)}


def network(spec: NetworkSpec, weights: str) -> torch.nn.Module:
    """Return this worker's copy of a network; refuse weights whose digest is no longer that of the run's beginning."""
    return _network(spec.model_dump_json(), weights)


@functools.lru_cache(maxsize=4)
def _network(json: str, weights: str) -> torch.nn.Module:
    from pipeline.networks.build import load
    from pipeline.networks.checkpoint import sha256

    spec = NetworkSpec.model_validate_json(json)
    assert spec.weights_file is not None
    if sha256(spec.weights_file) != weights:
        raise MicrotomeError(f"{spec.weights_file} changed since the run began: start it again")
    return load(spec).to(device())
