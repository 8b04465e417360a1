"""What nothing in a results folder refers to any more: layers, dissections of layers, trainings, runs, manifests."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.plan.job import UNFINISHED
from pipeline.storage import store
from pipeline.storage.manifest import Manifest
from pipeline.upkeep.damage import SCRATCH, manifests


def folders(results: Path) -> list[Path]:
    """Folders that nothing refers to: no manifest, and no step that was begun and is to be taken up again.

    A damaged manifest stops this with `MicrotomeError`: what it refers to is not known.
    """
    used = _begun(results)
    for path in manifests(results):
        manifest = Manifest.read(path)
        for name in manifest.includes:
            layer, stem = (results / name).parent.parent, Path(name).stem
            used |= {layer, layer / stem.replace(".", "-", 1)}
            if manifest.stage == "extract" and (results / name).exists():
                tails = Manifest.read(results / name).result.get("tails")
                used |= {layer / f"{tails}.zarr"} if tails else set()
        if manifest.stage == "network" and "training" in manifest.result:
            used.add(path.parent.parent / manifest.result["training"])
        if manifest.stage == "randomize":
            used |= {path.parent.parent / "runs" / run["id"] for run in manifest.result["runs"].values()}
    found = []
    for layer in sorted(results.glob("*/layers/*/")):
        parts = sorted((*layer.glob("dissect-*/"), *layer.glob("tails-*.zarr/")))
        found += [part for part in parts if part not in used] if layer in used else [layer]
    for pattern, stage in (("ablation-predictions", "ablate"), ("probe-features", "probes")):
        for stores in sorted(results.glob(f"*/*/{pattern}/")):
            finished = list((stores.parent / "done").glob(f"{stage}.*.json"))
            kept = {Path(name).parts[1] for path in finished for name in Manifest.read(path).files if "/" in name}
            found += [folder for folder in sorted(stores.glob("*.zarr")) if finished and folder.name not in kept]
    # What is kept of earlier weights stays, but for what was cut short and what `repair` gave up.
    found += [home for home in sorted(results.glob("*/*/before/*/")) if not list(home.glob("done/before.*.json"))]
    trainings = sorted(results.glob("networks/*/training-*/"))
    found += [folder for folder in trainings if folder not in used and folder.parent not in used]
    found += [folder for folder in sorted(results.glob("randomization/*/runs/*/")) if folder not in used]
    lost = ["aside"] if list((results / SCRATCH / UNFINISHED).glob("*.json")) else ["aside", "blocks"]
    return found + [folder for name in lost if (folder := results / SCRATCH / name).is_dir()]


def _begun(results: Path) -> set[Path]:
    """Folders of steps that were begun and not finished."""
    found: set[Path] = set()
    for note in (results / SCRATCH / UNFINISHED).glob("*.json"):
        found |= {results / name for name in json.loads(note.read_text())["folders"]}
    return found


def remove(folder: Path) -> None:
    """Remove an unreferenced folder, its manifest first."""
    if folder.name.startswith("dissect-"):
        (folder.parent / "done" / f"{folder.name.replace('-', '.', 1)}.json").unlink(missing_ok=True)
    folder.with_suffix(".ledger").unlink(missing_ok=True)
    store.remove(folder)
