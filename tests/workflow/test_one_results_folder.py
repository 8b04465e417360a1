"""A miniature experiment end to end; then another one in the same folder, and the first again.

The same runs say whether the number of workers can be seen in a result: 1, 4 and 2 of them.
"""

import csv
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
from workflow_run import PARSING, TINY, contents, jobs_run, ledger_shards, snakemake, states, written

from pipeline.config.networks import NetworkSpec
from pipeline.networks.build import build
from pipeline.networks.checkpoint import write_safetensors
from pipeline.run import experiment, planner
from pipeline.stages.registry import jobs
from pipeline.storage.lock import RunLock


@pytest.fixture
def first(tmp_path):
    """A network that is trained here, so its untrained control stands beside it."""
    return {
        "name": "first",
        "results": "results",
        "datasets": {
            "scenes": {
                "kind": "scenes",
                "size": 32,
                "shard_images": 16,
                "images": {"train": 24, "validation": 40},
                "concepts": ["truth", "pixels", "parsed"],
            }
        },
        "segmenters": {"parsed": segmenter(tmp_path)},
        "networks": {
            "net": {
                "module": f"{TINY}:tiny",
                "arguments": {"classes": 12},
                "weights": "train",
                "layers": ["0.1", "0.3"],
                "numerics": {"micro_batch": 8},
                "train": {"dataset": "scenes", "recipe": {"steps": 4, "batch_size": 8}},
            }
        },
        "cluster": {"workers": 1},
        "report": {"title": "The first", "cards": 2},
    }


def segmenter(folder: Path) -> dict[str, Any]:
    """A segmentation network with weights from a file, as a source of concepts."""
    network = NetworkSpec(module=f"{PARSING}:Parsing", seed=2)
    write_safetensors(folder / "parsing.safetensors", build(network).state_dict())
    (folder / "things.txt").write_text("0 background\n1 round\n2 square\n")
    (folder / "materials.txt").write_text("wool\nwood\n")
    return {
        "module": network.module,
        "weights": str(folder / "parsing.safetensors"),
        "numerics": {"micro_batch": 5},
        "categories": {
            "material": {"output": "material", "classes": str(folder / "materials.txt")},
            "thing": {"output": "thing", "classes": str(folder / "things.txt"), "void": [0]},
        },
    }


@pytest.fixture
def second(first):
    """Another data set, other settings and another network, all under the names of the first."""
    scenes = first["datasets"]["scenes"] | {"seed": 1, "dissect": {"method": "cvpr2017", "min_iou": 0.001}}
    net = first["networks"]["net"] | {"weights": "random", "seed": 3, "layers": ["0.3"]}
    del net["train"]
    return first | {"name": "second", "datasets": {"scenes": scenes}, "networks": {"net": net}}


@pytest.mark.usefixtures("workers")
def test_two_experiments_in_one_folder(tmp_path, first, second):
    results = tmp_path / "results"
    said = snakemake(tmp_path, first, "--dry-run")
    assert "make_extract" in said
    assert not results.exists() or not written(results), "a dry run writes nothing but caches"

    said = snakemake(tmp_path, first)
    assert jobs_run(said) == {
        "make_ingest": 1,
        "make_concepts": 1,
        "make_network": 2,
        "make_extract": 2,
        "make_dissect": 2,
        "make_report": 1,
    }
    assert f"The report: {results / 'report/first/index.html'}" in said
    assert "ingest scenes" in said.rpartition("Finished jobid")[2], "the account of time"
    _check_contract(results)
    layers = json.loads((results / "scenes/net/layers.json").read_text())
    once = contents(results)
    before = states(results)

    snakemake(tmp_path, first, "--report", "report.zip")
    with zipfile.ZipFile(tmp_path / "report.zip") as archive:
        figures = {Path(name).name for name in archive.namelist() if name.endswith(".svg")}
        page = archive.read("report/report.html").decode()
    assert {"detectors-scenes-net.svg", "iou-scenes-net.svg", "training-scenes-net.svg"} <= figures
    assert "from the input (top) to the output" in page, "the caption of the detectors"
    for name in ("index.html", "network-scenes-net.html"):
        assert "snakemake report --configfile first.yaml" in (results / "report/first" / name).read_text()

    said = snakemake(tmp_path, first)
    assert "Nothing to be done" in said
    assert states(results) == before, "a second run writes nothing"

    lock = RunLock(results)
    lock.acquire()
    assert lock.file is not None
    with lock.file:
        said = snakemake(tmp_path, second, code=1)
    assert "another run works on results: pid" in said
    assert "Traceback" not in said
    assert states(results) == before

    said = snakemake(tmp_path, second | {"cluster": {"workers": 4}}, "dissect")
    assert set(jobs_run(said)) == {"make_ingest", "make_concepts", "make_network", "make_extract", "make_dissect"}
    other = contents(results)
    alone = _in_a_fresh_folder(tmp_path / "fresh", second)
    assert {name: other.get(name) for name in alone} == alone, "as in a folder of its own, with one worker"
    assert (results / "report/first/index.html").exists(), "the report of the first stays"

    kept, lost = (results / "scenes/layers" / layer["id"] for layer in layers.values())
    shutil.rmtree(lost)
    before = states(kept)
    said = snakemake(tmp_path, first | {"cluster": {"workers": 2}}, "dissect")
    assert jobs_run(said)["make_extract"] == 2
    again = contents(results)
    of_report = [name for name in once if name.endswith("/accuracy.csv")]  # extract removes what it writes
    assert len(of_report) == 2
    kept_names = [name for name in once if name not in of_report]
    assert {name: again.get(name) for name in kept_names} == {name: once[name] for name in kept_names}, "two workers"
    after = states(kept)
    chunks = [name for name in before if "/c/" in name]
    assert chunks
    assert [after[name] for name in chunks] == [before[name] for name in chunks], "a layer that stayed is as it was"


