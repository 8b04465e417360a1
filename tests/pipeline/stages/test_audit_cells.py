"""How cells are measured and put together: whatever shards come together, and networks with images of their own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipeline.errors import DamagedError, MicrotomeError
from pipeline.stages.audit import results, sanity, tasks
from pipeline.stages.audit.cell import Audited
from pipeline.stages.audit.declared import Measure
from pipeline.stages.audit.found import shares_of
from pipeline.stages.audit.page import most
from pipeline.stages.audit.results import Cell, Name, Shares
from pipeline.stages.audit.rows import outcomes
from pipeline.stages.audit.stage import Pair, check, numbers_of, read
from pipeline.storage.store import create
from pipeline.storage.tables import read_rows
from pipeline.workers.resumable import Parts

CELL = Cell("test", Name("method"), Path())
MEASURES = {
    "area": Measure("Area"),
    "curve": Measure("Curve", ("step",), {"step": ("0", "1", "2")}),
    "hit": Measure("Hit"),
    "rank": Measure("Rank", ("of", "truth"), {"of": ("a", "b"), "truth": ("c",)}),
    "top": Measure("Top", ("of", "truth"), {"of": ("a", "b"), "truth": ("c",)}),
}
"""A test's measures: of equal dimensions two, two, and one alone."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Shards that are put to a test which refuses images 3 and 7, and stops at 9; a shard's image is its number."""
    seen: list[str] = []

    def test(batch: list[str], options: None) -> dict[str, np.ndarray]:
        seen.append("".join(batch))
        for each in batch:
            if each in "37":
                raise MicrotomeError(f"image {each} has no map")
            if each == "9":
                raise DamagedError("image 9 has other pixels")
        return {"value": np.array(batch, float)}

    monkeypatch.setattr(tasks, "_shared", lambda auditing, chosen, rows, stored: [each.shard.part for each in chosen])
    monkeypatch.setattr(tasks, "_batch", lambda shared, name, stored, rows, reasons: shared)
    monkeypatch.setattr(tasks, "FUNCTIONS", {"test": test})
    return seen


def measured(*groups: str) -> dict[str, list[float] | str]:
    found: dict[str, list[float] | str] = {}
    for group in groups:
        there = [(SimpleNamespace(rows={"test": [0]}, shard=SimpleNamespace(part=part)), {}) for part in group]
        auditing = SimpleNamespace(tests={"test": None})
        for some, numbers, _ in tasks._measured(auditing, CELL, there, {}):  # type: ignore[arg-type]
            for at, (each, _) in enumerate(some):
                found[each.shard.part] = numbers if isinstance(numbers, str) else numbers["value"][[at]].tolist()
    return found


def test_what_is_refused_does_not_depend_on_which_shards_come_together(asked: list[str]) -> None:
    once = measured("1237")
    assert once == {"1": [1], "2": [2], "3": "image 3 has no map", "7": "image 7 has no map"}
    assert asked == ["1237", "1", "2", "3", "7"]
    assert measured("13", "27") == measured("1", "2", "3", "7") == once
    asked.clear()
    assert measured("12") == {"1": [1], "2": [2]} and asked == ["12"]


@pytest.mark.usefixtures("asked")
def test_damage_stops_the_run(tmp_path: Path) -> None:
    for group in ("9", "129"):
        with pytest.raises(DamagedError):
            measured(group)


def test_numbers_are_placed_by_the_images_of_their_own_cell() -> None:
    """One network is explained on fewer images than another, and is put to a test of its own."""
    ids = np.array([f"i{slot}" for slot in range(9)], object)
    found = results.by_image(
        {
            ("cnn", "saliency", "deletion.area"): (np.array([1, 4, 7]), np.array([0.1, 0.4, 0.7])),
            ("cnn-untrained", "saliency", "deletion.area"): (np.array([4]), np.array([4.0])),
            ("vit", "saliency", "stability.rank"): (np.array([2, 7]), np.array([20.0, 70.0])),
        },
        ids,
    )
    assert found["slot"][1].tolist() == [1, 2, 4, 7]
    assert found["image_id"][1].tolist() == ["i1", "i2", "i4", "i7"]
    nan = np.nan
    np.testing.assert_array_equal(
        found["by_image"][1][:, 0],
        [
            [[0.1, nan, 0.4, 0.7], [nan] * 4],
            [[nan, nan, 4.0, nan], [nan] * 4],
            [[nan] * 4, [nan, 20.0, nan, 70.0]],
        ],
    )


def test_shares_of_concepts_are_read_back_and_named() -> None:
    every = [
        Shares("scenes", "cnn", "lrp", "b", "street", {"road": 0.5, "car": 0.25, "sky": 0.125, "sun": 0.125}, {}),
        Shares("scenes", "cnn", "lrp", "b", "farm", {}, {"cow": 1.0}),
    ]
    first, second = shares_of(read_rows(results.concept_table(every).decode().splitlines(keepends=True)))
    assert (first.of_class, first.relevance) == ("street", every[0].relevance)
    assert most(first.relevance) == "road 50\u00a0%, car 25\u00a0%, sky 12\u00a0%"
    assert most(first.loss) == "–" and most(second.loss) == "cow 100\u00a0%"


def test_measures_of_equal_dimensions_share_an_array() -> None:
    assert results.together(MEASURES) == {
        "by_image": ["area", "hit"],
        "curve": ["curve"],
        "by_of_truth": ["rank", "top"],
    }
    made = results.arrays(MEASURES, 9, 4)
    assert {name: (each.dims, each.shape) for name, each in made.items()} == {
        "by_image": (("image", "by_image_measure"), (9, 2)),
        "curve": (("image", "step"), (9, 3)),
        "by_of_truth": (("image", "by_of_truth_measure", "of", "truth"), (9, 2, 2, 1)),
    }
    drawn = np.random.default_rng(0)
    numbers = {name: drawn.random((5, *each.shape)) for name, each in MEASURES.items()}
    stored = results.joined(MEASURES, numbers)
    assert {name: values.shape[1:] for name, values in stored.items()} == {
        name: each.shape[1:] for name, each in made.items()
    }
    again = results.parted(MEASURES, stored)
    assert list(again) == list(MEASURES)
    for name, values in numbers.items():
        np.testing.assert_array_equal(again[name], values)


def audited(values: list[float], images: int, refused: str = "") -> Audited:
    unknown, ids = np.full(len(values), -1), [str(at) for at in range(len(values))]
    return Audited(
        *("data", "net", "test", Name("m"), None, {"value": MEASURES["area"]}, {"value": np.array(values)}),
        *(unknown, unknown, ids, ["a"], None, refused, images),
    )


def test_the_images_of_a_refused_shard_are_left_out_and_told() -> None:
    (plain,) = outcomes(audited([1, 2, 6], 3), None)
    (some,) = outcomes(audited([1, 2, 6], 8, "no map"), None)
    assert (some.value, some.low, some.high, some.images, some.state) == (3, plain.low, plain.high, 3, "")
    assert (plain.note, some.note) == ("", "5 of 8 images are refused with their shards: no map")
    (none,) = outcomes(audited([], 8, "no map"), None)
    assert np.isnan(none.value) and (none.state, none.note) == ("refused", "no map")


def test_label_controls_of_another_architecture_are_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {"tiny": 1234, "random": 1234, "mlp": 5678}
    monkeypatch.setattr(sanity.inspected, "found", lambda job: SimpleNamespace(parameters=weights[job.network]))

    def said(options: dict[str, Any], datasets: str = "aaa") -> list[str]:
        named = zip(weights, datasets, strict=True)
        parents = [SimpleNamespace(stage=SimpleNamespace(name="attribute"), network=n, dataset=d) for n, d in named]
        settings = SimpleNamespace(tests={"label_randomisation": options, "deletion": {}})
        return list(check(SimpleNamespace(settings=settings, parents=parents, experiment="honest")))  # type: ignore[arg-type]

    (why,) = said({"network": "random"})
    assert why.startswith("audit.honest.tests.label_randomisation.network: 'random' has 1,234 weights and 'mlp' 5,678")
    assert not said({"network": "random", "networks": ["tiny"]})
    assert not said({"network": "random"}, "aab")  # the other is of another data set
    assert len(said({"network": "mlp"})) == 2


def test_a_cell_is_read_as_it_was_written_without_the_shards_that_are_refused(tmp_path: Path) -> None:
    """Nine images in shards of four, four of them audited; the second shard is refused."""
    cell = Cell("test", Name("noise", True), tmp_path / "cells" / "noise.zarr")
    rows = {"0": (0, 2), "1": (1,), "2": (0,)}
    shards = {
        part: SimpleNamespace(bounds=bounds, places=places)
        for part, bounds, places in (("0", (0, 4), (0, 1, 3)), ("1", (4, 8), (0, 2)), ("2", (8, 9), (0,)))
    }
    create(cell.store, results.arrays(MEASURES, 9, 4), {})
    parts = Parts(cell.store, {part: f"made of {part}" for part in rows})
    drawn = np.random.default_rng(1)
    numbers = {name: drawn.random((3, *each.shape)) for name, each in MEASURES.items()}
    at = 0
    for part, own in rows.items():
        found = None if part == "1" else numbers
        some = slice(at, at + len(own)) if found else slice(0)
        at += len(own) if found else 0
        auditing, asked = SimpleNamespace(measures={"test": MEASURES}), SimpleNamespace(shard=shards[part])
        written = tasks._written(auditing, cell, asked, own, found, some)  # type: ignore[arg-type]
        parts.record(part, written, **({} if found else {"refused": "no map"}), reasons={"law": f"why {part}"})
    labels, ids = np.arange(9), np.array([f"i{slot}" for slot in range(9)], object)
    images = SimpleNamespace(reader=lambda: {"label": labels}, image_ids=lambda: ids, classes=["a"])
    of = SimpleNamespace(images=images, dataset="data", network="net")
    known = {"shards": shards, "chosen": {"test": rows}, "cells": {"key": cell}, "measures": {"test": MEASURES}}
    pair = Pair(job=of, methods={}, maps={}, undefined={}, explained=labels, units={}, **known)  # type: ignore[arg-type]
    ((key, one, files),) = read(SimpleNamespace(folder=tmp_path), pair, {"key": parts}, {})  # type: ignore[arg-type]
    assert key == "key" and all(name.startswith("cells/noise.zarr/") for name in files)
    assert (one.refused, one.images, one.reasons) == ("no map", 4, {"law": "why 0"})
    assert (list(one.slots), list(one.ids)) == ([0, 3, 8], ["i0", "i3", "i8"])
    assert list(one.labels) == list(one.explained) == [0, 3, 8]
    for name, values in numbers.items():
        np.testing.assert_array_equal(one.arrays[name], values)
    slots, areas = numbers_of(pair, one)["net", "control:noise", "test.area"]
    assert slots.tolist() == [0, 3, 6, 8]
    np.testing.assert_array_equal(areas, [*numbers["area"][:2], np.nan, numbers["area"][2]])
