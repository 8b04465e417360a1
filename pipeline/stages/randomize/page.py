"""The page of randomization: how easily networks fit noise, and what one that did has learnt to detect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipeline.config.networks import FROM_RUN
from pipeline.report import words
from pipeline.report.experiment import Experiment, Made
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.tables import write_table
from pipeline.stages.dissect.found import Network, networks
from pipeline.stages.randomize.figures import learning_curves, over_share, over_training
from pipeline.stages.randomize.found import (
    CURVE_COLUMNS,
    PAPER_IMAGES,
    SHARE_COLUMNS,
    Randomized,
    Run,
    curve_rows,
    read_randomization,
    share_rows,
)

TABLE = (
    "run", "network", "parameters", "random_crop", "weight_decay", "dropout", "corruption", "share", "outcome",
    "epochs_to_fit", "train_accuracy", "test_accuracy", "best_test_accuracy", "paper_train_accuracy",
    "paper_test_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One experiment as the page shows it. `dissected` are networks of the configuration that are runs of it."""

    found: Randomized
    findings: list[str]
    figures: list[Figure]
    table: str
    expressivity: str
    dissected: list[tuple[Run, Network]]

    @property
    def beside(self) -> bool:
        """Whether some of the runs are in the paper's table."""
        return self.found.cifar10 and any(run.paper for run in self.found.runs)


def pages(experiment: Experiment) -> list[Page]:
    sections = [section(experiment, one) for one in experiment.of_stage("randomize")]
    if not sections:
        return []
    return [
        Page(
            file="randomization.html",
            title="Randomization",
            template="randomization.html.j2",
            values={"sections": sections, "paper_images": PAPER_IMAGES},
            summary="How easily networks fit labels and images without meaning, and what they then detect.",
            findings=[sentence for one in sections for sentence in one.findings],
            figures=[figure for one in sections for figure in one.figures],
            files=[one.table for one in sections],
            methods="methods-randomize.html.j2",
        )
    ]


def section(experiment: Experiment, made: Made) -> Section:
    assert made.experiment is not None
    found = read_randomization(experiment.results, made.experiment, made.result)
    table = f"tables/randomization-{found.name}.csv"
    write_table(experiment.out / table, TABLE, (table_row(found, run) for run in found.runs))
    dissected = list(dissections(experiment, found))
    said = list(findings(found, dissected))
    return Section(found, said, list(figures(experiment, found)), table, express(found), dissected)


def table_row(found: Randomized, run: Run) -> Sequence[object]:
    known: Mapping[str, Any] = {**run.how.written(), **run.facts.written(), "run": run.name}
    paper = (run.paper if found.cifar10 else None) or (None, None)
    return (*(known[key] for key in TABLE[:-2]), *paper)


def dissections(experiment: Experiment, found: Randomized) -> Iterator[tuple[Run, Network]]:
    """Yield the dissected networks whose weights are those of a run of this experiment, in the order of its runs."""
    specs = experiment.configuration.get("networks", {})
    for run in found.runs:
        for network in networks(experiment):
            weights = specs.get(network.trained.network, {}).get("weights")
            if weights == f"{FROM_RUN}{found.name}/{run.name}":
                yield run, network


def express(found: Randomized) -> str:
    """Say what the theorem's network shows; empty where results are older than it."""
    known = found.expressivity
    if known is None:
        return ""
    if known.refused is not None:
        return f"No two-layer network of the theorem was written down: {known.refused}."
    weights, values = words.number(known.weights), words.number(known.values)
    images, error = words.plural(known.images, "training image"), max(fit.largest_error for fit in known.fits)
    return (
        f"A two-layer ReLU network of 2n + d = {weights} weights, written down and not trained, gives n = {images} of "
        f"d = {values} values their labels, true or random, with an error of {error:.1e} at most."
    )


