"""What a network gave before it was replaced is kept and shown; groups are shown with mean and spread."""

import csv
import json
import statistics

import numpy as np
import pytest
import torch
import xarray
from experiments import labelled_images, run, segmentation, tiny

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.stages.extract import replaced
from pipeline.upkeep import damage, unreferenced

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "concepts", "network", "extract", "dissect", "report")


def experiment(folder, **networks):
    labelled_images(folder, [f"town/{i}" for i in range(6)])
    rows = [f"town/{i}.png,{'ab'[i % 2]}" for i in range(6)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    raw = segmentation(folder, labels=str(folder / "labels.csv"), dissect={"min_iou": 0.01})
    return raw | {"networks": networks, "report": {"cards": 0}}


def weights(folder, seed):
    made = load(NetworkSpec(module=f"{folder / 'network.py'}:tiny", weights="random", seed=seed))
    torch.save(made.state_dict(), folder / "weights.pt")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_before_and_after(tmp_path):
    network = tiny(tmp_path, weights=str(tmp_path / "weights.pt"))
    weights(tmp_path, 1)
    raw = experiment(tmp_path, tiny=network)
    made = run(raw, *STAGES)
    home = made.results / "photos/tiny"
    first = {name: (home / name).read_bytes() for name in ("units.csv", "units-permuted.csv", "layers.json")}
    logits = xarray.open_zarr(home / "logits.zarr").logits.values
    assert not (home / "before").exists()

    weights(tmp_path, 2)
    run(raw, *STAGES)
    (before,) = (home / "before").iterdir()
    assert {name: (before / name).read_bytes() for name in first} == first
    assert (home / "units.csv").read_bytes() != first["units.csv"]
    np.testing.assert_array_equal(xarray.open_zarr(before / "logits.zarr").logits.values, logits)
    facts = json.loads((before / "facts.json").read_text())
    label = xarray.open_zarr(made.results / "photos/images.zarr").label.values
    assert facts["weights_sha256"].startswith(before.name)
    assert (facts["images"], facts["accuracy"]) == (6, (logits.argmax(1) == label).mean())
    _check_page(made, home, before)

    # Back to the first weights: those are the present ones again, and the second are kept.
    weights(tmp_path, 1)
    run(raw, *STAGES)
    (other,) = (home / "before").iterdir()
    assert other.name != before.name
    assert (home / "units.csv").read_bytes() == first["units.csv"]

    # What is kept is verified as everything is; where it is damaged it is given up.
    assert damage.verify(made.results) == []
    (other / "units.csv").write_bytes((other / "units.csv").read_bytes()[:-1])
    assert [found.file for found in damage.verify(made.results)] == [other / "units.csv"]
    with pytest.raises(MicrotomeError, match=r"units\.csv is not what was kept"):
        replaced.kept(home)
    assert other not in unreferenced.folders(made.results)
    damage.repair(made.results)
    assert replaced.kept(home) == [] and damage.verify(made.results) == []
    assert other in unreferenced.folders(made.results)


def _check_page(made, home, before):
    page = (made.results / "report/mini/compare.html").read_text()
    old, new = rows_of(before / "units.csv"), rows_of(home / "units.csv")
    assert old[0]["layer"] == new[0]["layer"]
    expected = [
        (b["layer"], b["unit"], a["concept"], b["concept"])
        for a, b in zip(old, new, strict=True)
        if a["concept"] != b["concept"]
    ]
    table = rows_of(made.results / "report/mini/tables/relabelled-photos-tiny.csv")
    assert [(r["layer"], r["unit"], r["concept_before"], r["concept"]) for r in table] == expected
    assert expected
    detectors = [sum(bool(row["concept"]) for row in rows) for rows in (old, new)]
    assert (
        f"{detectors[0]} detectors before, {detectors[1]} now" in (made.results / "report/mini/index.html").read_text()
    )
    assert before.name[:12] in page


def test_images_that_come_keep_nothing(tmp_path):
    """Only other weights do."""
    raw = experiment(tmp_path, tiny=tiny(tmp_path))
    run(raw, *STAGES)
    labelled_images(tmp_path, ["street/x"])
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text() + "street/x.png,a\n")
    made = run(raw, *STAGES)
    assert not (made.results / "photos/tiny/before").exists()
    assert not (made.results / "report/mini/compare.html").exists(), "there is nothing to compare"


def test_a_group(tmp_path):
    seeds = {f"seed{seed}": tiny(tmp_path, seed=seed, group="seeds") for seed in (1, 2, 3)}
    made = run(experiment(tmp_path, alone=tiny(tmp_path, group="single"), **seeds), *STAGES)
    (file,) = (made.results / "report/mini/tables").glob("group-*.csv")
    assert file.name == "group-photos-seeds.csv", "a group of one is none"
    for row in rows_of(file):
        shares = []
        for name in seeds:
            units = [u for u in rows_of(made.results / "photos" / name / "units.csv") if u["layer"] == row["layer"]]
            shares.append(sum(bool(unit["concept"]) for unit in units) / len(units))
            assert float(row[name]) == shares[-1]
        assert float(row["mean"]) == pytest.approx(statistics.fmean(shares))
        assert float(row["standard_deviation"]) == pytest.approx(statistics.stdev(shares))
    assert {row["layer"] for row in rows_of(file)} == {"a", "b"}
    assert (made.results / "report/mini/figures/group-photos-seeds.svg").exists()
