"""What explanations of an experiment are made with: for the stage itself, and for those that explain other images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.networks.fitness import Explainable
from pipeline.plan.job import Job
from pipeline.stages.attribute import segments
from pipeline.stages.attribute.inputs import background_of, baseline_of
from pipeline.stages.attribute.options import METHODS, Labels, Options, Segmented
from pipeline.stages.attribute.settings import Settings, targets_of
from pipeline.stages.concepts.results import Labelled
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.stages.attribute.results import Layout, SegmentLayout
    from pipeline.stages.attribute.work import Work

EXPLAINS = (
    "kernels/attribution/agreement.py",
    "kernels/attribution/baselines.py",
    "kernels/attribution/cam.py",
    "kernels/attribution/lime.py",
    "kernels/attribution/masks.py",
    "kernels/attribution/maxima.py",
    "kernels/attribution/paths.py",
    "kernels/attribution/relevance.py",
    "kernels/attribution/rollout.py",
    "kernels/attribution/secants.py",
    "kernels/attribution/segments.py",
    "kernels/attribution/shapley.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "kernels/locality/attention.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/contributions.py",
    "pipeline/networks/explainable.py",
    "pipeline/networks/fitness.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/gradients.py",
    "pipeline/networks/graph/attended.py",
    "pipeline/networks/graph/arithmetic.py",
    "pipeline/networks/graph/call_sites.py",
    "pipeline/networks/graph/channels.py",
    "pipeline/networks/graph/gradient_flow.py",
    "pipeline/networks/graph/ledger.py",
    "pipeline/networks/graph/operations.py",
    "pipeline/networks/graph/propagated.py",
    "pipeline/networks/graph/rectified.py",
    "pipeline/networks/graph/relevance_rules.py",
    "pipeline/networks/graph/rescale.py",
    "pipeline/networks/graph/reveal_cancel.py",
    "pipeline/networks/graph/taken_apart.py",
    "pipeline/networks/graph/trace.py",
    "pipeline/networks/layer_id.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/relevance.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/attribute/again.py",
    "pipeline/stages/attribute/explaining.py",
    "pipeline/stages/attribute/inputs.py",
    "pipeline/stages/attribute/methods",
    "pipeline/stages/attribute/options.py",
    "pipeline/stages/attribute/results.py",
    "pipeline/stages/attribute/segments.py",
    "pipeline/stages/attribute/settings.py",
    "pipeline/stages/attribute/subject.py",
    "pipeline/stages/attribute/tasks.py",
    "pipeline/stages/attribute/work.py",
)
"""The files whose change may change what a method says."""


def labels_of(methods: Mapping[str, Options]) -> list[str]:
    """Return the categories of label maps that methods take segments from."""
    parted = [each.segments for each in methods.values() if isinstance(each, Segmented)]
    return sorted({each.category for each in parted if isinstance(each, Labels)})


def layer_names(methods: Mapping[str, Options]) -> list[str]:
    """Return the layers that methods name, "" for the default."""
    return sorted({layer for options in methods.values() if (layer := options.layer_name()) is not None})


def unit_layers(methods: Mapping[str, Options]) -> list[str]:
    """Return the layers whose units' relevance methods store."""
    return sorted({layer for options in methods.values() for layer in options.unit_layers()})


def examined(job: Job[Settings], workers: Any, methods: Mapping[str, Options]) -> tuple[int, Explainable]:
    """Look at the network of an experiment on a worker; return its number of parameters, too."""
    from pipeline.stages.attribute.tasks import examine_network

    asked = job.model, job.images.size, layer_names(methods), unit_layers(methods)
    return next(run_tasks(workers, examine_network, [asked], 1, f"{job.name}: network"))


def work_of(
    job: Job[Settings],
    workers: Any,
    methods: Mapping[str, Options],
    found: Explainable,
    stores: Mapping[str, Path] | None = None,
    layouts: Mapping[str, Layout] | None = None,
    segment_layouts: Mapping[str, SegmentLayout] | None = None,
) -> Work:
    """Return what all images of an experiment have in common; without stores and layouts, to explain and not store."""
    from pipeline.stages.attribute.tasks import sum_inputs
    from pipeline.stages.attribute.work import Work

    labelled = Labelled.of(job.parent("concepts")) if labels_of(methods) else None
    compares = any(METHODS[options.kind].baseline for options in methods.values())
    return Work(
        job.model,
        found,
        targets_of(job.settings),
        baseline_of(job, workers) if compares else "black",
        methods,
        stores or {},
        layouts or {},
        segments.settings_of(methods),
        segment_layouts or {},
        {each.name: each.place for each in labelled.categories} if labelled is not None else {},
        background_of(job, workers, methods, sum_inputs),
    )
