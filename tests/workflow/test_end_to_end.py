"""A miniature experiment through the real Snakefile, once; then what a second start, a dry run and upkeep say of it."""

import csv
import json
import shutil
import subprocess
import sys

import pytest
import xarray
from workflow_run import ROOT, contents, jobs_run, linked, mini, snakemake, states

from pipeline.upkeep import damage


def test_the_results_of_a_run(finished):
    results = finished / "results"
    assert damage.verify(results) == []
    units = (results / "scenes/tiny/units.csv").read_text().splitlines()
    layers = json.loads((results / "scenes/tiny/layers.json").read_text())
    iou = xarray.open_zarr(results / "scenes" / layers["0.1"]["iou"]).iou
    assert len(units) == 1 + iou.sizes["unit"] and list(layers) == ["0.1"]
    images = xarray.open_zarr(results / "scenes/images.zarr")
    assert images.image.shape == (8, 3, 32, 32) and images.attrs["classes"]
    page = (results / "report/mini/index.html").read_text()
    assert "tiny" in page and (results / "report/mini/figures").is_dir()
    (log,) = results.rglob("extract.*.tsv")
    (row,) = csv.DictReader(log.read_text().splitlines(), delimiter="\t")
    assert list(row) == ["s", "h:m:s", "max_rss", "cpu_time"]
    assert 0 < float(row["cpu_time"]) < 600 and 20 < float(row["max_rss"]) < 24_000


def test_a_second_start_has_nothing_to_do(finished, tmp_path):
    results = linked(finished, tmp_path)
    before = states(results)
    said = snakemake(tmp_path, mini(workers=1))
    assert "Nothing to be done" in said and states(results) == before


def test_a_damaged_chunk_is_recomputed_alone(finished, tmp_path):
    shutil.copytree(finished / "results", tmp_path / "results")  # not linked: its bytes are damaged here
    results = tmp_path / "results"
    before = contents(results)
    (chunk,) = results.glob("scenes/layers/*/activations.zarr/mean/c/0/0")
    chunk.write_bytes(bytes(reversed(chunk.read_bytes())))
    assert [found.file for found in damage.repair(results)] == [chunk]
    said = snakemake(tmp_path, mini(workers=1))
    assert set(jobs_run(said)) <= {"make_extract", "make_dissect", "make_report"}
    assert contents(results) == before


@pytest.mark.parametrize("snakefile", ["Snakefile", "workflow/Snakefile"])
def test_both_snakefiles_give_the_same_plan(finished, tmp_path, snakefile):
    """`workflow/Snakefile` is where the Snakemake workflow catalog looks for a workflow."""
    linked(finished, tmp_path)
    command = [
        sys.executable,
        "-P",
        "-m",
        "snakemake",
        "--snakefile",
        ROOT / snakefile,
        "--configfile",
        finished / "mini.yaml",
    ]
    done = subprocess.run([*command, "-n"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, done.stderr
