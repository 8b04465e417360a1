"""Generated data sets, the dissection of generators, and interventions in their units."""

import csv
import json

import numpy as np
import pytest
import torch
import xarray as xr
from experiments import job, lines, run
from generators import SIZE, closed_form, experiment, written

from kernels.images.colour_names import COLOURS, colour_names
from pipeline.data.scenes import KINDS
from pipeline.errors import MicrotomeError
from pipeline.networks.build import load
from pipeline.networks.generators import latent_of
from pipeline.networks.inspection import answer as answer_of
from pipeline.plan import inspected
from pipeline.run import experiment as run_experiment
from pipeline.run import planner
from pipeline.stages.intervene import stage
from pipeline.stages.registry import jobs
from pipeline.workers import client

pytestmark = pytest.mark.usefixtures("workers")
STAGES = ("ingest", "network", "concepts", "extract", "dissect", "intervene")
TREE = KINDS.index("tree")


@pytest.fixture(scope="module")
def made(workers, tmp_path_factory):
    """Run once, for the tests that read; those that change something take a copy."""
    return run(experiment(tmp_path_factory.mktemp("intervene")), *STAGES)


def opened(made, name):
    folder = made.results / "painted" / "painter" / "interventions" / "trees"
    return xr.open_zarr(folder / f"{name}.zarr")


def rows(made, name="interventions"):
    folder = made.results / "painted" / "painter" / "interventions" / "trees"
    with (folder / f"{name}.csv").open() as stream:
        return list(csv.DictReader(stream))


def painter(made):
    generator = made.config.generators["painter"]
    return generator, load(generator.spec)


def test_an_image_follows_from_its_seed_and_number_alone(made):
    generator, network = painter(made)
    stored = xr.open_zarr(made.results / "painted" / "images.zarr")
    for at in (0, 17, 35):
        name = str(stored.image_id.values[at])
        latent = latent_of(generator.latent, 0, name, SIZE)
        assert (stored.latent.values[at] == latent).all()
        with torch.no_grad():
            pixels = network(torch.from_numpy(latent)[None])[0].clamp(0, 1).mul(255).round().byte().numpy()
        assert (stored.image.values[at] == pixels).all()
    assert set(stored.label.values.tolist()) == {-1}


def test_the_planted_unit_is_the_first_by_both_ranks(made):
    units = {int(row["unit"]): row for row in rows(made, "interventions-units")}
    assert units[TREE]["place_iou"] == units[TREE]["place_effect"] == "1"
    labels = {int(row["unit"]): row for row in read_units(made)}
    assert labels[TREE]["concept"].startswith("tree")


def read_units(made):
    with (made.results / "painted" / "painter" / "units.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_removal_is_the_closed_form(made):
    _, network = painter(made)
    images, trials = xr.open_zarr(made.results / "painted" / "images.zarr"), opened(made, "trials")
    told = trials.attrs["trials"]
    place = next(at for at, one in enumerate(told) if one["what"] == "removed" and one["k"] == 1)
    assert told[place]["units"] == [TREE]
    assert told[place]["replace"] == "zero"
    slots = trials.slot.values[: trials.sizes["shown"]]
    inputs = torch.from_numpy(images.latent.values[slots].copy())
    with torch.no_grad():
        wanted = closed_form(inputs, network, [TREE]).clamp(0, 1).mul(255).round().numpy()
    assert np.abs(trials.picture.values[:, place].astype(int) - wanted).max() <= 1
    # It is also what the generator paints of the composition without trees.
    without = next(at for at, one in enumerate(told) if one["what"] == "without")
    assert np.abs(trials.picture.values[:, place].astype(int) - trials.picture.values[:, without]).max() <= 1


def test_ways_of_known_units(made):
    found = {(row["what"], row["rank"], row["replace"], row["k"]): row for row in rows(made)}
    assert float(found["removed", "iou", "zero", "1"]["way"]) > 0.98
    assert float(found["patched", "iou", "", "1"]["way"]) > 0.98
    assert float(found["without", "", "", ""]["way"]) == 1
    assert float(found["nothing", "", "", ""]["way"]) == 0
    assert abs(float(found["random", "", "zero", "1"]["way"])) < 0.2


def test_sums_against_plain_computation(made):
    """Every sum of one image once more, pixel by pixel in float64."""
    images, trials = xr.open_zarr(made.results / "painted" / "images.zarr"), opened(made, "trials")
    concepts = xr.open_zarr(made.results / "painted" / "concepts.zarr")
    place = concepts.category.values.tolist().index("truth/object")
    numbers = {(each["category"], each["name"]): int(number) for number, each in concepts.attrs["concepts"].items()}
    slot = int(trials.slot.values[0])
    region = concepts.label_map.values[slot, place] == numbers["truth/object", "tree"]
    before = trials.picture.values[0, 0].astype(np.float64) / 255
    for number in (1, 2, len(trials.attrs["trials"]) - 1):
        after = trials.picture.values[0, number].astype(np.float64) / 255
        inside = sum(abs(before[:, y, x] - after[:, y, x]).mean() for y, x in np.argwhere(region))
        near = np.array(
            [
                [any(abs(y - v) + abs(x - u) <= 2 for v, u in np.argwhere(region)) for x in range(SIZE)]
                for y in range(SIZE)
            ]
        )
        outside = np.abs(before - after).mean(0)[~near].sum()
        found = trials["sum"].values[0, number]
        assert found[:2] == pytest.approx([inside, outside], rel=1e-12)
    assert trials["size"].values[0, :2].tolist() == [region.sum(), (~near).sum()]
    assert (images.image.values[slot] == trials.picture.values[0, 0]).all()


def test_areas_are_counted_again_on_every_picture(made):
    trials = opened(made, "trials")
    assert [name for _, name in trials.attrs["concepts"]] == list(COLOURS)
    for number in (0, 3):
        named = colour_names(np.moveaxis(trials.picture.values[0, number], 0, -1)[None])[0]
        assert trials.area.values[0, number].tolist() == [int((named == at).sum()) for at in range(len(COLOURS))]


def test_the_same_bytes_with_two_workers_and_after_a_cut(made, two_workers, tmp_path, monkeypatch):
    monkeypatch.setenv(client.ADDRESS, two_workers)
    raw = experiment(tmp_path)
    raw["generators"] = json.loads(json.dumps(made.config.model_dump(mode="json")["generators"]))
    again = run(raw, *STAGES)
    folder = "painted/painter/interventions/trees"
    files = job(made, "intervene", "painted", "painter", "trees").read().files
    assert job(again, "intervene", "painted", "painter", "trees").read().files == files
    ledger = again.results / folder / "trials.ledger"
    kept = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(kept[:-1]))
    manifest = job(again, "intervene", "painted", "painter", "trees").manifest
    manifest.unlink()
    run(raw, *STAGES)
    assert len(lines(ledger)) == len(kept) > 0
    assert job(again, "intervene", "painted", "painter", "trees").read().files == files


