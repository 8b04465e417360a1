"""What a change costs, on the demo's two networks: each change is made to a finished run, and the work is counted.

    PYTHONPATH=. python tests/support/changes.py        the table of docs/incremental.md

Counted from outside: lines that ledgers gained, one for each shard that was written; tasks of forwards, which manifests
tell; results of layers that are new; and which steps ran at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from experiments import labelled_images, segmentation, write_image

from pipeline.plan import settle
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages import registry
from pipeline.stages.report import stage as report
from pipeline.storage.manifest import Manifest

ROOT = Path(__file__).parents[2]
NETWORKS = ROOT / "config" / "networks" / "scenes.py"
CNN_LAYERS = ["features.conv2", "features.conv4", "features.conv6"]
VIT_LAYERS = [f"encoder.layers.encoder_layer_{block}" for block in range(3)]
SHARDS = 3  # of 16 images each, that hold the validation images


@dataclass
class Work:
    """What a run did. By network: shards put through it (`forwards`), layers written and layers counted, by name, and
    minibatches put through it, for the similarity of layers or for sight. Shards are `ablated` without units and
    without sets; runs on corrupted data are `trained`; shards are `explained` by one method of attribution each, and
    what it says is `audited` by one test each, on small functions or on shards of a network; parts of a layer's units
    are `drawn`, and shards are `attacked` by one attack each."""

    steps: list[str] = field(default_factory=list)
    decoded: int = 0
    labelled: int = 0
    forwards: dict[str, int] = field(default_factory=dict)
    written: dict[str, list[str]] = field(default_factory=dict)
    counted: dict[str, list[str]] = field(default_factory=dict)
    categories: set[str] = field(default_factory=set)
    minibatches: dict[str, int] = field(default_factory=dict)
    ablated: int = 0
    trained: int = 0
    explained: dict[str, int] = field(default_factory=dict)
    audited: dict[str, int] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    attacked: dict[str, int] = field(default_factory=dict)
    shard_writes: int = 0

    def stages(self, network: str | None = None) -> list[str]:
        """The stages that ran, of one network (its untrained control aside) or of any."""
        steps = [step.split(" ") for step in self.steps]
        return sorted({words[0] for words in steps if network is None or words[-1] == network})


@dataclass
class Change:
    """A change as the table names it, what makes it in a finished experiment, and the run that follows it."""

    name: str
    allowed: str
    make: Callable[[Path, dict[str, Any]], dict[str, Any] | None]
    around: Callable[[], Any] | None = None


def experiment(folder: Path) -> dict[str, Any]:
    """The demo's networks with checkpoints of their own, on 40 scenes of 32 x 32 pixels."""
    networks = {
        "cnn": {"module": f"{NETWORKS}:cnn", "weights": str(folder / "cnn.pt"), "layers": CNN_LAYERS},
        "vit": {
            "module": f"{NETWORKS}:vit",
            "weights": str(folder / "vit.pt"),
            "arguments": {"image_size": 32},
            "layers": VIT_LAYERS,
        },
    }
    for seed, (name, network) in enumerate(networks.items(), start=1):  # 0 is that of the untrained control
        if not (folder / f"{name}.pt").exists():
            write_weights(folder / f"{name}.pt", name, network.get("arguments", {}), seed)
    return {
        "name": "changes",
        "results": str(folder / "results"),
        "datasets": {
            "scenes": {"kind": "scenes", "size": 32, "shard_images": 16, "images": {"train": 0, "validation": 40}}
        },
        "networks": {name: network | {"numerics": {"micro_batch": 8}} for name, network in networks.items()},
        "report": {"cards": 2},
        "figures": {"formats": []},
    }


def photographs(folder: Path) -> dict[str, Any]:
    """Ten images with label maps in three shards, and a small network."""
    labelled_images(folder, [f"town/{i}" for i in range(10)])
    return segmentation(folder)


def write_weights(path: Path, function: str, arguments: dict[str, Any], seed: int) -> None:
    import torch

    from pipeline.config.networks import NetworkSpec
    from pipeline.networks.build import load

    made = load(NetworkSpec(module=f"{NETWORKS}:{function}", weights="random", arguments=arguments, seed=seed))
    torch.save(made.state_dict(), path)


def other_weights(path: Path, prefixes: tuple[str, ...] = ("",)) -> None:
    """Change the parameters whose names begin so; the file keeps its size and gets an older time."""
    import torch

    before = path.stat()
    state = torch.load(path, weights_only=True)
    for name, tensor in state.items():
        if name.startswith(prefixes) and tensor.is_floating_point():
            tensor.mul_(1.25)
    torch.save(state, path)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**12))