def _in_a_fresh_folder(results: Path, wanted: dict) -> dict[str, str]:
    """The results of a configuration, made by the stages as a library."""
    made = planner.make(experiment.parse(wanted | {"results": str(results)}))
    for job in jobs(made):
        if job.stage.name != "report":
            job.stage.run(job)
    return contents(results)


def _check_contract(results: Path) -> None:
    """What an outside program may rely on, read with xarray alone."""
    data = results / "scenes"
    images = xarray.open_zarr(data / "images.zarr")
    assert images.image.dims == ("image", "channel", "y", "x")
    assert images.image.shape == (64, 3, 32, 32)
    assert images.image.dtype == np.uint8
    assert bool(images.valid.all())
    assert "image_id" in images.coords
    assert len(images.attrs["classes"]) == 12
    assert sorted(set(images.split.values.tolist())) == ["train", "validation"]
    assert (data / "quarantine.csv").read_text() == "image_id,path,reason\n"

    concepts = xarray.open_zarr(data / "concepts.zarr")
    assert concepts.label_map.dims == ("image", "category", "y", "x")
    assert set(concepts.category.values.tolist()) == {
        "truth/object",
        "truth/part",
        "truth/material",
        "truth/colour",
        "pixels/colour",
        "parsed/thing",
        "parsed/material",
    }
    validation = images.split.values == "validation"
    numbers = set(np.unique(concepts.label_map.values[validation]).tolist())
    assert len(numbers) > 20
    assert numbers - {0} <= {int(number) for number in concepts.attrs["concepts"]}

    for network in ("net", "net-untrained"):
        layers = json.loads((data / network / "layers.json").read_text())
        assert list(layers) == ["0.1", "0.3"]
        with (data / network / "units.csv").open(newline="") as file:
            units = list(csv.DictReader(file))
        assert [(row["layer"], int(row["unit"])) for row in units] == [("0.1", u) for u in range(6)] + [
            ("0.3", u) for u in range(5)
        ]
        for name, layer in layers.items():
            stored = xarray.open_zarr(data / layer["activations"])
            assert stored.activation.dims == ("image", "unit", "y", "x")
            assert stored.activation.dtype == np.float16
            maps = stored.activation.values[validation].astype(np.float32) * stored.attrs["scale"]
            assert np.isfinite(maps).all()
            np.testing.assert_allclose(stored.maximum.values[validation], maps.max((2, 3)), rtol=1e-3)
            np.testing.assert_allclose(stored["mean"].values[validation], maps.mean((2, 3)), rtol=2e-3, atol=1e-4)
            thresholds = xarray.open_zarr(data / layer["thresholds"])
            assert {"quantile", "positions", "border", "split"} <= set(thresholds.attrs)
            iou = xarray.open_zarr(data / layer["iou"])
            assert iou.intersection.dims == iou.iou.dims == ("unit", "concept")
            union = iou.unit_area + iou.concept_area - iou.intersection
            np.testing.assert_allclose(
                iou.iou.values, (iou.intersection / union).transpose("unit", "concept").values, 1e-6
            )
            assert iou.sizes["unit"] == sum(row["layer"] == name for row in units)
            assert {"concept", "concept_id", "category"} <= set(iou.coords)
            assert 0 not in iou.concept_id.values
            shards = ledger_shards((data / layer["activations"]).with_suffix(".ledger"))
            assert sorted(shards) == ["1", "2", "3"], "only the shards that hold images of the split, each once"
        logits = xarray.open_zarr(data / network / "logits.zarr").logits
        assert logits.dims == ("image", "class")
        assert np.isfinite(logits.values[validation]).all()
    assert (data / "net" / "units-permuted.csv").exists()
    model = json.loads((results / "networks/net/model.json").read_text())
    assert model["recipe"]["steps"] == 4
    assert len(model["weights_sha256"]) == 64
