"""An experiment need not dissect: networks without layers or maps, and data sets without concepts."""

import pytest
from experiments import job, run, scenes, tiny

from pipeline.errors import MicrotomeError
from pipeline.run import experiment, forecast, planner, preflight
from pipeline.stages.dissect.found import read_dissection

WITHOUT = {
    "no layers": ({"layers": []}, {}),
    "pooled": ({"store": "pooled"}, {}),
    "each pooled": ({"store": {"a": "pooled", "?": "pooled"}}, {}),
    "no concepts": ({}, {"concepts": []}),
}


def configuration(folder, network=(), dataset=(), **sections):
    raw = scenes(folder, networks={"tiny": tiny(folder, arguments={"classes": 12}, **dict(network))}, **sections)
    raw["datasets"]["scenes"] |= {"images": {"train": 6, "validation": 40}} | dict(dataset)
    return raw | {"figures": {"formats": ["png"]}}


def planned(raw):
    return planner.make(experiment.parse(raw))


@pytest.mark.parametrize("case", WITHOUT)
def test_neither_concepts_nor_dissections_are_planned(tmp_path, case):
    stages = [step.stage for step in planned(configuration(tmp_path, *WITHOUT[case])).steps.values()]
    assert stages == ["ingest", "network", "extract", "report"]


def test_a_network_beside_one_that_is_dissected(tmp_path):
    raw = configuration(tmp_path)
    raw["networks"]["other"] = raw["networks"]["tiny"] | {"layers": []}
    plan = planned(raw)
    assert [step.network for step in plan.steps.values() if step.stage == "dissect"] == ["tiny"]
    parents = [plan.steps[path].name for path in job(plan, "report").step.parents]
    assert parents == ["network tiny", "network other", "dissect scenes tiny", "extract scenes other"]


@pytest.mark.parametrize(
    ("network", "sections", "said"),
    [
        ({"ablate": {"rank": "validation"}}, {}, "ablate: it is not dissected on 'scenes'"),
        ({}, {"probes": {"fit": "validation"}}, "probes: network 'tiny' has `layers: \\[\\]`"),
        ({}, {"sight": {"minibatch": 4}}, "sight: network 'tiny' has `layers: \\[\\]`"),
        (
            {},
            {"similarity": {"minibatch": 12, "images": 24, "compare": {"own": {"networks": ["tiny"]}}}},
            "similarity: network 'tiny' has `layers: \\[\\]`",
        ),
    ],
)
def test_what_needs_layers_says_so(tmp_path, network, sections, said):
    with pytest.raises(MicrotomeError, match=said):
        planned(configuration(tmp_path, {"layers": []} | network, **sections))


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("case", WITHOUT)
def test_it_is_inspected_and_foretold(tmp_path, case):
    plan = planned(configuration(tmp_path, *WITHOUT[case]))
    preflight.check(plan)
    assert [each.job.stage.name for each in forecast.forecast(plan)] == ["ingest", "network", "extract", "report"]
    assert forecast.lines(plan, forecast.forecast(plan)) and preflight.sizes(plan)


@pytest.mark.usefixtures("in_process")
def test_all_pooled_by_patterns_is_refused_with_the_way_on(tmp_path):
    plan = planned(configuration(tmp_path, {"layers": "auto", "store": {"?": "pooled"}}))
    with pytest.raises(MicrotomeError, match=r"leaves none to dissect.*if none is to be dissected, `store: pooled`"):
        preflight.check(plan)


@pytest.mark.usefixtures("workers")
@pytest.mark.parametrize("case", ["no layers", "no concepts"])
def test_the_other_stages_run_and_the_report_has_no_dissection(tmp_path, case):
    raw = configuration(tmp_path, *WITHOUT[case], calibrate={"splits": 2, "methods": ["temperature"]})
    plan = run(raw, "ingest", "network", "extract", "calibrate", "report")
    out = job(plan, "report").folder
    pages = sorted(path.name for path in out.glob("*.html"))
    assert pages == ["calibration.html", "index.html", "methods.html", "provenance.html"]
    text = (out / "index.html").read_text()
    assert "1 network, none of them dissected." in text and "calibration.html" in text
    assert not (tmp_path / "results/scenes/concepts.zarr").exists()
    with pytest.raises(MicrotomeError):
        read_dissection(tmp_path / "results", "scenes", "tiny")