def test_a_generator_of_latents_without_compositions(workers, tmp_path):
    """A DCGAN in small: areas of colours are what is known, there is no picture without the concept."""
    raw = experiment(tmp_path)
    raw["generators"] = {"plain": written(tmp_path, "plain")}
    raw["datasets"]["painted"] |= {"generator": "plain", "size": [16, 16], "concepts": ["pixels"]}
    raw["networks"]["tiny"] |= {"layers": ["b"]}
    begun = run({**raw, "intervene": {}}, "ingest", "network", "concepts")
    concepts = xr.open_zarr(begun.results / "painted" / "concepts.zarr")
    most = concepts.attrs["concepts"][str(np.bincount(concepts.label_map.values.reshape(-1)).argmax())]
    seen = {"generator": "plain", "layer": "first", "concept": f"pixels/colour: {most['name']}", "units": [2]}
    raw["intervene"] = {"greys": seen | {"pictures": 0}}
    found = run(raw, *STAGES)
    folder = found.results / "painted" / "plain" / "interventions" / "greys"
    with (folder / "interventions.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [row["what"] for row in table] == ["nothing", "removed", "removed", "random"]
    assert all(row["way"] == "" and float(row["inside"]) >= 0 for row in table)
    assert (found.results / "painted" / "tiny" / "units.csv").exists(), "networks are dissected on such images"


def refused(folder, **changes):
    raw = experiment(folder)
    raw["intervene"]["trees"] |= changes
    return raw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"concept": "truth/object: trea"}, "intervene.trees.concept: no concept 'trea' in 'truth/object'"),
        ({"concept": "voc/object: tree"}, "intervene.trees.concept: no category 'voc/object'"),
        ({"concept": "tree"}, "is not of the form"),
        ({"generator": "paint"}, "intervene.trees.generator: no generator 'paint'"),
        ({"datasets": ["other"]}, "intervene.trees.datasets: 'other' holds no images of generator 'painter'"),
    ],
)
def test_what_the_plan_refuses(tmp_path, changes, message):
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(refused(tmp_path, **changes)))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"units": [1, 23]}, "intervene.trees.units: 23 units of layer 'kinds', which has 22"),
        ({"layer": "kind"}, "intervene.trees.layer: 'kind' is not among the layers of generator 'painter'"),
    ],
)
def test_what_the_inspection_refuses(made, tmp_path, changes, message):
    plan = planner.make(run_experiment.parse(refused(tmp_path, **changes)))
    inspected.ask([inspected.question(each) for each in inspected.pairs(jobs(plan)) if each.network == "painter"])
    assert message in " ".join(stage.check(job(plan, "intervene", "painted", "painter", "trees")))


@pytest.mark.parametrize(
    ("function", "latent", "size", "message"),
    [
        ("noisy", None, SIZE, "draws random numbers"),
        ("painter", None, 60, "the data set's have 60 x 60"),
        ("plain", {"kind": "normal", "shape": [6, 1, 1]}, 16, "it cannot take latents of shape [6, 1, 1]"),
    ],
)
def test_generators_that_are_refused(tmp_path, function, latent, size, message):
    section = written(tmp_path, function) | ({"latent": latent} if latent else {})
    (answer,) = answer_of([{"generator": section, "size": [size, size]}])
    assert message in answer["error"]


def test_compositions_of_another_shape_are_refused(tmp_path):
    raw = experiment(tmp_path)
    raw["generators"]["painter"]["latent"]["shape"] = [179, 6, 6]
    with pytest.raises(MicrotomeError, match=r"generators\.painter\.latent\.shape"):
        planner.make(run_experiment.parse(raw))


def test_sections_that_need_classes_refuse_generated_images(tmp_path):
    with pytest.raises(MicrotomeError, match="have no classes"):
        planner.make(run_experiment.parse(experiment(tmp_path) | {"calibrate": {}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": [50, 50]}, "size: compositions lie on a grid of 12 x 12, which does not divide 50"),
        ({"images": {"test": 4}, "dissect": {"split": "test"}}, "images: scenes have the splits train and validation"),
        ({"size": [48, 60]}, "datasets.painted.size: scenes are square"),
        ({"generator": "other"}, "datasets.painted.generator: no generator 'other'"),
    ],
)
def test_data_sets_that_are_refused(tmp_path, changes, message):
    raw = experiment(tmp_path)
    raw["datasets"]["painted"] |= changes
    with pytest.raises(MicrotomeError) as error:
        planner.make(run_experiment.parse(raw))
    assert message in str(error.value)
