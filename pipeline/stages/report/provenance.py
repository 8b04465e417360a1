"""The page of provenance: the configuration, the versions, the ids, and what each network is."""

import json
from collections.abc import Mapping
from typing import Any

from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Page
from pipeline.stages.dissect.found import networks
from pipeline.storage.redact import without_home


def page(experiment: Experiment) -> Page:
    dissected = networks(experiment)
    return Page(
        file="provenance.html",
        title="Provenance",
        template="provenance.html.j2",
        summary="What these results were made from and with.",
        values={
            "networks": dissected,
            "models": [model_facts(network.trained.model) for network in dissected],
            "versions": flatten(experiment.versions),
            "configuration": flatten(public(experiment.configuration)),
        },
    )


def model_facts(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what `model.json` says, but for the curve, which is drawn."""
    return flatten({key: value for key, value in model.items() if key != "curve" and value is not None})


def public(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without the scheduler it ran on, and where its keys are."""
    cluster = {key: value for key, value in configuration.get("cluster", {}).items() if key not in ("address", "tls")}
    return {**configuration, "cluster": cluster} if "cluster" in configuration else dict(configuration)


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as (dotted name, text) in the order given; lists as JSON, `~` for the home folder."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            rows += flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            rows.append((name, json.dumps(value, ensure_ascii=False, default=str)))
        else:
            rows.append((name, words.number(value)))
    return [(name, without_home(text)) for name, text in rows]
