"""Counts, tables and sentences of the report against brute force."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.report import words
from pipeline.report.experiment import Made
from pipeline.report.style import shorten
from pipeline.report.tables import write_table
from pipeline.stages.ablate.found import Ablation
from pipeline.stages.ablate.page import Section, finding
from pipeline.stages.ablate.settings import Measure
from pipeline.stages.dissect import sentences
from pipeline.stages.dissect.counting import categories, count_concepts, count_detectors
from pipeline.stages.dissect.figures import share_above
from pipeline.stages.dissect.found import Unit, short_names
from pipeline.stages.dissect.tables import DETECTOR_COLUMNS, UNIT_COLUMNS, by_iou, detector_rows, write_units
from pipeline.stages.report.overview import images
from pipeline.stages.report.provenance import flatten


def unit(layer: str = "a", number: int = 0, concept: str = "", category: str = "", iou: float = 0.1) -> Unit:
    return Unit(layer, number, concept, category, iou, 0.5, math.nan, iou - 0.01, iou + 0.01, 1.5, 0.01)


LAYERS = ["a", "b", "c"]
UNITS = st.lists(
    st.builds(
        lambda layer, label: unit(layer, 0, *label),
        st.sampled_from(LAYERS),
        st.sampled_from([("", ""), ("glass", "object"), ("glass", "material"), ("tree", "object")]),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(UNITS)
def test_counts_match_a_plain_count(units: list[Unit]) -> None:
    counts = count_detectors(units, LAYERS)
    assert [count.layer for count in counts] == LAYERS
    for count in counts:
        of_layer = [u for u in units if u.layer == count.layer]
        labels = [(u.category, u.concept) for u in of_layer if u.concept]
        assert (count.units, count.detectors, count.unique) == (len(of_layer), len(labels), len(set(labels)))
        for category in {category for category, _ in labels}:
            ours = [label for label in labels if label[0] == category]
            assert count.by_category[category] == (len(ours), len(set(ours)))
        assert set(count.by_category) == {category for category, _ in labels}
        assert count.share == (len(labels) / len(of_layer) if of_layer else 0)
    assert categories(counts) == sorted({u.category for u in units if u.concept})


@settings(deadline=None)
@given(UNITS)
def test_concepts_match_a_plain_count(units: list[Unit]) -> None:
    counts = count_concepts(units, "c")
    for count in counts:
        ours = [u.layer for u in units if (u.concept, u.category) == (count.concept, count.category)]
        assert (count.units, count.last) == (len(ours), ours.count("c"))
    assert sum(count.units for count in counts) == sum(u.detector for u in units)
    assert [count.units for count in counts] == sorted((count.units for count in counts), reverse=True)


def test_tables_hold_every_unit_and_no_formula(tmp_path: Path) -> None:
    units = [unit("a", 0, "=cmd()", "+c", 0.1), unit("-b", 1, "tree, old", "x", 0.9), unit("a", 2, iou=math.nan)]
    write_units(tmp_path / "units.csv", units)
    rows = read(tmp_path / "units.csv")
    assert list(rows[0]) == list(UNIT_COLUMNS)
    assert [row["unit"] for row in rows] == ["1", "0", "2"]  # by IoU, NaN last
    assert [row["concept"] for row in rows] == ["tree, old", "'=cmd()", ""]
    assert rows[0]["layer"] == "'-b" and rows[1]["category"] == "'+c"
    assert float(rows[0]["iou_over_ceiling"]) == 0.9 / 0.5
    assert rows[2]["iou"] == "" and rows[0]["iou_held_out"] == ""

    counts = count_detectors(units, ["a", "-b"])
    write_table(tmp_path / "detectors.csv", DETECTOR_COLUMNS, detector_rows({"trained": counts, "permuted": counts}))
    rows = read(tmp_path / "detectors.csv")
    assert list(rows[0]) == list(DETECTOR_COLUMNS)
    assert list(rows[0].values()) == ["trained", "a", "2", "", "1", "1"]
    assert list(rows[1].values()) == ["trained", "a", "2", "'+c", "1", "1"]
    assert len(rows) == 8


def read(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=20))
def test_share_above_and_order(values: list[float]) -> None:
    grid = np.linspace(0, 1, 7)
    expected = [sum(value > point for value in values) / max(len(values), 1) for point in grid]
    assert share_above(values, grid).tolist() == expected
    ordered = [u.iou for u in by_iou(unit(iou=value) for value in values)]
    finite = [value for value in values if value == value]
    assert ordered[: len(finite)] == sorted(finite, reverse=True)
    assert all(math.isnan(value) for value in ordered[len(finite) :])


@settings(deadline=None)
@given(st.text(max_size=60), st.integers(4, 40))
def test_shorten_keeps_both_ends(text: str, limit: int) -> None:
    short = shorten(text, limit)
    assert len(short) <= limit
    assert short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0\u00a0%"),
        (1, "100\u00a0%"),
        (0.001, "<\u00a01\u00a0%"),
        (0.999, ">\u00a099\u00a0%"),
        (0.97, "97\u00a0%"),
        (math.nan, "–"),
    ],
)
def test_percent_never_rounds_to_none_or_all(value: float, shown: str) -> None:
    assert words.percent(value) == shown


def test_number_and_plural() -> None:
    assert words.number(1234567) == "1\u202f234\u202f567"
    assert words.number(True) == "True" and words.number("x") == "x"
    assert [words.plural(n, "unit") for n in (0, 1, 2)] == ["0 units", "1 unit", "2 units"]
    assert sentences.accuracy({"accuracy": {"train": None, "validation": 0.5}}) == {"validation": 0.5}
    assert sentences.accuracy({"accuracy": 0.5}) == {"validation": 0.5}
    assert sentences.accuracy({}) == {}


def test_times_are_readable() -> None:
    assert [words.seconds(value) for value in (None, 4.04, 89.96, 90, 5399, 5400)] == [
        "–", "4.0 s", "90.0 s", "1.5 min", "90.0 min", "1.5 h",
    ]  # fmt: skip


def test_what_a_data_set_holds() -> None:
    splits = {"train": {"0": 64, "3": 936}, "validation": {"1": 7}}
    facts = {"images": 1007, "size": [48, 64], "shard_images": 64, "classes": [], "splits": splits, "contents": []}
    facts |= {"records": [], "refused": 0, "ignored": {}}
    said = "streets: 1\u202f007 images of 64 × 48 pixels (train 1\u202f000, validation 7)."
    assert images(Made("ingest", "streets", result=facts)) == said


def test_short_names_stay_distinct() -> None:
    assert short_names(["gt/object", "colour/name"]) == {"gt/object": "object", "colour/name": "name"}
    assert short_names(["gt/a/b", "plain"]) == {"gt/a/b": "a/b", "plain": "plain"}
    assert short_names(["gt/object", "seg/object"]) == {"gt/object": "gt/object", "seg/object": "seg/object"}


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": ["é", 2]}, "d": None}) == [("a.b", "1"), ("a.c", '["é", 2]'), ("d", "None")]


def test_a_class_that_is_never_recognised_has_nothing_to_lose() -> None:
    """Three classes: one depends on unit 1, one on none, one is never recognised. Only the first counts."""
    loss, none = np.array([[0.0, 0.0, 0.0], [0.2, 0.0, 0.0]]), np.empty((0, 2, 0, 3))
    units = [unit(number=number) for number in range(2)]
    found = Ablation(
        "d", "n", "a", ["x", "y", "z"], units, np.array([[1, 0], [0, 1], [0, 1]]), loss, loss, loss[:, 0],
        np.array([0, 1]), [], [], none, none, np.full(3, 0.5), 0.5, np.array([True, True, False]),
        Measure.model_construct(rank="train", judge="validation"), [],
    )  # fmt: skip
    assert found.without_units == ["y"] and found.never_recognised == ["z"]
    assert "of 3 classes, 1 lose" in finding(Section(found, "n", [], [], {}, ""))


@pytest.mark.parametrize(
    ("trained", "untrained", "said"),
    [(195, 166, "85"), (4, 2, "50"), (4, 5, "125"), (5, 2, ""), (0, 0, ""), (3, None, "")],
)
def test_what_needs_no_training_is_said(trained, untrained, said):
    counts = {"trained": trained} | ({} if untrained is None else {"untrained": untrained})
    network = SimpleNamespace(last={run: SimpleNamespace(detectors=count) for run, count in counts.items()})
    sentence = sentences.without_training(network)
    assert bool(sentence) == bool(said)
    if said:
        assert (
            sentence.startswith(f"Untrained units reach {said}\u00a0% of that number")
            and "frames of a video" in sentence
        )