def retrain_elsewhere(folder: Path, raw: dict[str, Any]) -> None:
    """Replace a trained network by what another machine made of the same recipe: other weights under the same id."""
    from pipeline.networks.checkpoint import read, sha256, write_safetensors
    from pipeline.storage.identity import crc32c

    made = planner.make(run_experiment.parse(raw))
    step = made.step("network", network="cnn")
    home = made.results / "networks" / "cnn"
    state = read(home / "model.safetensors")
    write_safetensors(home / "model.safetensors", {name: value * 1 for name, value in state.items()} | _nudged(state))
    manifest = made.manifest(step)
    facts = dict(manifest.result) | {"weights_sha256": sha256(home / "model.safetensors")}
    data = (home / "model.safetensors").read_bytes()
    files = manifest.files | {"model.safetensors": (len(data), crc32c(data))}
    Manifest(
        **{**manifest.__dict__, "digest": facts["weights_sha256"], "result": facts, "files": files}
    ).write(made.results / step.manifest)  # fmt: skip


def _nudged(state: dict[str, Any]) -> dict[str, Any]:
    return {"features.conv1.0.weight": state["features.conv1.0.weight"] * 1.01}


def run(raw: dict[str, Any]) -> Work:
    """Make what is wanted and not there, stage by stage as a library, and say what was done."""
    wanted = run_experiment.parse(raw)
    results = Path(wanted.results)
    ledgers_before = {path: len(shard_lines(path)) for path in results.rglob("*.ledger")}
    counted_before = set(results.rglob("layers/*/done/dissect.*.json"))
    made = planner.make(wanted)
    settle.settle(made)
    work = Work()
    for job in registry.jobs(made):
        if not job.manifest.exists():
            job.stage.run(job)
            work.steps.append(job.name)
    for path in results.rglob("*.ledger"):
        new = shard_lines(path)[ledgers_before.get(path, 0) :]
        if path.name in ("grams.ledger", "sight-minibatches.ledger"):
            if new:
                work.minibatches[path.parent.name] = len(new)
            continue
        if path.name == "runs.ledger":
            work.trained += len(new)
            continue
        if "cells" in path.parts:
            name = f"{path.parent.name} {path.stem}"
            work.audited |= {name: len(new)} if new else {}
            continue
        if path.parent.parent.name == "attributions":
            name = f"{path.parents[2].name} {path.stem}"
            work.explained |= {name: len(new)} if new else {}
            continue
        if path.parent.parent.name == "visualizations":
            name = f"{path.parents[2].name} {path.stem}"
            work.drawn |= {name: len(new)} if new else {}
            continue
        if path.parent.parent.name == "attacks":
            name = f"{path.parents[2].name} {path.stem}"
            work.attacked |= {name: len(new)} if new else {}
            continue
        work.shard_writes += len(new)
        if path.name == "images.ledger":
            work.decoded += len(new)
        elif path.parent.name == "ablation-predictions":
            work.ablated += len(new)
        elif path.name == "concepts.ledger":
            work.labelled += len(new)
    for step in made.of_stage("extract"):
        ran = step.name in work.steps
        facts = made.manifest(step)
        name = str(step.network)
        work.forwards[name] = facts.provenance["made"] if ran else 0
        work.written[name], work.counted[name] = [], []
        for layer in facts.result["layers"]:
            home = results / str(step.dataset) / "layers" / layer["id"]
            ledger = home / "activations.ledger"
            if ran and len(shard_lines(ledger)) > ledgers_before.get(ledger, 0):
                work.written[name].append(layer["name"])
            new = set((home / "done").glob("dissect.*.json")) - counted_before
            if new:
                work.counted[name].append(layer["name"])
            work.categories |= {c for path in new for c in Manifest.read(path).provenance["counted"]}
    return work


def shard_lines(ledger: Path) -> list[str]:
    """The entries of a ledger that stand for shards."""
    if not ledger.exists():
        return []
    return [line for line in ledger.read_text().splitlines() if json.loads(line.rpartition("\t")[0])["files"]]


@contextmanager
def version_raised(stage: str) -> Iterator[None]:
    version = registry.STAGES[stage].version + 1
    raised = dataclasses.replace(registry.STAGES[stage], version=version)
    inside = f"pipeline.stages.{stage}."
    modules = [each for name, each in sys.modules.items() if name.startswith(inside) and hasattr(each, "VERSION")]
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(registry.STAGES, {stage: raised}))
        for module in modules:
            stack.enter_context(mock.patch.object(module, "VERSION", version))
        yield


