"""Stores on object storage, against a local S3 server: the same results, and what goes wrong."""

import json
import shutil
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from experiments import labelled_images, lines, run, scenes, segmentation, tiny

import pipeline
from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.storage import object_storage as objects
from pipeline.storage.engine import Located
from pipeline.storage.manifest import Manifest
from pipeline.storage.object_storage import objects_of, settle, size_of
from pipeline.storage.store import DamagedStoreError, Reader
from pipeline.upkeep import damage, unreferenced
from pipeline.upkeep.recompute import discard
from pipeline.workers import client
from pipeline.workers import pool as cluster

SECRET = "a-secret-that-stays-one"
ARRAYS = ("ingest", "concepts", "network", "extract", "dissect", "calibrate", "grams", "similarity", "ablate")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A server of S3 with a bucket, and a pool of workers that knows where it is."""
    from moto.server import ThreadedMotoServer

    one = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    one.start()
    _, port = one.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")).close()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "somebody",
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }.items():
            patch.setenv(name, value)
        with cluster.pool(Cluster(workers=1), tmp_path_factory.mktemp("pool")) as address:
            patch.setenv(client.ADDRESS, str(address))
            yield
    one.stop()
    objects.bucket.cache_clear()


def experiment(folder: Path, stores: str | None = None) -> dict:
    raw = scenes(folder) | {"stores": stores, "calibrate": {"splits": 1}}
    raw["datasets"]["scenes"]["images"]["validation"] = 30
    raw["networks"] = {"tiny": tiny(folder, arguments={"classes": 12}, ablate={"images": 20})}
    raw["similarity"] = {"compare": {"one": {"networks": ["tiny"]}}, "images": 20, "minibatch": 6, "neighbours": 3}
    return raw


@pytest.fixture(scope="module")
def both(server, tmp_path_factory):
    """One experiment with stores in its folder and one with stores in the bucket."""
    folder = tmp_path_factory.mktemp("objects")
    here, there = folder / "here", folder / "there"
    here.mkdir()
    there.mkdir()
    local = run(experiment(here), *ARRAYS)
    shutil.copy(here / "network.py", there / "network.py")
    return local, run(experiment(there, "s3://bucket/some/where"), *ARRAYS)


def outputs(made) -> dict[str, str]:
    return {step.name: made.manifest(step).digest for step in made.steps.values() if step.stage in ARRAYS}


def keys(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_results_are_the_same(both):
    local, remote = both
    assert outputs(local) == outputs(remote)
    for step in local.steps.values():
        if step.stage in ARRAYS:
            twin = remote.step(step.stage, None if step.experiment else step.dataset, step.network, step.experiment)
            ours, theirs = (dict(made.manifest(each).files) for made, each in ((local, step), (remote, twin)))
            if step.stage == "network":  # names the file of the module
                del ours["model.json"], theirs["model.json"]
            assert ours == theirs


def test_chunks_are_objects_and_nothing_else_is(both):
    local, remote = both
    here, there = keys(local.results), keys(remote.results)
    chunks = {key for key in here if "/c/" in key}
    assert chunks and not any("/c/" in key for key in there)
    stored = set(objects_of(remote.results / "scenes").sizes())
    assert {f"scenes/{key}" for key in stored if "/c/" in key} == {key for key in chunks if key.startswith("scenes/")}
    assert there - {objects.NAME} >= {key for key in here if key.endswith((".csv", ".ledger", "model.safetensors"))}
    assert size_of(remote.results / "scenes") == pytest.approx(size_of(local.results / "scenes"), rel=0.01)


def test_other_programs_open_the_bucket(both):
    from obstore.store import S3Store

    local, remote = both
    place = S3Store("bucket", prefix="some/where/scenes/images.zarr")
    there = xr.open_zarr(zarr.storage.ObjectStore(place, read_only=True))
    np.testing.assert_array_equal(there["image"].values, xr.open_zarr(local.results / "scenes/images.zarr")["image"])
    ours = pipeline.open_results(remote.results)["scenes"]["tiny"]["b"]
    np.testing.assert_array_equal(
        ours.activations["activation"].values,
        pipeline.open_results(local.results)["scenes"]["tiny"]["b"].activations["activation"].values,
    )


def test_no_secret_is_written(both):
    _, remote = both
    for path in remote.results.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in json.dumps([str(remote), str(objects_of(remote.results / "scenes"))])


def test_a_second_run_makes_nothing(both):
    _, remote = both
    ledgers = {path: path.read_bytes() for path in remote.results.rglob("*.ledger")}
    for path in list(remote.results.glob("scenes/**/done/extract.*.json")):
        path.unlink()
    again = run(remote.config.model_dump(), *ARRAYS)
    assert {path: path.read_bytes() for path in remote.results.rglob("*.ledger")} == ledgers
    assert outputs(again) == outputs(remote)


@pytest.mark.parametrize("harm", ["lost", "cut short", "changed"])
def test_a_damaged_object_is_found_named_and_made_again(both, harm):
    _, remote = both
    store, chunk = remote.results / "scenes" / "images.zarr", "image/c/1/0/0/0"
    place = objects_of(store)
    good = place.get(chunk)
    if harm == "lost":
        place.remove(chunk)
    else:
        place.put(chunk, good[:-5] if harm == "cut short" else good[:-5] + b"other")
    files = Manifest.read(remote.results / remote.step("ingest", "scenes").manifest).files
    with pytest.raises(DamagedStoreError, match=f"images.zarr: chunk {chunk}"):
        Reader(store, {name.removeprefix("images.zarr/"): value for name, value in files.items()})["image"][:]
    assert [one.file for one in damage.verify(remote.results)] == [store / chunk]
    before = outputs(remote)
    damage.repair(remote.results)
    made_before = len(lines(store.with_suffix(".ledger")))
    again = run(remote.config.model_dump(), *ARRAYS)
    assert place.get(chunk) == good and outputs(again) == before
    assert len(lines(store.with_suffix(".ledger"))) == made_before + 1
    assert damage.verify(remote.results) == []


def test_what_is_thrown_away_is_gone_from_the_bucket(server, tmp_path):
    raw = experiment(tmp_path, "s3://bucket/thrown") | {"calibrate": None, "similarity": None}
    raw["networks"]["tiny"]["ablate"] = None
    made = run(raw, "ingest", "concepts", "network", "extract", "dissect")
    layers = objects_of(made.results / "scenes" / "layers")
    first = set(layers.sizes())
    raw["networks"]["tiny"]["seed"] = 5
    run(raw, "ingest", "concepts", "network", "extract", "dissect")
    old = unreferenced.folders(made.results)
    assert old and set(layers.sizes()) > first
    for folder in old:
        unreferenced.remove(folder)
    assert not first & set(layers.sizes())
    assert damage.verify(made.results) == []
    # What the network gave before is kept, whole and verified.
    (kept,) = (made.results / "scenes/tiny/before").glob("*/done/*.json")
    assert any("/c/" in name for name in Manifest.read(kept).files)
    logits = objects_of(made.results / "scenes/tiny/logits.zarr")
    assert any("/c/" in name for name in logits.sizes())
    discard(run_experiment.parse(raw), "extract")
    assert logits.sizes() == {} and objects_of(made.results / "scenes/images.zarr").sizes()


def test_images_keep_their_slots(server, tmp_path):
    names = [f"image{k}" for k in range(6)]
    labelled_images(tmp_path, names[1:])
    raw = segmentation(tmp_path) | {"stores": "s3://bucket/slots"}
    raw["datasets"]["photos"] = {"kind": "imagefolder", "root": str(tmp_path / "images"), "shard_images": 4}
    store = run(raw, "ingest").results / "photos" / "images.zarr"
    labelled_images(tmp_path, names[:1])
    run(raw, "ingest")
    ids = np.asarray(zarr.open_group(Located(store, read_only=True), mode="r", use_consolidated=False)["image_id"])
    assert str(ids[5]).endswith("image0.png") and not any("image0.png" in str(one) for one in ids[:5])
    assert [entry["shard"] for entry in lines(store.with_suffix(".ledger"))] == ["0", "1", "1"]


def test_stores_stay_where_they_are(both, tmp_path):
    local, remote = both
    with pytest.raises(MicrotomeError, match="keeps its stores in itself, and the configuration says s3://bucket/x"):
        planner.make(run_experiment.parse(local.config.model_dump() | {"stores": "s3://bucket/x"}))
    with pytest.raises(MicrotomeError, match="keeps its stores at s3://bucket/some/where, and the configuration"):
        planner.make(run_experiment.parse(remote.config.model_dump() | {"stores": None}))
    (tmp_path / objects.NAME).write_text("{")
    with pytest.raises(MicrotomeError, match="is damaged"):
        objects_of(tmp_path / "scenes" / "images.zarr")


@pytest.mark.parametrize("url", ["bucket/x", "s3://user:pass@bucket/x", "s3://bucket/x?key=pass", "gs://a", "s3://"])
def test_no_place(tmp_path, url):
    with pytest.raises(MicrotomeError, match="s3://bucket/prefix") as refused:
        run_experiment.parse(scenes(tmp_path) | {"stores": url})
    assert "pass" not in str(refused.value)


def test_a_bucket_that_is_not_there(server, tmp_path, monkeypatch):
    with pytest.raises(MicrotomeError, match=r"s3://no-such-bucket: .*404 Not Found"):
        settle(tmp_path, "s3://no-such-bucket")
    assert not (tmp_path / objects.NAME).exists()
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MicrotomeError, match="cannot be reached") as refused:
        settle(tmp_path, "s3://elsewhere/x")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("given", ["notaurl", "http://user:password@host:9000", "ftp://host", "http://host name"])
def test_an_endpoint_that_is_none_is_refused_and_not_repeated(tmp_path, monkeypatch, given):
    monkeypatch.setenv("AWS_ENDPOINT_URL", given)
    with pytest.raises(MicrotomeError, match=r"^AWS_ENDPOINT_URL: expected http://host:port") as refused:
        objects.bucket(f"s3://bucket/{len(given)}")
    assert given not in str(refused.value) and "password@" not in str(refused.value)


def test_without_obstore(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(MicrotomeError, match="extra"):
        objects.bucket("s3://bucket/never-asked-before")
