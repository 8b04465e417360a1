"""A results folder as an outside program reads it."""

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from experiments import SIZE, labelled_images, run, segmentation

import pipeline
from pipeline.errors import MicrotomeError

ROOT = Path(__file__).parents[3]
NAMES = [f"street/{k:02}" for k in range(10)]


@pytest.fixture(scope="module")
def folder(workers, tmp_path_factory):
    """A results folder with one data set, one of whose images is broken, and one network."""
    folder = tmp_path_factory.mktemp("experiment")
    labelled_images(folder, NAMES)
    (folder / f"images/{NAMES[4]}.png").write_bytes(b"broken")
    raw = segmentation(folder, dissect={"quantile": 0.2, "min_iou": 0.01})
    run(raw, "ingest", "concepts", "network", "extract", "dissect")
    return folder / "results"


def test_everything_by_name(folder):
    results = pipeline.open_results(folder)
    assert list(results) == ["photos"] and len(results) == 1
    photos = results["photos"]
    assert list(photos) == ["tiny"]
    assert list(photos["tiny"]) == ["a", "b"]
    assert results.networks["tiny"]["weights"] == "random" and results.reports == {}
    assert "photos" in repr(results) and "tiny" in repr(photos) and "a, b" in repr(photos["tiny"])
    assert [row["image_id"] for row in photos.quarantine] == [f"{NAMES[4]}.png"]


def test_the_arrays_of_the_contract(folder):
    photos = pipeline.open_results(str(folder))["photos"]
    tiny = photos["tiny"]
    layer = tiny["b"]
    for data, names in [
        (photos.images, {"image": ("image", "channel", "y", "x"), "label": ("image",), "valid": ("image",)}),
        (photos.concepts, {"label_map": ("image", "category", "y", "x")}),
        (tiny.logits, {"logits": ("image", "class")}),
        (layer.activations, {"activation": ("image", "unit", "y", "x"), "maximum": ("image", "unit")}),
        (layer.thresholds, {"threshold": ("unit",), "active": ("unit",)}),
        (layer.iou, {"iou": ("unit", "concept"), "intersection": ("unit", "concept"), "concept_area": ("concept",)}),
        (layer.counts, {"intersection": ("group", "unit", "concept"), "pixels": ("group",)}),
    ]:
        assert isinstance(data, xr.Dataset)
        assert {name: data[name].dims for name in names} == names
    assert photos.images.sizes["image"] == 10 and set(photos.images.coords) >= {"image_id"}
    assert layer.id in layer.paths["iou"]
    counts = layer.counts["intersection"].sum("group")
    np.testing.assert_array_equal(counts, layer.iou["intersection"])


def test_the_iou_follows_from_the_areas(folder):
    iou = pipeline.open_results(folder)["photos"]["tiny"]["b"].iou.load()
    union = iou["unit_area"] + iou["concept_area"] - iou["intersection"]
    np.testing.assert_allclose(iou["iou"], iou["intersection"] / union, rtol=1e-6)
    blob = iou.sel(concept="blob")
    assert blob["category"] == "truth/thing" and blob["concept_id"] == 2
    assert iou.attrs["pixels"] == 9 * SIZE * SIZE


def test_the_tables(folder):
    tiny = pipeline.open_results(folder)["photos"]["tiny"]
    assert [(row["layer"], row["unit"]) for row in tiny.units] == [("a", k) for k in range(4)] + [
        ("b", k) for k in range(5)
    ]
    for row in tiny.units:
        best = tiny[row["layer"]].iou["iou"][row["unit"]].values.max()
        assert row["iou"] == pytest.approx(best, rel=1e-6)
    assert any(row["concept"] for row in tiny.units)
    assert len(tiny.units_permuted) == 9


def test_what_is_not_there(folder, tmp_path):
    results = pipeline.open_results(folder)
    with pytest.raises(MicrotomeError, match="no data set 'photo'; nearest: photos"):
        results["photo"]
    with pytest.raises(MicrotomeError, match="no dissected network 'tiny2'; nearest: tiny"):
        results["photos"]["tiny2"]
    with pytest.raises(MicrotomeError, match="no layer 'c'"):
        results["photos"]["tiny"]["c"]
    assert "photo" not in results and results.get("photo") is None and "photos" in results
    with pytest.raises(MicrotomeError, match="no such folder"):
        pipeline.open_results(tmp_path / "absent")
    with pytest.raises(MicrotomeError, match="no data set has been ingested here"):
        pipeline.open_results(tmp_path)


def test_a_network_that_was_extracted_only_is_not_listed(folder, tmp_path):
    (tmp_path / "photos/half/logits.zarr").mkdir(parents=True)
    (tmp_path / "photos/images.zarr").mkdir()
    assert list(pipeline.open_results(tmp_path)["photos"]) == []


def test_importing_stays_cheap():
    code = (
        "import pipeline, sys; heavy = {'torch', 'xarray', 'zarr', 'dask'} & set(sys.modules); assert not heavy, heavy;"
    )
    code += "from pipeline import open_results; assert 'torch' not in sys.modules; print('ok')"
    output = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert output.stdout == "ok\n", output.stderr
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        pipeline.absent  # noqa: B018


def test_every_path_of_layers_json_is_below_the_data_set(folder):
    entries = json.loads((folder / "photos/tiny/layers.json").read_text())
    for entry in entries.values():
        assert set(entry) == {"id", "activations", "thresholds", "iou"}
        assert all((folder / "photos" / entry[key] / "zarr.json").exists() for key in entry if key != "id")


def test_stores_convert_as_the_page_says(folder, tmp_path):
    """To zarr 2, pandas and text of numpy; to NetCDF what version 3 can hold."""
    (code,) = re.findall(
        r"^```python\n(import json.*?)\n\nplain\(", (ROOT / "docs/results.md").read_text(), re.S | re.M
    )
    names: dict = {}
    exec(code, names)
    stores = {path.parent.name: path.parent for path in folder.rglob("*.zarr/zarr.json")}
    assert {"images.zarr", "concepts.zarr", "activations.zarr", "iou.zarr", "logits.zarr"} <= set(stores)
    for name, store in stores.items():
        written = xr.open_zarr(store)
        ready = names["plain"](written)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # xarray: consolidated metadata of its own
            ready.to_zarr(tmp_path / name, zarr_format=2)
            again = xr.open_zarr(tmp_path / name)
        assert set(again.variables) == set(written.variables) and set(again.attrs) == set(written.attrs)
        for variable in written.variables:
            np.testing.assert_array_equal(again[variable].astype(object), written[variable].astype(object))
            if written[variable].dtype.kind == "T":
                assert ready[variable].astype(str).values.tolist() == written[variable].values.tolist()
                assert ready[variable].to_series().tolist() == written[variable].values.tolist()
        if name not in ("images.zarr", "activations.zarr"):
            ready.to_netcdf(tmp_path / f"{name}.nc", engine="scipy")
    assert json.loads(xr.open_zarr(tmp_path / "concepts.zarr").attrs["concepts"])["1"]["name"] == "left side"
