"""A hundred thousand images: what is not linear shows. The figures for 1.3 million are those of bench_listing.py."""

import time

import pytest
from experiments import job
from large_listing import decoded_by_nobody, large

from pipeline.data import kinds as datasets
from pipeline.run import experiment, planner
from pipeline.stages.dissect import work

COUNT = 100_000


def seconds(function, *arguments) -> tuple[float, object]:
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def test_starts_and_ingest_of_many_images(tmp_path, monkeypatch):
    wanted = experiment.parse(large(tmp_path, COUNT))
    first, made = seconds(planner.make, wanted)
    assert first < 3  # measured: 0.3
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "listing", lambda *_, **__: pytest.fail("listed again"))
        later, again = seconds(planner.make, wanted)
    assert later < 0.3  # measured: 0.01, for any number of images
    assert list(again.steps) == list(made.steps)

    ingest = job(made, "ingest", "large")
    with decoded_by_nobody():
        spent, _ = seconds(ingest.stage.run, ingest)
    assert spent < 12  # measured: 1.2
    images = job(made, "extract", "large", "resnet").images
    assert images.count == COUNT and sum(images.splits["validation"].values()) == COUNT
    spent, counted = seconds(work.counted_images, images, "validation", images.shards("validation"), [])
    assert spent < 3 and sum(len(one.rows) for one in counted) == COUNT  # measured: 0.3
    spent, _ = seconds(work.basis, counted)
    assert spent < 1
