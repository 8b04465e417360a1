"""The parts of ids that stand for networks: what builds them, and their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import published_file
from pipeline.networks.published import weight_files
from pipeline.storage.identity import FileDigests


def architecture(spec: NetworkSpec, digests: FileDigests) -> dict[str, Any]:
    """Return the builder, its arguments and, if it is set, which output counts.

    For a module or a transformers model, the builder is the digests of its files.
    """
    chosen = {} if spec.output is None else {"output": spec.output}
    return _builder(spec, digests) | chosen


def _builder(spec: NetworkSpec, digests: FileDigests) -> dict[str, Any]:
    if spec.torchvision is not None:
        return {"torchvision": spec.torchvision, "arguments": spec.arguments}
    if spec.timm is not None:
        return {"timm": spec.timm, "arguments": spec.arguments}
    if spec.transformers is not None:
        return {"transformers": digests(published_file(spec) / "config.json"), "arguments": spec.arguments}
    assert spec.module is not None
    path, _, function = spec.module.rpartition(":")
    files = {} if spec.files is None else {"files": [digests(file) for file in spec.files]}
    return {"module": digests(path), "function": function, "arguments": spec.arguments} | files


def weights_digest(spec: NetworkSpec, digests: Callable[[Path], str]) -> str | dict[str, str]:
    """Return the sha256 of the checkpoint or published file; of each file if published weights have several."""
    if not spec.published:
        return digests(Path(spec.weights))
    path = published_file(spec)
    if spec.transformers is None:
        return digests(path)
    return {file.name: digests(file) for file in weight_files(path)}
