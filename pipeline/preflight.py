"""Before any work: every network is built on the meta device, with its layers and its checkpoint's names and shapes.
Segmenters too, with their outputs and class lists.

That needs torch, so it runs in a process of its own, once for a network, a size of images and a choice of layers; what
was found is kept by that id.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import published
from pipeline.config import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.identity import digest
from pipeline.manifest import write_atomically
from pipeline.networks import NetworkSpec
from pipeline.plan import Plan, Step

VERSION = 1


@dataclass(frozen=True)
class Question:
    """Something to inspect: how messages call it, where its answer is kept, and the request."""

    name: str
    kept: Path
    request: dict[str, Any]


def check(plan: Plan) -> None:
    """Inspect what has not been inspected yet; raise `MicrotomeError` that says everything that is wrong."""
    unknown = [question for question in questions(plan) if not question.kept.exists()]
    if not unknown:
        return
    print(f"inspecting {', '.join(question.name for question in unknown)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "requests.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps([question.request for question in unknown]))
        process = subprocess.run(
            [sys.executable, "-m", "pipeline.inspection", str(asked), str(answered)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        if process.returncode:
            raise MicrotomeError(f"the inspection of the networks failed with exit status {process.returncode}")
        answers = json.loads(answered.read_text())
    errors = []
    for question, answer in zip(unknown, answers, strict=True):
        if "error" in answer:
            errors.append(f"{question.name}: {answer['error']}")
        else:
            write_atomically(question.kept, json.dumps(answer["result"], indent=1))
    if errors:
        raise MicrotomeError("\n  ".join(errors))
    asked_of = {question.kept for question in unknown}
    for step in (step for step in _steps(plan) if _kept(plan, step) in asked_of):
        assert step.network is not None
        size = plan.steps[step.parents[0]].settings["size"]
        if said := published.advice(plan.networks[step.network], size, plan.scratch):
            print(f"{step.network} on {step.dataset}: {said}", file=sys.stderr)


def questions(plan: Plan) -> list[Question]:
    """What has to be inspected for a plan: networks, then segmenters, each with every data set that it sees."""
    networks = [
        Question(f"network {step.network!r} on {step.dataset!r}", _kept(plan, step), _request(plan, step))
        for step in _steps(plan)
    ]
    return [*networks, *_segmenters(plan)]


def sizes(plan: Plan) -> list[str]:
    """One line a network and data set: layers, parameters, and the bytes of its activations before compression."""
    lines = []
    for step in _steps(plan):
        found = json.loads(_kept(plan, step).read_text())
        count = len(found["layers"])
        layers = [layer["name"] for layer in found["layers"]]
        named = ", ".join(layers if count <= 4 else [*layers[:2], "...", layers[-1]])
        values = sum(math.prod(layer["shape"]) for layer in found["layers"])
        images = plan.steps[step.parents[0]].settings["images"]
        lines.append(
            f"{step.network} on {step.dataset}: {found['parameters']:,} parameters, {count} layers ({named}), "
            f"at most {2 * values * images / 1e9:.3f} GB of activations for {images:,} images"
        )
        ablated = _ablated(plan, step)
        if ablated is not None:
            lines += [_ablation(ablated, found, layer, flops) for layer, flops in found["ablation"].items()]
    for question in _segmenters(plan):
        concepts = json.loads(question.kept.read_text())["concepts"]
        named = ", ".join(f"{len(names)} of {category}" for category, names in concepts.items())
        lines.append(f"{question.name}: concepts, {named}")
    return lines


def _ablation(step: Step, found: Mapping[str, Any], layer: str, flops: float | None) -> str:
    """What removing each unit of a layer costs, sets of units aside; units that make no difference cost nothing."""
    how = step.settings["ablate"]
    units = next(each["shape"][0] for each in found["layers"] if each["name"] == layer)
    splits = len({how["rank"], how["judge"]})
    images = f"{how['images']:,} images of each of {splits} splits" if how["images"] else f"all of {splits} splits"
    cost = f"{flops / 1e6:.3g} MFLOP" if flops is not None else "a whole forward"
    return f"{step.network} on {step.dataset}: {units} units of {layer} removed from {images}, {cost} for each pair"


def _steps(plan: Plan) -> list[Step]:
    """The untrained control has the architecture of its network: one inspection does for both."""
    return [step for step in plan.of_stage("extract") if not (step.network or "").endswith(UNTRAINED)]


def _segmenters(plan: Plan) -> list[Question]:
    found = []
    for step in plan.of_stage("concepts"):
        size = next(plan.steps[path] for path in step.parents).settings["size"]
        for name, made_of in step.settings.get("segmenters", {}).items():
            kept = plan.scratch / "inspected" / f"{digest([VERSION, made_of, size])}.json"
            request = {"segmenter": plan.config.segmenters[name].model_dump(), "size": size}
            found.append(Question(f"segmenter {name!r} on {step.dataset!r}", kept, request))
    return found


def _kept(plan: Plan, step: Step) -> Path:
    network = next(plan.steps[path] for path in step.parents if plan.steps[path].stage == "network")
    asked = _request(plan, step)
    del asked["network"], asked["images"]
    return plan.scratch / "inspected" / f"{digest([VERSION, network.id, asked])}.json"


def _request(plan: Plan, step: Step) -> dict[str, Any]:
    assert step.network is not None
    ingest = next(plan.steps[path] for path in step.parents if plan.steps[path].stage == "ingest")
    network = plan.networks[step.network]
    request = {
        "network": NetworkSpec.of(network).model_dump(),
        "input_shape": [network.preprocessing.channels, *ingest.settings["size"]],
        "layers": network.layers,
        "special_tokens": network.special_tokens,
        "images": ingest.settings["images"],
    }
    ablated = _ablated(plan, step)
    if ablated is not None:
        request["ablate"] = {
            "layers": ablated.settings["ablate"]["layers"],
            "classes": ablated.settings["classes"],
        }
    return request


def _ablated(plan: Plan, step: Step) -> Step | None:
    """The step that removes units of the same network on the same data set."""
    return next((s for s in plan.of_stage("ablate") if (s.dataset, s.network) == (step.dataset, step.network)), None)
