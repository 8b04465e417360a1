"""A stage that the project does not know, added by an environment variable, through the real Snakefile."""

import json
import os
import subprocess
import sys

import numpy as np
import xarray
from workflow_run import ROOT, jobs_run, mini, snakemake

from pipeline.stages.registry import ADDED


def test_one_entry_in_the_registry_is_all_that_it_takes(tmp_path, monkeypatch):
    monkeypatch.setenv(ADDED, "brightness:STAGE")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests/support")]))
    config = mini(workers=1) | {"brightness": {"channel": 1}}

    said = snakemake(tmp_path, config, "brightness", "--dry-run")
    assert "make_brightness" in said and "brightness scenes" in said, "its rule, its word, and its cost in the forecast"
    said = snakemake(tmp_path, config, "brightness")
    assert jobs_run(said) == {"make_ingest": 1, "make_brightness": 1} and "Brightness of scenes" in said

    results = tmp_path / "results"
    images = xarray.open_zarr(results / "scenes/images.zarr").image.values
    found = xarray.open_zarr(results / "scenes/brightness.zarr").brightness.values
    np.testing.assert_allclose(found, images[:, 1].mean((1, 2)) / 255, rtol=1e-6)
    (manifest,) = (results / "scenes/done").glob("brightness.*.json")
    assert json.loads(manifest.read_text())["manifest"]["result"] == {"shards": [0]}
    assert "Nothing to be done" in snakemake(tmp_path, config, "brightness")

    config["brightness"] = {"channel": 2}
    (tmp_path / "mini.yaml").write_text(json.dumps(config))
    why = upkeep(tmp_path, "why", "mini.yaml")
    assert "channel: 1 → 2" in why and "1 of 1 shards to measure" in why
    assert "removed results/scenes/brightness.zarr" in upkeep(tmp_path, "recompute", "mini.yaml", "brightness")
    assert jobs_run(snakemake(tmp_path, config, "brightness")) == {"make_brightness": 1}
    said = snakemake(tmp_path, config | {"brightness": {"chanel": 2}}, "brightness", code=1)
    assert "brightness.chanel: unknown key; nearest: channel" in said


def upkeep(folder, *arguments):
    command = [sys.executable, "-m", "pipeline.upkeep", *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
