"""Before any work: every network is built on the meta device, with its layers and its checkpoint's names and shapes.
Networks that runs train too, with their logits, and segmenters, with their outputs and class lists.

That needs torch, so it runs in a process of its own, once for a network, a size of images and a choice of layers; what
was found is kept by that id.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.config.core import UNTRAINED, Network, Segmenter
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import published
from pipeline.networks.build import NetworkSpec
from pipeline.networks.layer import fits
from pipeline.plan.step import Plan, Step
from pipeline.storage.identity import digest
from pipeline.storage.manifest import write_atomically
from pipeline.workers import tls
from pipeline.workers.processes import in_own_process

VERSION = 4
LIBRARIES = ("torch", "torchvision", "timm", "transformers")  # of another version, networks may be others


@dataclass(frozen=True)
class Question:
    """Something to inspect: how messages call it, where its answer is kept, and the request."""

    name: str
    kept: Path
    request: dict[str, Any]


def check(plan: Plan, probe: bool = False) -> None:
    """Inspect what has not been inspected yet; raise `MicrotomeError` that says everything that is wrong.

    With `probe` the speed of networks is measured too, where it is not known.
    """
    if plan.config.cluster.tls is not None:
        tls.check(plan.config.cluster.tls.model_dump())
    asked = [*questions(plan), *(_probes(plan) if probe else [])]
    unknown = list({question.kept: question for question in asked if not question.kept.exists()}.values())
    if unknown:
        _ask(plan, unknown)
    errors = [said for step in _steps(plan) for said in _stores(plan, step)]
    errors += [said for step in plan.of_stage("calibrate") for said in _classes(plan, step)]
    errors += [said for step in plan.of_stage("randomize") for said in _logits(plan, step)]
    if errors:
        raise MicrotomeError("\n  ".join(errors))


def _ask(plan: Plan, unknown: list[Question]) -> None:
    print(f"inspecting {', '.join(question.name for question in unknown)}", file=sys.stderr)
    requests = [question.request for question in unknown]
    answers = in_own_process("pipeline.networks.inspection", requests, "the inspection of the networks")
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


def _stores(plan: Plan, step: Step) -> Iterator[str]:
    """What is wrong with the key `store` of a network, whose layers are known now."""
    assert step.network is not None
    network = plan.networks[step.network]
    names = [layer["name"] for layer in found(plan, step)["layers"]]
    who = f"network {step.network!r} on {step.dataset!r}"
    entries = {} if isinstance(network.store, str) else network.store
    for entry in entries:
        if not any(fits(name, entry) for name in names):
            yield f"{who}, store: {entry!r} is none of its layers{nearest(entry, names, 5)}"
    for name in names:
        wishes = {entry: kept for entry, kept in entries.items() if fits(name, entry)}
        if len(set(wishes.values())) > 1:
            yield f"{who}, store: layer {name!r} fits {' and '.join(map(repr, wishes))}, which differ"
    if names and all(network.kept(name) == "pooled" for name in names):
        yield (
            f"{who}: every layer is stored pooled, which leaves none to dissect: keep the maps of one, `store: full`, "
            "or have them counted without being stored, `store: none`"
        )


def _classes(plan: Plan, step: Step) -> Iterator[str]:
    """What is wrong with the logits of a network that is to be calibrated."""
    given, wanted = found(plan, step)["classes"], step.settings["classes"]
    if given != wanted:
        yield (
            f"network {step.network!r} on {step.dataset!r} cannot be calibrated: "
            + (f"it gives {given} logits" if given else "it has no head")
            + f", and the images have {wanted} classes: name other networks or data sets in `calibrate`"
        )


def _logits(plan: Plan, step: Step) -> Iterator[str]:
    """What is wrong with the logits of networks that runs are to train."""
    wanted = step.settings["classes"]
    for question in _classifiers(plan, step):
        given = json.loads(question.kept.read_text())["classes"]
        if given is None or given < wanted:
            yield (
                f"{question.name}: it gives {given or 'no'} logits, and the images have {wanted} classes: "
                "build it with as many, by `arguments`"
            )


def found(plan: Plan, step: Step) -> dict[str, Any]:
    """What the inspection found of the network of a step, or of the one that it is the control or a copy of."""
    network = plan.config.original(step.network or "")
    extracted = plan.step("extract", step.dataset, network)
    return json.loads(_kept(plan, extracted).read_text())


def speed(plan: Plan, step: Step) -> dict[str, Any]:
    """What the probe of a step's network said, empty where it was not asked."""
    kept = _probe(plan, step).kept
    return json.loads(kept.read_text()) if kept.exists() else {}


