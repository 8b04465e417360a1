"""The page of the calibration: whether each network knows when it is wrong, and which method helps."""

from dataclasses import dataclass
from functools import partial

from kernels.calibration.reliability import FLOOR
from pipeline.report import words
from pipeline.report.experiment import Experiment
from pipeline.report.page import Figure, Page
from pipeline.report.style import draw
from pipeline.report.tables import write_table
from pipeline.stages.calibrate import figures
from pipeline.stages.calibrate.figures import TITLES
from pipeline.stages.calibrate.found import FACTS, Calibration, Point, read_calibration

PAPER = tuple(TITLES)[:7]
"""The columns of Guo et al.'s table."""
HEADER = (
    "method", "ece", "ece_2.5", "ece_97.5", "nll", "nll_2.5", "nll_97.5",
    "ece_low", "ece_high", "ece_null", "ece_null_high",
)  # fmt: skip
FACTOR_HEADER = (
    "dataset", "network", *FACTS, "error", "nll", "nll_temperature", "ece", "ece_low", "ece_high", "ece_temperature",
)  # fmt: skip


@dataclass(frozen=True)
class Section:
    """One network as the page shows it."""

    found: Calibration
    label: str
    figures: list[Figure]


def pages(experiment: Experiment) -> list[Page]:
    calibrated = experiment.of_stage("calibrate")
    if not calibrated:
        return []
    sections = []
    for one in calibrated:
        assert one.dataset is not None and one.network is not None
        found = read_calibration(experiment.results, one.dataset, one.network)
        sections.append(Section(found, experiment.label(one.dataset, one.network), drawn(experiment, found)))
    points = [one.found.point() for one in sections]
    over = [over_networks(experiment, points)] if len(points) > 1 else []
    table = "tables/calibration.csv"
    write_table(
        experiment.out / table,
        ("dataset", "network", *PAPER),
        [(s.found.dataset, s.found.network, *(s.found.rows.get(n, {}).get("ece") for n in PAPER)) for s in sections],
    )
    return [
        Page(
            file="calibration.html",
            title="Calibration",
            template="calibration.html.j2",
            values={"sections": sections, "columns": PAPER, "titles": TITLES, "over": over, "table": table,
                    "best": best, "trained": bool(experiment.of_stage("randomize"))},
            summary="Whether the networks know when they are wrong, and what each method makes of it.",
            findings=[finding(one) for one in sections],
            figures=[figure for one in sections for figure in one.figures] + over,
            files=[table],
            methods="methods-calibrate.html.j2",
        )
    ]  # fmt: skip


def best(found: Calibration, measure: str) -> str:
    """Return the method with the lowest mean of a measure, among those of the paper's table."""
    return min((name for name in PAPER if name in found.rows), key=lambda name: found.rows[name][measure])


def finding(one: Section) -> str:
    found = one.found
    whole, row = found.whole, found.rows["uncalibrated"]
    text = (
        f"{one.label} is right on {words.percent(whole['accuracy'], 1)} of "
        f"{words.plural(found.facts.images, 'image')} and states a mean confidence of "
        f"{words.percent(whole['mean_confidence'], 1)}; its ECE is {words.percent(whole['ece'], 2)}, where a "
        f"calibrated network would show up to {words.percent(whole['ece_null_high'], 2)}"
    )
    floored = ""
    if whole.get("floored"):
        floored = (
            f" The label of {words.percent(whole['floored'], 2)} of them has a probability below {FLOOR:g}, which "
            f"counts as {FLOOR:g} in the NLL."
        )
    if "temperature" not in found.rows:
        return f"{text}.{floored}"
    after = found.rows["temperature"]
    return (
        f"{text}.{floored} With a temperature of {words.decimal(after['temperature'], 2)} it is "
        f"{words.percent(after['ece'], 2)} instead of {words.percent(row['ece'], 2)}, the mean over "
        f"{words.plural(int(after['splits']), 'split')}."
    )


def drawn(experiment: Experiment, found: Calibration) -> list[Figure]:
    name = experiment.name(found.dataset, found.network)
    labels = {"network": found.network, "data set": found.dataset}
    label = experiment.label(found.dataset, found.network)
    splits, test = words.plural(found.settings.splits, "split"), found.facts.test
    return [
        draw(
            experiment,
            f"reliability-{name}",
            partial(figures.reliability, found=found),
            kind="reliability",
            alt=f"Bar charts: accuracy of {label} over its confidence",
            caption="Accuracy of the images whose confidence lies in a bin, and how far it is from their mean "
            "confidence: orange where they are right less often than stated, light blue where more often; below, how "
            f"many they are. Test images: the {words.number(test)} of the first split that nothing was fitted on.",
            header=("diagram", "low", "high", "images", "accuracy", "confidence"),
            rows=figures.reliability_rows(found),
            labels=labels,
        ),
        draw(
            experiment,
            f"calibration-{name}",
            partial(figures.methods, found=found),
            kind="calibration-methods",
            alt=f"Dot charts: ECE and NLL of {label} with each calibration method",
            caption=f"ECE and NLL on {words.plural(test, 'test image')}, mean over {splits} (point) and the range "
            "of 95 % of them (line).",
            header=HEADER,
            rows=figures.method_rows(found),
            labels=labels,
        ),
    ]


def over_networks(experiment: Experiment, points: list[Point]) -> Figure:
    return draw(
        experiment,
        "calibration-networks",
        partial(figures.factors, points=points),
        kind="calibration-networks",
        alt="Scatter plots: calibration error of the networks by what they are made of, and NLL by error",
        caption="ECE of the networks as they are, with its 95 % interval, over what differs between them, and NLL over "
        "the share of images that are not recognised: networks with a higher NLL at the same error are surer of their "
        "mistakes. The line leads to the NLL with a temperature: what is above it was lost to overfitting.",
        header=FACTOR_HEADER,
        rows=figures.factor_rows(points),
    )
