"""Keep a network's results when other weights replace it, so that a report can show before and after.

Writes, when other weights come under a network's name,
    <dataset>/<network>/before/<first 20 digits of the old weights' sha256>/
        units.csv, units-permuted.csv, layers.json, logits.zarr   as they were
        facts.json                                                weights_sha256, accuracy, images
        done/before.<the same digits>.json                        manifest: what these files were, and when replaced
The stores of the old layers stay until `make gc`; these small files stay until somebody deletes them.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import MicrotomeError
from pipeline.storage import provenance
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c, digest
from pipeline.storage.manifest import Files, Manifest, latest
from pipeline.storage.object_storage import objects_of

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.plan.job import Job

FOLDER = "before"
TABLES = ("units.csv", "units-permuted.csv", "layers.json")


def keep(job: Job) -> None:
    """Keep the finished results of other weights before they are replaced, if this network on this data set has any.

    The first stage that overwrites them calls this, before it removes its own manifest.
    """
    from pipeline.storage.store import remove

    folder, images, weights = job.folder, job.images, job.model.sha256
    remove(folder / FOLDER / weights[:20])  # these weights are back
    old = _finished_weights(job)
    if old is None or old == weights:
        return
    home = folder / FOLDER / old[:20]
    if home.exists():
        return
    temporary = folder / FOLDER / f".{old[:20]}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for name in TABLES:
        if (folder / name).exists():
            shutil.copy2(folder / name, temporary / name)
    facts: dict[str, Any] = {"weights_sha256": old}
    files: Files = {}
    if (folder / "logits.zarr").is_dir():
        # Chunk files are replaced and never changed, so links to them cost nothing and keep their content.
        shutil.copytree(folder / "logits.zarr", temporary / "logits.zarr", copy_function=_link)
        if objects := objects_of(folder / "logits.zarr"):
            files = {f"logits.zarr/{name}": objects.copy(name, home / "logits.zarr") for name in objects.sizes()}
        facts |= measured(folder / "logits.zarr", images)
    write_atomically(temporary / "facts.json", json.dumps(facts, indent=1))
    for path in sorted(path for path in temporary.rglob("*") if path.is_file()):
        data = path.read_bytes()
        files[path.relative_to(temporary).as_posix()] = (len(data), crc32c(data))
    Manifest(
        stage=FOLDER,
        id=home.name,
        digest=digest(files),
        files=files,
        provenance=provenance.provenance() | {"began": time.time()},
    ).write(temporary / "done" / f"{FOLDER}.{home.name}.json")
    temporary.rename(home)


def _link(source: str, target: str) -> None:
    if Path(source).name == "zarr.json":  # rewritten in place when images are added
        shutil.copy2(source, target)
        return
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _finished_weights(job: Job) -> str | None:
    """Return the sha256 of the weights of the finished dissection in this folder; None if there is none."""
    folder = job.folder
    aside = job.scratch / "aside" / folder.relative_to(job.results) / "done"
    for done in (folder / "done", aside):
        dissected, extracted = latest(done, "dissect"), latest(done, "extract")
        if dissected is None or extracted is None or not _is_written(folder / "units.csv", dissected):
            continue
        if _digest_of(dissected, "extract") == extracted.digest:
            return _digest_of(extracted, "network")
    return None


def _is_written(file: Path, manifest: Manifest) -> bool:
    """Return whether a file matches a manifest: an older manifest may describe an older file."""
    try:
        data = file.read_bytes()
    except OSError:
        return False
    return manifest.files.get(file.name) == (len(data), crc32c(data))


def _digest_of(manifest: Manifest, stage: str) -> str | None:
    """Return the output digest of the parent of a stage, as it was read."""
    return next((value for path, value in manifest.parents.items() if Path(path).name.startswith(f"{stage}.")), None)


def measured(logits: Path, images: Images) -> dict[str, Any]:
    """Return the accuracy of a network with these logits on the labelled images, and how many they are.

    If a shard's logits are damaged or cannot be matched with labels, or an image has one logit alone, the result has no
    accuracy.
    """
    import zarr

    from pipeline.storage.engine import Located

    try:
        array = zarr.open_array(Located(logits, read_only=True), path="logits", mode="r", zarr_format=3)
        values, label = np.asarray(array[:]), np.asarray(images.reader()["label"][:])
    except (OSError, ValueError, KeyError, RuntimeError, MicrotomeError):
        return {"accuracy": None, "images": 0}
    count = min(len(values), len(label))
    values, label = values[:count], label[:count]
    counted = np.isfinite(values).all(1) & (label >= 0) & np.asarray(images.reader()["valid"][:count])
    if not counted.any() or values.shape[1] < 2:
        return {"accuracy": None, "images": 0}
    right = values[counted].argmax(1) == label[counted]
    return {"accuracy": float(right.mean()), "images": int(counted.sum())}


def kept(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """List the kept results of earlier weights in a network's folder, with the facts of each; the last replaced first.

    Raises `MicrotomeError` if a file differs from what was kept; `make repair` then drops all results of these weights.
    """
    manifests = [Manifest.read(path) for path in (folder / FOLDER).glob(f"*/done/{FOLDER}.*.json")]
    found = []
    for manifest in sorted(manifests, key=lambda manifest: -manifest.provenance["began"]):
        home = folder / FOLDER / manifest.id
        for name in manifest.files:
            if "/" not in name and not _is_written(home / name, manifest):
                raise MicrotomeError(
                    f"{home / name} is not what was kept: `make verify` finds all damage, and `make repair` gives up "
                    f"what is kept of these weights"
                )
        found.append((home, json.loads((home / "facts.json").read_text())))
    return found
