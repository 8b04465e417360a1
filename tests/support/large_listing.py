"""A data set of a million images that are not there: class folders, and a snapshot of what would lie in them."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data import snapshot
from pipeline.workers import client, resumable
from pipeline.workers.resumable import Done

CLASSES = 1000


def large(folder: Path, count: int) -> dict[str, Any]:
    """Make the folders, one image that can be opened, and the cached snapshot; return the configuration."""
    root, scratch = folder / "images", folder / "results" / ".microtome"
    for number in range(CLASSES):
        (root / f"n{number:08d}").mkdir(parents=True, exist_ok=True)
    names = [f"n{k // (count // CLASSES):08d}/image_{k:08d}.JPEG" for k in range(count // CLASSES * CLASSES)]
    Image.new("RGB", (300, 300)).save(root / names[0])
    for path in (root, *root.iterdir()):
        os.utime(path, ns=(10**18, 10**18))
    folders = {"": snapshot._folder_stamp(root, "")}
    folders |= {path.name: snapshot._folder_stamp(root, path.name) for path in root.iterdir()}
    size, time = np.arange(len(names)) + 100_000, np.full(len(names), 10**18)
    files = snapshot.Files(names, size, time, folders, 0)
    snapshot._write_cache(snapshot._cache_path(root, scratch), files, "")
    return {
        "name": "large",
        "results": str(folder / "results"),
        "datasets": {"large": {"kind": "imagefolder", "root": str(root), "resize": 256, "crop": 224}},
        "networks": {"resnet": {"torchvision": "resnet18", "weights": "random", "layers": ["layer4"]}},
    }


@contextlib.contextmanager
def decoded_by_nobody() -> Iterator[None]:
    """Within it, ingest does all of its own work, and its tasks come back at once without having decoded anything."""

    @contextlib.contextmanager
    def no_workers(*_: Any) -> Iterator[None]:
        yield None

    def answered(workers: Any, function: Any, tasks: Iterable[tuple], *_: Any) -> Iterator[Done]:
        for _, _, shard, *_ in tasks:
            files = {f"image/c/{shard}/0/0/0": (int(shard), int(shard))}
            yield Done(shard, {"": files}, {"content": f"{int(shard):032x}", "refused": {}})

    before = client.client, resumable.run_tasks
    client.client, resumable.run_tasks = no_workers, answered  # type: ignore[assignment]
    try:
        yield
    finally:
        client.client, resumable.run_tasks = before