@contextmanager
def report_changed() -> Iterator[None]:
    before = report.settings_of
    with mock.patch.object(report, "settings_of", lambda draft: before(draft).model_copy(update={"code": "changed"})):
        yield


def changed(raw: dict[str, Any], *path: str, to: Any) -> dict[str, Any]:
    """The configuration with one key set to another value."""
    found: dict[str, Any] = json.loads(json.dumps(raw))
    at = found
    for key in path[:-1]:
        at = at.setdefault(key, {})
    at[path[-1]] = to
    return found


def _copied(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Checkpoints touched, and copied elsewhere under another name."""
    os.utime(folder / "vit.pt")
    shutil.copy(folder / "cnn.pt", folder / "copy.pt")
    return changed(raw, "networks", "cnn", "weights", to=str(folder / "copy.pt"))


def _second_network(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    write_weights(folder / "more.pt", "cnn", {}, seed=7)
    return changed(raw, "networks", "more", to=raw["networks"]["cnn"] | {"weights": str(folder / "more.pt")})


def with_training(raw: dict[str, Any]) -> dict[str, Any]:
    """The CNN trained here for a few steps, its units removed from all images of both splits."""
    raw = changed(raw, "networks", "cnn", "weights", to="train")
    raw = changed(raw, "networks", "cnn", "ablate", to={"sizes": [1, 4]})
    raw = changed(raw, "datasets", "scenes", "images", to={"train": 32, "validation": 40})
    return changed(raw, "networks", "cnn", "train", to={"dataset": "scenes", "recipe": {"steps": 3, "batch_size": 8}})


def compared(raw: dict[str, Any]) -> dict[str, Any]:
    """The layers of the two networks compared, in two minibatches."""
    both = {"compare": {"both": {"networks": ["cnn", "vit"]}}, "images": 32, "minibatch": 16}
    return changed(raw, "similarity", to=both)


def explained(raw: dict[str, Any], *more: str, **own: dict[str, Any]) -> dict[str, Any]:
    """Which pixels made the two networks say so."""
    methods = dict.fromkeys(("saliency", "gradient_x_input", *more))
    return changed(raw, "attribute", to={"mine": {"methods": methods | own}})


def drawn(raw: dict[str, Any]) -> dict[str, Any]:
    """What 16 units of the CNN want to see, in two parts, and projections of the first eight."""
    wishes = {"networks": ["cnn"], "units": {"features.conv6": list(range(16))}}
    wishes |= {"projections": {"images": 2, "units": 8}, "maximise": {"steps": 2, "restarts": 1}}
    return changed(raw, "visualize", to={"mine": wishes})


def _drawn_before(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(drawn(raw))
    return _other_head(folder, drawn(raw))


def _maco_beside(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(drawn(raw))
    return changed(drawn(raw), "visualize", "mine", "maximise", "expert", to=["l2", "tv", "maco"])


def _projected_again(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(drawn(raw))
    methods = ["guided_backprop", "guided_backprop_unswitched"]
    return changed(drawn(raw), "visualize", "mine", "projections", "methods", to=methods)


def attacked(raw: dict[str, Any], *bounds: int) -> dict[str, Any]:
    """Attacks on the CNN towards any other class, within one bound and these."""
    fooled = {"networks": ["cnn"], "untargeted": True, "start": "predicted", "methods": ["pgd"], "steps": 2}
    return changed(raw, "attack", to={"mine": fooled | {"norms": {"linf": [4, *bounds]}}})


def _attacked_before(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(attacked(raw))
    return attacked(raw, 8)


def _explained_before(folder: Path, raw: dict[str, Any], after: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    run(explained(raw))
    return after()


def audited(raw: dict[str, Any], *more: str) -> dict[str, Any]:
    """What the CNN's explanations say, put to the laws."""
    asked = {"attributions": "mine", "tests": ["axioms"], "networks": ["cnn"]}
    return changed(explained(raw, *more), "audit", to={"mine": asked})


def _audited_before(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(audited(raw))
    return audited(raw, "grad_cam")


def black_boxes(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    """Saliency beside methods that show or cover the same cells of a grid."""
    own = {name: {"samples": 16, "segments": {"kind": "grid", "cells": [2, 2]}} for name in names}
    return explained(raw, **own)


def _relevance(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(explained(raw, "lrp"))
    return explained(raw, lrp={"layers": {"cnn": ["features.conv6"]}})


def _black_boxes(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(black_boxes(raw, "lime"))
    return black_boxes(raw, "lime", "kernel_shap")


def _other_head(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    other_weights(folder / "cnn.pt", ("head", "classifier", "fc"))
    return raw


def randomized(raw: dict[str, Any], share: float = 0.5) -> dict[str, Any]:
    """A small network trained on true and on corrupted labels."""
    asked = {
        "dataset": "scenes", "epochs": 1, "batch_size": 8,
        "networks": {"mlp": {"module": f"{NETWORKS.parent}/zhang2017.py:mlp", "arguments": {"num_classes": 12}}},
        "runs": {
            "true": {"network": "mlp"},
            "half": {"network": "mlp", "corruption": "corrupted_labels", "share": share},
        },
    }  # fmt: skip
    raw = changed(raw, "datasets", "scenes", "images", to={"train": 24, "validation": 40})
    return changed(raw, "randomize", to={"noise": asked})


def _replaced_beside(folder: Path, raw: dict[str, Any]) -> dict[str, Any]:
    run(compared(raw))
    other_weights(folder / "cnn.pt")
    return compared(raw)


CHANGES = [
    Change("nothing", "none", lambda folder, raw: raw),
    Change("checkpoints touched, one copied to another name", "none", _copied),
    Change(
        "checkpoint of the CNN replaced: other weights, same size, older time", "all of it, nothing of the ViT",
        lambda folder, raw: other_weights(folder / "cnn.pt"),
    ),
    Change(
        "head of the CNN trained again", "its logits", lambda folder, raw: other_weights(folder / "cnn.pt", ("head",))
    ),
    Change(
        "CNN fine-tuned from its fifth convolution on", "layers from there on",
        lambda folder, raw: other_weights(folder / "cnn.pt", ("features.conv5", "features.conv6", "head")),
    ),
    Change(
        "ViT fine-tuned from its second block on", "blocks from there on",
        lambda folder, raw: other_weights(
            folder / "vit.pt", (f"{VIT_LAYERS[1]}.", f"{VIT_LAYERS[2]}.", "encoder.ln", "heads")
        ),
    ),
    Change(
        "one more layer of the CNN", "that layer",
        lambda folder, raw: changed(raw, "networks", "cnn", "layers", to=[*CNN_LAYERS, "features.conv3"]),
    ),
    Change("one more network", "that network", _second_network),
    Change(
        "one more source of concepts (colours of the pixels)", "label maps and IoU of its concepts",
        lambda folder, raw: changed(raw, "datasets", "scenes", "concepts", to=["truth", "pixels"]),
    ),
    Change(
        "another quantile", "thresholds and IoU, from the stores",
        lambda folder, raw: changed(raw, "datasets", "scenes", "dissect", to={"quantile": 0.02}),
    ),
    Change(
        "version of the dissection raised", "thresholds and IoU",
        lambda folder, raw: raw, lambda: version_raised("dissect"),
    ),
    Change(
        "version of the extraction raised", "layers, and what reads them",
        lambda folder, raw: raw, lambda: version_raised("extract"),
    ),
    Change(
        "ablation of the CNN switched on", "the ablation",
        lambda folder, raw: changed(raw, "networks", "cnn", "ablate", to={"rank": "validation", "sizes": [1, 4]}),
    ),
    Change(
        "calibration switched on", "the calibrations, from stored logits",
        lambda folder, raw: changed(raw, "calibrate", to={"splits": 2, "methods": ["temperature", "isotonic"]}),
    ),
    Change(
        "probes of the CNN switched on", "the probes, from stored activations",
        lambda folder, raw: changed(raw, "probes", to={"networks": ["cnn"], "fit": "validation", "draws": 2}),
    ),
    Change(
        "similarity of the two switched on", "their minibatches", lambda folder, raw: compared(raw),
    ),
    Change(
        "checkpoint of the CNN replaced, where the two are compared", "all of the CNN, nothing of the ViT",
        lambda folder, raw: _replaced_beside(folder, raw),
    ),
    Change(
        "sight of the two switched on", "their minibatches",
        lambda folder, raw: changed(raw, "sight", to={"images": 32, "minibatch": 16, "gradients": 2}),
    ),
    Change(
        "attribution of the two switched on, by two methods", "their shards, by each method",
        lambda folder, raw: explained(raw),
    ),
    Change(
        "one more method of attribution", "their shards, by that method",
        lambda folder, raw: _explained_before(folder, raw, lambda: explained(raw, "grad_cam")),
    ),
    Change(
        "relevance of the units of a layer by LRP", "its shards, and no map again", _relevance,
    ),
    Change(
        "Kernel SHAP beside LIME, of the same segments", "their shards, by that method", _black_boxes,
    ),
    Change(
        "head of the CNN trained again, where its images are explained", "its logits and explanations",
        lambda folder, raw: _explained_before(folder, raw, lambda: _other_head(folder, explained(raw))),
    ),
    Change(
        "one more method of attribution, where the CNN's are audited", "its shards, by that method", _audited_before,
    ),
    Change("pictures of units of the CNN switched on", "their parts", lambda folder, raw: drawn(raw)),
    Change("head of the CNN trained again, where its units are drawn", "its logits, and no unit again", _drawn_before),
    Change("pictures by MACO beside those of pixels", "the parts of MACO", _maco_beside),
    Change("other rules of projection, where units are drawn", "projections, and no picture again", _projected_again),
    Change("attacks on the CNN switched on", "their shards", lambda folder, raw: attacked(raw)),
    Change("one more bound of attacks on the CNN", "its shards, within that bound", _attacked_before),
    Change("text or code of the report", "the report", lambda folder, raw: raw, report_changed),
]  # fmt: skip


def apply(change: Change, base: Path, folder: Path) -> Work:
    """Copy a finished experiment, make one change to it, and run it again."""
    shutil.copytree(base, folder)
    raw = experiment(folder)
    raw = change.make(folder, raw) or raw
    if change.around is None:
        return run(raw)
    with change.around():
        return run(raw)


IMAGES = {
    "one image changed": lambda folder: write_image(folder, "town/3", np.full((16, 16, 3), 90, np.uint8)),
    "one image deleted": lambda folder: (folder / "images/town/3.png").unlink(),
    "three images added": lambda folder: labelled_images(folder, ["street/x", "street/y", "street/z"]),
    "all images touched": lambda folder: [os.utime(path) for path in (folder / "images").rglob("*.png")],
}


def table(folder: Path) -> Iterator[str]:
    """The rows of the table in the docs."""
    yield (
        "| change | allowed | images decoded | label maps | forwards | layers written | layers counted | ablated | "
        "minibatches | runs trained | explained | audited | drawn | attacked | steps |"
    )
    yield "|" + "---|" * 15
    base = folder / "base"
    base.mkdir()
    yield _row("(the first run)", "everything", run(experiment(base)))
    for at, change in enumerate(CHANGES):
        yield _row(change.name, change.allowed, apply(change, base, folder / str(at)))
    trained = folder / "trained"
    trained.mkdir()
    raw = with_training(experiment(trained))
    run(raw)
    raw = changed(raw, "datasets", "scenes", "images", to={"train": 32, "validation": 44})
    yield _row("four validation images added; the CNN is trained on others", "their shard; no training", run(raw))
    noise = folder / "noise"
    noise.mkdir()
    raw_noise = experiment(noise)
    run(randomized(raw_noise))
    yield _row("one line of two randomization runs", "that run", run(randomized(raw_noise, 0.6)))
    retrain_elsewhere(trained, raw)
    yield _row("the trained CNN of another machine: same recipe, other weights", "what read the old weights", run(raw))
    for at, (name, change) in enumerate(IMAGES.items()):
        own = folder / f"images-{at}"
        own.mkdir()
        raw = photographs(own)
        run(raw)
        change(own)
        yield _row(f"{name} (other data set, 3 shards)", "their shards", run(raw))


def _row(name: str, allowed: str, work: Work) -> str:
    forwards = sum(work.forwards.values())
    written, counted = (sum(map(len, each.values())) for each in (work.written, work.counted))
    minibatches = sum(work.minibatches.values())
    shards = (work.decoded, work.labelled, forwards, written, counted, work.ablated, minibatches)
    maps = (
        sum(work.explained.values()),
        sum(work.audited.values()),
        sum(work.drawn.values()),
        sum(work.attacked.values()),
    )
    made = (*shards, work.trained, *maps, len(work.steps))
    return "| " + " | ".join((name, allowed, *(str(count or "–") for count in made))) + " |"


def main() -> None:
    from pipeline.config.cluster import Cluster
    from pipeline.workers import client
    from pipeline.workers import pool as cluster

    with tempfile.TemporaryDirectory() as folder, cluster.pool(Cluster(workers=1), Path(folder, "pool")) as address:
        os.environ[client.ADDRESS] = str(address)
        for line in table(Path(folder)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
