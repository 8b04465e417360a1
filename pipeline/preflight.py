"""Before any work: every network is built on the meta device, with its layers and its checkpoint's names and shapes.

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
from pathlib import Path
from typing import Any

from pipeline import published
from pipeline.config import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.identity import digest
from pipeline.manifest import write_atomically
from pipeline.networks import NetworkSpec
from pipeline.plan import Plan, Step

VERSION = 2


def check(plan: Plan) -> None:
    """Inspect what has not been inspected yet; raise `MicrotomeError` that says everything that is wrong."""
    unknown = [step for step in _steps(plan) if not _kept(plan, step).exists()]
    if not unknown:
        return
    print(f"inspecting {', '.join(step.name.removeprefix('extract ') for step in unknown)}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder, "requests.json"), Path(folder, "answers.json")
        asked.write_text(json.dumps([_request(plan, step) for step in unknown]))
        process = subprocess.run(
            [sys.executable, "-m", "pipeline.inspection", str(asked), str(answered)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        )
        if process.returncode:
            raise MicrotomeError(f"the inspection of the networks failed with exit status {process.returncode}")
        answers = json.loads(answered.read_text())
    errors = []
    for step, answer in zip(unknown, answers, strict=True):
        if "error" in answer:
            errors.append(f"network {step.network!r} on {step.dataset!r}: {answer['error']}")
        else:
            write_atomically(_kept(plan, step), json.dumps(answer["result"], indent=1))
    if errors:
        raise MicrotomeError("\n  ".join(errors))
    for step in unknown:
        assert step.network is not None
        size = plan.steps[step.parents[0]].settings["size"]
        if said := published.advice(plan.networks[step.network], size, plan.scratch):
            print(f"{step.network} on {step.dataset}: {said}", file=sys.stderr)


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
    return lines


def _steps(plan: Plan) -> list[Step]:
    """The untrained control has the architecture of its network: one inspection does for both."""
    return [step for step in plan.of_stage("extract") if not (step.network or "").endswith(UNTRAINED)]


def _kept(plan: Plan, step: Step) -> Path:
    network = next(plan.steps[path] for path in step.parents if plan.steps[path].stage == "network")
    asked = _request(plan, step)
    del asked["network"], asked["images"]
    return plan.scratch / "inspected" / f"{digest([VERSION, network.id, asked])}.json"


def _request(plan: Plan, step: Step) -> dict[str, Any]:
    assert step.network is not None
    ingest = next(plan.steps[path] for path in step.parents if plan.steps[path].stage == "ingest")
    network = plan.networks[step.network]
    return {
        "network": NetworkSpec.of(network).model_dump(),
        "input_shape": [network.preprocessing.channels, *ingest.settings["size"]],
        "layers": network.layers,
        "special_tokens": network.special_tokens,
        "images": ingest.settings["images"],
    }
