"""Curves of tests: what a table says by label is what the figure shows, and what cells say is what the table does."""

from __future__ import annotations

import numpy as np
import pytest
from toy_batch import audited

from pipeline.stages.audit import reduced
from pipeline.stages.audit.curves import FIGURES, curves, places
from pipeline.stages.audit.faithful import TESTS, Deletion, Road, SensitivityN
from pipeline.stages.audit.results import Outcome
from pipeline.stages.audit.sanity import LayerRandomisation


def told(prefix: str, labels: list[str], values: list[float]) -> dict[str, Outcome]:
    return {f"{prefix}.{label}": Outcome(f"{prefix}.{label}", each) for label, each in zip(labels, values, strict=True)}


def test_a_panel_for_each_method_with_the_control_in_grey() -> None:
    labels = ["0", "0.5", "1"]
    found = {
        "a": told("probability_black", labels, [1, 0.2, 0.1])
        | {"probability_black": Outcome("probability_black", 0.4)},
        "b": told("probability_black", labels, [1, 0.7, 0.1]),
        "control:random": told("probability_black", labels, [1, 0.6, 0.1]),
    }
    (drawing,) = FIGURES["deletion"](found, {"a": "Saliency", "b": "Grad-CAM"}, Deletion(steps=2))
    figure = drawing.draw(7.0)
    panels = [panel for panel in figure.axes if panel.axison]
    assert [panel.get_title(loc="left") or panel.get_title() for panel in panels] == ["Saliency", "Grad-CAM"]
    grey, own = panels[1].lines
    np.testing.assert_allclose(own.get_xydata(), [[0, 1], [0.5, 0.7], [1, 0.1]])
    np.testing.assert_allclose(grey.get_ydata(), [1, 0.6, 0.1])
    assert "random maps" in drawing.caption


def test_nothing_is_drawn_of_nothing() -> None:
    refused = {"a": {"deletion": Outcome("deletion", np.nan, state="refused")}}
    assert list(FIGURES["deletion"](refused, {"a": "A"}, Deletion())) == []


@pytest.mark.parametrize(
    ("test", "options", "prefixes"),
    [
        ("road", Road(), ["accuracy_most_first", "accuracy_least_first"]),
        ("sensitivity_n", SensitivityN(), ["correlation"]),
        ("layer_randomisation", LayerRandomisation(orders=["cascading"]), ["cascading_rank", "cascading_ssim"]),
    ],
)
def test_every_series_has_a_line(test: str, options: object, prefixes: list[str]) -> None:
    found = {"a": {}}
    for prefix in prefixes:
        found["a"] |= told(prefix, ["0.1", "0.5"], [0.3, 0.4])
    (drawing,) = FIGURES[test](found, {"a": "A"}, options)
    assert len(drawing.draw(3.5).axes[0].lines) == len(prefixes)


def test_points_lie_at_their_numbers_where_they_have_one() -> None:
    assert places(["0", "0.5", "1"])[0].tolist() == [0, 0.5, 1]
    assert places(["1", "4", "64"])[1] == ["1", "4", "64"]
    assert places(["1/6", "2/6"])[1] == ["1/6", "2/6"]


@pytest.mark.parametrize("width", [3.5, 7.0])
def test_many_methods_fit(width: float) -> None:
    lines = {f"a method with a long name {at}": {"x": np.array([0.0, 1.0])} for at in range(14)}
    figure = curves(width, ["0", "1"], lines, {}, ("share", "score"))
    assert figure.get_figwidth() == width
    assert sum(panel.axison for panel in figure.axes) == 14


def test_the_table_has_some_points_of_a_curve_and_all_areas() -> None:
    options = Deletion(steps=32, fillers=["black", "blur"])
    measures = TESTS["deletion"].measures(options)
    draw = np.random.default_rng(0)
    arrays = {name: draw.random((5, *measure.shape)) for name, measure in measures.items()}
    cell = audited("deletion", measures, arrays, list("abcde"))
    found = {each.measure: each for each in reduced.curve(cell, options)}
    assert list(found)[:4] == ["probability_black", "score_black", "probability_blur", "score_blur"]
    labels = [name.removeprefix("probability_blur.") for name in found if name.startswith("probability_blur.")]
    assert labels == ["0", "0.125", "0.25", "0.375", "0.5", "0.625", "0.75", "0.875", "1"]
    assert found["probability_blur.0.25"].value == pytest.approx(arrays["probability_curve"][:, 1, 8].mean())
    assert found["score_black"].value == pytest.approx(arrays["score_black"].mean())