def findings(found: Randomized, dissected: Sequence[tuple[Run, Network]]) -> Iterator[str]:
    """Say what the numbers show, whatever they are."""
    noise = [run for run in found.runs if run.how.corruption != "true_labels" and not run.diverged]
    fitted = [run for run in noise if run.facts.train_accuracy == 1]
    if noise:
        labels = words.plural(found.images, "training image")
        yield (
            f"{len(fitted)} of {words.plural(len(noise), 'run')} on corrupted data fit all of {labels} of "
            f"{found.dataset}."
        )
    for title, runs in found.by_share().items():
        low, high = runs[0], runs[-1]
        a, b = low.facts.epochs_to_90, high.facts.epochs_to_90
        if low.share == 0 and a and b:
            yield (
                f"{title} predicts nine in ten training images right in epoch {a} with true labels, and in epoch {b} "
                f"with {words.percent(high.share or 0)} of them corrupted; its test accuracy is "
                f"{words.percent(low.facts.test_accuracy, 1)} and "
                f"{words.percent(high.facts.test_accuracy, 1)}."
            )
    for run in found.true:
        facts, lowest = run.facts, run.facts.lowest_test_loss_epoch
        least, last, ece = facts.lowest_test_loss, facts.test_loss, facts.test_ece
        if lowest < facts.epochs_run and least is not None and last is not None and ece is not None:
            errors = (1 - run.curves["test_accuracy"][at] for at in (lowest - 1, facts.epochs_run - 1))
            before, after = (words.percent(float(error), 1) for error in errors)
            yield (
                f"The test NLL of {run.name} is lowest after epoch {lowest}, and rises from "
                f"{words.decimal(least, 2)} to {words.decimal(last, 2)} by "
                f"epoch {facts.epochs_run}, while its test error goes from {before} to {after}; its ECE is "
                f"{words.percent(ece, 1)} then."
            )
    if diverged := [run.name for run in found.runs if run.diverged]:
        yield f"Diverged: {', '.join(diverged)}."
    for run, network in dissected:
        count = network.last["trained"]
        untrained = network.last.get("untrained")
        beside = f", untrained {words.number(untrained.detectors)}" if untrained else ""
        detectors = words.plural(count.detectors, "detector")
        yield (
            f"Trained on {run.corruption}, {network.trained.network} has {detectors} "
            f"among the {words.plural(count.units, 'unit')} of {count.layer}{beside}."
        )


def figures(experiment: Experiment, found: Randomized) -> Iterator[Figure]:
    labels = {"experiment": found.name, "data set": found.dataset}
    name = found.name
    yield draw(
        experiment,
        f"randomization-curves-{name}",
        partial(learning_curves, found=found),
        kind="randomization-curves",
        alt=f"Line charts: training loss of each network of {name} by epoch, for each corruption",
        caption="Training loss by epoch, of the minibatches as they were trained on.",
        header=CURVE_COLUMNS,
        rows=curve_rows(found.runs),
        labels=labels,
    )
    if any(run.facts.epochs_run > 1 for run in found.true):
        yield draw(
            experiment,
            f"randomization-calibration-{name}",
            partial(over_training, found=found),
            kind="randomization-calibration",
            alt=f"Line charts: test error, NLL and ECE by epoch of the runs of {name} on true labels",
            caption="Error, NLL and ECE on the test images after each epoch, of the runs on true labels. Where NLL and "
            "ECE rise while the error does not, a network gets surer of its mistakes: it overfits NLL.",
            header=CURVE_COLUMNS,
            rows=curve_rows(found.true),
            labels=labels,
        )
    if not found.by_share():
        return
    for what, alt, caption in (
        ("time", "epochs until the training images are fitted",
         "The first epoch in which all training images (line) and nine in ten (dotted) were predicted right."),
        ("error", "share of the test images that are not recognised", "Share of the test images, whose labels are "
         "true, that are not recognised at the end of the training."),
    ):  # fmt: skip
        yield draw(
            experiment,
            f"randomization-{what}-{name}",
            partial(over_share, found=found, what=what),
            kind=f"randomization-{what}",
            alt=f"Line chart: {alt}, over the share of corrupted labels",
            caption=caption,
            header=SHARE_COLUMNS,
            rows=share_rows(found),
            labels=labels,
        )