def segmenters(plan: Plan, step: Step) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of every segmenter that a step of `concepts` uses: what its inspection found, and what its probe said."""
    told = []
    for name, question in _segmenters(plan, step).items():
        kept = _segmenter_probe(plan, step, name).kept
        told.append((json.loads(question.kept.read_text()), json.loads(kept.read_text()) if kept.exists() else {}))
    return told


def _probes(plan: Plan) -> list[Question]:
    lacking = [step for step in plan.of_stage("concepts") if not (plan.results / step.manifest).exists()]
    found = [_segmenter_probe(plan, step, name) for step in lacking for name in _segmenters(plan, step)]
    return found + [_probe(plan, step) for step in _steps(plan) if not (plan.results / step.manifest).exists()]


def _probe(plan: Plan, step: Step) -> Question:
    assert step.network is not None
    network = plan.networks[step.network]
    random = network.model_copy(update={"weights": "random", "train": None, "prefix": None, "seed": 0})
    return _speed(plan, random, _request(plan, step)["input_shape"], f"{step.network!r} on {step.dataset!r}")


def _segmenter_probe(plan: Plan, step: Step, name: str) -> Question:
    spec = plan.config.segmenters[name]
    random = spec.model_copy(update={"weights": "random", "prefix": None})
    size = spec.resize or plan.step("ingest", step.dataset).settings["size"]
    return _speed(plan, random, [3, *size], f"segmenter {name!r} on {step.dataset!r}")


def _speed(plan: Plan, spec: Network | Segmenter, input_shape: list[int], whose: str) -> Question:
    """The speed of a network does not depend on its weights, and its answer holds for this machine alone."""
    request = {
        "network": NetworkSpec.of(spec).model_dump(),
        "input_shape": input_shape,
        "micro_batch": spec.numerics.micro_batch,
        "channels_last": spec.numerics.channels_last,
        "device": "cuda" if plan.config.cluster.on_gpus else "cpu",
    }
    here = [VERSION, _versions(), platform.node(), platform.machine()]
    return Question(f"the speed of {whose}", plan.scratch / "probed" / f"{digest([*here, request])}.json", request)


@functools.cache
def _versions() -> dict[str, str]:
    """Versions of the libraries that build networks, as far as they are installed."""
    found = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def questions(plan: Plan) -> list[Question]:
    """What has to be inspected for a plan: networks, then segmenters, each with every data set that it sees."""
    networks = [
        Question(f"network {step.network!r} on {step.dataset!r}", _kept(plan, step), _request(plan, step))
        for step in _steps(plan)
    ]
    networks += [question for step in plan.of_stage("randomize") for question in _classifiers(plan, step)]
    return [*networks, *(found for step in plan.of_stage("concepts") for found in _segmenters(plan, step).values())]


def sizes(plan: Plan) -> list[str]:
    """Layers and parameters of each network on a data set, what removing units costs, what segmenters name."""
    lines = []
    for step in _steps(plan):
        known = found(plan, step)
        count = len(known["layers"])
        layers = [layer["name"] for layer in known["layers"]]
        named = ", ".join(layers if count <= 4 else [*layers[:2], "...", layers[-1]])
        lines.append(f"{step.network} on {step.dataset}: {known['parameters']:,} parameters, {count} layers ({named})")
        ablated = _ablated(plan, step)
        if ablated is not None:
            lines += [_ablation(ablated, known, layer, flops) for layer, flops in known["ablation"].items()]
    for question in (found for step in plan.of_stage("concepts") for found in _segmenters(plan, step).values()):
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


def _segmenters(plan: Plan, step: Step) -> dict[str, Question]:
    """The segmenters that a step of `concepts` uses, by name."""
    found = {}
    size = plan.step("ingest", step.dataset).settings["size"]
    for name, made_of in step.settings.get("segmenters", {}).items():
        kept = plan.scratch / "inspected" / f"{digest([VERSION, _versions(), made_of, size])}.json"
        request = {"segmenter": plan.config.segmenters[name].model_dump(), "size": size}
        found[name] = Question(f"segmenter {name!r} on {step.dataset!r}", kept, request)
    return found


def _classifiers(plan: Plan, step: Step) -> list[Question]:
    """The networks that the runs of an experiment train."""
    assert step.comparison is not None
    asked = plan.config.randomize[step.comparison]
    found = {}
    for name, run in asked.runs.items():
        request = {
            "classifier": NetworkSpec.of(asked.networks[run.network]).model_dump(),
            "input_shape": [3, asked.crop, asked.crop],
        }
        made_of = [VERSION, _versions(), step.settings["runs"][name]["network"], request]
        kept = plan.scratch / "inspected" / f"{digest(made_of)}.json"
        found[kept] = Question(f"network {run.network!r} of randomize.{step.comparison}", kept, request)
    return list(found.values())


def _kept(plan: Plan, step: Step) -> Path:
    network = next(plan.steps[path] for path in step.parents if plan.steps[path].stage == "network")
    asked = _request(plan, step)
    del asked["network"], asked["images"]
    return plan.scratch / "inspected" / f"{digest([VERSION, _versions(), network.id, asked])}.json"


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
    compared = next((s for s in plan.of_stage("grams") if (s.dataset, s.network) == (step.dataset, step.network)), None)
    if compared is not None and compared.settings["layers"] != network.layers:
        request["compare"] = compared.settings["layers"]
    seen = next((s for s in plan.of_stage("sight") if (s.dataset, s.network) == (step.dataset, step.network)), None)
    if seen is not None and seen.settings["layers"] != network.layers:
        request["look"] = seen.settings["layers"]
    return request


def _ablated(plan: Plan, step: Step) -> Step | None:
    """The step that removes units of the same network on the same data set."""
    return next((s for s in plan.of_stage("ablate") if (s.dataset, s.network) == (step.dataset, step.network)), None)
