"""The forecast: bytes that come true, what is there already, refusals before any work, and a probe of the network."""

import json
import shutil
from collections import namedtuple

import pytest
from experiments import job, run, scenes

from pipeline.errors import MicrotomeError
from pipeline.networks.speed import Probe, measure
from pipeline.plan import inspected
from pipeline.plan.cost import rate_of
from pipeline.run import experiment, forecast, preflight
from pipeline.run.planner import make
from pipeline.workers import memory

STAGES = ("ingest", "concepts", "network", "extract", "dissect")


@pytest.fixture
def answered(monkeypatch):
    """The inspection answers in this process, which has imported torch; returns what it was asked."""
    from pipeline.networks import inspection

    asked = []

    def here(module, requests, what):
        assert module == "pipeline.networks.inspection"
        asked.extend(requests)
        return json.loads(json.dumps(inspection.answer(json.loads(json.dumps(requests)))))

    monkeypatch.setattr(inspected, "in_own_process", here)
    return asked


def checked(raw, probe=False):
    plan = make(experiment.parse(raw))
    preflight.check(plan, probe)
    return plan


def by_name(estimates):
    return {each.name: each.cost for each in estimates}


@pytest.mark.usefixtures("workers")
def test_what_was_foretold_is_what_was_written(tmp_path, answered):
    raw = scenes(tmp_path)
    raw["networks"]["tiny"]["store"] = {"b": "pooled"}
    plan = checked(raw)
    before = by_name(forecast.forecast(plan))
    extracted = before["extract scenes tiny"]
    assert [store.name for store in extracted.stores] == ["a", "b"]
    # 20 images of split validation in 3 whole shards of 8; float16 maps, maximum and mean
    assert extracted.stores[0].raw == 24 * (2 * 4 * 8 * 8 + 8 * 4) and extracted.stores[1].raw == 24 * 8 * 5
    assert before["ingest scenes"].stores[0].raw == 3 * 16 * 16 * 26
    assert extracted.tasks == 3 and extracted.images == 20 and extracted.seconds is None  # nobody probed
    assert all(store.missing == store.expected > 0 for cost in before.values() for store in cost.stores)

    run(raw, *STAGES)
    after = forecast.forecast(plan)
    assert {"extract scenes tiny", "dissect scenes tiny"} <= {each.name for each in after if each.done}
    assert sum(store.missing for each in after for store in each.cost.stores) == 0


@pytest.mark.usefixtures("workers")
def test_what_an_interrupted_run_left_counts(tmp_path, answered):
    raw = scenes(tmp_path)
    plan = checked(raw)
    run(raw, "ingest", "network", "extract")
    extraction = job(plan, "extract", "scenes", "tiny")
    folders = [entry["manifest"].rpartition("/done/")[0] for entry in extraction.read().result["layers"]]
    extraction.begin()  # removes the manifest
    extraction.refers_to([plan.results / folder for folder in folders])
    stores = by_name(forecast.forecast(plan))["extract scenes tiny"].stores
    assert all(store.there > 0 for store in stores)
    files = [path for folder in folders for path in (plan.results / folder).rglob("*") if path.is_file()]
    on_disk = sum(path.stat().st_size for path in files)
    assert sum(store.there for store in stores) == pytest.approx(on_disk)


def test_a_disk_that_is_too_small(tmp_path, answered, monkeypatch):
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"]["images"] = {"train": 0, "validation": 60_000}
    plan = checked(raw)
    costs = forecast.forecast(plan)
    need = sum(store.missing for each in costs for store in each.cost.stores)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need * 1.1))
    forecast.check_disk(plan, costs)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need * 0.9))
    with pytest.raises(MicrotomeError, match=r"about 0\.\d+ GB more, .* GB of it for images\.zarr, .*`max_images`"):
        forecast.check_disk(plan, costs)


def test_the_lines(tmp_path, answered):
    raw = scenes(tmp_path)
    raw["networks"]["tiny"]["store"] = {"b": "pooled"}
    plan = checked(raw, probe=True)
    said = forecast.lines(plan, forecast.forecast(plan))
    assert said[0].split() == ["GB", "on", "disk", "missing", "images", "images/s", "time", "tasks", "GB/worker"]
    assert {len(line) for line in said[:3]} == {len(said[0])}, "aligned"
    row = next(line for line in said if line.startswith("extract scenes tiny"))
    assert float(row.split()[7]) > 0  # images a second
    assert said[-1] == "stored pooled, without maps, and left out of dissect: b"
    count = len(answered)
    checked(raw, probe=True)
    assert len(answered) == count, "a network is measured once"


def test_what_is_not_stored_is_saved_and_forwarded_again(tmp_path, answered):
    raw = scenes(tmp_path)
    raw["datasets"]["scenes"]["images"] = {"train": 0, "validation": 60_000}
    full = checked(raw, probe=True)
    raw["networks"]["tiny"]["store"] = {"a": "none"}
    plan = checked(raw, probe=True)
    stored, streamed = (by_name(forecast.forecast(each)) for each in (full, plan))
    before, now = (each["extract scenes tiny"].stores for each in (stored, streamed))
    assert now[0].kept == "none" and now[1] == before[1]
    assert now[0].raw < before[0].raw / 10 and now[0].unstored == 60_000 * 2 * 4 * 8 * 8 - now[0].raw
    first, again = streamed["extract scenes tiny"], streamed["dissect scenes tiny"]
    assert again.seconds == pytest.approx(stored["dissect scenes tiny"].seconds + 60_000 / float(first.rate), rel=0.01)
    assert again.rate == first.rate and again.memory > stored["dissect scenes tiny"].memory
    said = forecast.lines(plan, forecast.forecast(plan))
    assert any(line.startswith("  a (not stored)") for line in said)
    assert said[-1].startswith("not stored, and counted in two forward passes in place of one: a; saves 0.0")


@pytest.mark.usefixtures("workers")
def test_the_memory_of_layers_that_are_not_stored_is_foretold(tmp_path, answered, monkeypatch):
    raw = scenes(tmp_path)
    raw["networks"]["tiny"]["store"] = "none"
    foretold = by_name(forecast.forecast(checked(raw)))["dissect scenes tiny"].memory
    asked = []

    def noted(cluster, need, what, remedy):
        if what.startswith("dissect"):
            asked.append(need)

    monkeypatch.setattr(memory, "check_memory", noted)
    run(raw, *STAGES)
    assert asked
    assert max(asked) <= foretold < 8 * max(asked), "enough, and no budget that nothing fills"


@pytest.mark.parametrize(
    ("store", "message"),
    [
        ({"?": "pooled"}, "every layer is stored pooled, which leaves none to dissect"),
        ({"c": "pooled"}, "store: 'c' is none of its layers"),
        ({"a": "full", "?": "pooled"}, "layer 'a' fits 'a' and '\\?', which differ"),
    ],
)
def test_stores_that_are_refused(tmp_path, answered, store, message):
    raw = scenes(tmp_path)
    raw["networks"]["tiny"] |= {"store": store, "layers": "auto"}
    with pytest.raises(MicrotomeError, match=message):
        checked(raw)


def test_a_probe():
    def wanted(**changes):
        network = {"torchvision": "squeezenet1_1"} | changes.pop("network", {})
        rest = {"input_shape": (3, 64, 64), "micro_batch": 2, "channels_last": True, "device": "cpu"}
        return Probe.model_validate({"network": network} | rest | changes)

    found = measure(wanted())
    assert found["images"] == 2 and 1 < found["images_per_second"] < 1e5
    small, large = (measure(wanted(input_shape=(3, side, side))) for side in (8192, 16384))
    assert small["images"] == large["images"] == 0
    assert 2 < small["images_per_second"] / large["images_per_second"] < 8  # four times the operations
    assert rate_of(small).startswith("~")
    assert "skipped" in measure(wanted(input_shape=(3, 1, 1)))
