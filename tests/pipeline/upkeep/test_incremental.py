"""Only what a change touches is made again, counted on the demo's two networks; and it equals a run from scratch."""

import hashlib
from pathlib import Path
from unittest import mock

import pytest
from changes import (
    CHANGES,
    CNN_LAYERS,
    IMAGES,
    SHARDS,
    VIT_LAYERS,
    Change,
    Work,
    apply,
    changed,
    experiment,
    photographs,
    randomized,
    retrain_elsewhere,
    run,
    with_training,
)

from pipeline.report.page import Page

pytestmark = pytest.mark.usefixtures("workers", "one_page")
NETWORKS = ("cnn", "cnn-untrained", "vit", "vit-untrained")
ALL = {"cnn": CNN_LAYERS, "cnn-untrained": CNN_LAYERS, "vit": VIT_LAYERS, "vit-untrained": VIT_LAYERS}


@pytest.fixture(scope="module")
def one_page():
    """Reports hold one empty page: whether one is made is counted here, not what is drawn."""

    def build(experiment, wanted):
        experiment.out.mkdir(parents=True, exist_ok=True)
        (experiment.out / "index.html").write_text("")
        return [Page("index.html", "", "", {}, "")]

    with mock.patch("pipeline.stages.report.site.build", build):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory, workers, one_page):
    """A finished run."""
    folder = tmp_path_factory.mktemp("base")
    work = run(experiment(folder))
    assert work.decoded == work.labelled // 4 == SHARDS
    assert work.forwards == dict.fromkeys(NETWORKS, SHARDS)
    assert work.written == work.counted == ALL
    return folder


def expected(name: str, work: Work) -> dict:
    """What a change may cost. Networks that are not named make nothing."""
    nothing: dict = {"forwards": {}, "written": {}, "counted": {}, "decoded": 0, "labelled": 0, "minibatches": {}}
    cnn_tail = ["features.conv6"]
    return nothing | {
        "nothing": {},
        "checkpoints touched, one copied to another name": {},
        "checkpoint of the CNN replaced: other weights, same size, older time": {
            "forwards": {"cnn": SHARDS}, "written": {"cnn": CNN_LAYERS}, "counted": {"cnn": CNN_LAYERS},
        },
        "head of the CNN trained again": {"forwards": {"cnn": SHARDS}},
        "CNN fine-tuned from its fifth convolution on": {
            "forwards": {"cnn": SHARDS}, "written": {"cnn": cnn_tail}, "counted": {"cnn": cnn_tail},
        },
        "ViT fine-tuned from its second block on": {
            "forwards": {"vit": SHARDS}, "written": {"vit": VIT_LAYERS[1:]}, "counted": {"vit": VIT_LAYERS[1:]},
        },
        # Its control has one more layer too.
        "one more layer of the CNN": {
            "forwards": {"cnn": SHARDS, "cnn-untrained": SHARDS},
            "written": {"cnn": ["features.conv3"], "cnn-untrained": ["features.conv3"]},
            "counted": {"cnn": ["features.conv3"], "cnn-untrained": ["features.conv3"]},
        },
        # Its untrained control is that of the CNN, another name for the same layers.
        "one more network": {
            "forwards": {"more": SHARDS, "more-untrained": SHARDS},
            "written": {"more": CNN_LAYERS}, "counted": {"more": CNN_LAYERS},
        },
        "one more source of concepts (colours of the pixels)": {"labelled": SHARDS, "counted": ALL},
        "another quantile": {"counted": ALL},
        "version of the dissection raised": {"counted": ALL},
        "version of the extraction raised": {
            "forwards": dict.fromkeys(NETWORKS, SHARDS), "written": ALL, "counted": ALL,
        },
        "ablation of the CNN switched on": {},
        "calibration switched on": {},
        "probes of the CNN switched on": {},
        "similarity of the two switched on": {"minibatches": {"cnn": 2, "vit": 2}},
        "sight of the two switched on": {"minibatches": {"cnn": 2, "vit": 2}},
        "checkpoint of the CNN replaced, where the two are compared": {
            "forwards": {"cnn": SHARDS}, "written": {"cnn": CNN_LAYERS}, "counted": {"cnn": CNN_LAYERS},
            "minibatches": {"cnn": 2},
        },
        "attribution of the two switched on, by two methods": {},
        "one more method of attribution": {},
        "relevance of the units of a layer by LRP": {},
        "Kernel SHAP beside LIME, of the same segments": {},
        "head of the CNN trained again, where its images are explained": {"forwards": {"cnn": SHARDS}},
        "one more method of attribution, where the CNN's are audited": {},
        "pictures of units of the CNN switched on": {},
        "head of the CNN trained again, where its units are drawn": {"forwards": {"cnn": SHARDS}},
        "pictures by MACO beside those of pixels": {},
        "other rules of projection, where units are drawn": {},
        "attacks on the CNN switched on": {},
        "one more bound of attacks on the CNN": {},
        "text or code of the report": {},
    }[name]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.name)
def test_what_a_change_costs(tmp_path, base, change: Change):
    work = apply(change, base, tmp_path / "run")
    found = {
        "forwards": {name: count for name, count in work.forwards.items() if count},
        "written": {name: layers for name, layers in work.written.items() if layers},
        "counted": {name: layers for name, layers in work.counted.items() if layers},
        "decoded": work.decoded,
        "labelled": work.labelled,
        "minibatches": work.minibatches,
    }
    assert found == expected(change.name, work)
    match change.name:
        case "nothing" | "checkpoints touched, one copied to another name":
            assert work.steps == []
        case "ablation of the CNN switched on":
            assert work.steps == ["ablate scenes cnn", "report"]
            assert work.shard_writes == work.ablated == 2 * SHARDS, "without units, and without sets of them"
        case "calibration switched on":
            assert work.steps == ["calibrate scenes cnn", "calibrate scenes vit", "report"]
            assert work.shard_writes == 2 * 2, "a split of each network"
        case "probes of the CNN switched on":
            assert work.steps == ["probes scenes cnn", "report"]
            assert work.shard_writes == 3 * SHARDS + 3 * 3, "features of three layers, three kinds of probes of each"
        case "similarity of the two switched on":
            assert work.steps == ["grams scenes cnn", "grams scenes vit", "similarity scenes both", "report"]
        case "sight of the two switched on":
            assert work.steps == ["sight scenes cnn", "sight scenes vit", "report"]
        case "attribution of the two switched on, by two methods":
            both = [f"{network} {method}" for network in ("cnn", "vit") for method in ("gradient_x_input", "saliency")]
            assert dict(sorted(work.explained.items())) == dict.fromkeys(both, SHARDS)
        case "one more method of attribution":
            assert work.explained == {"cnn grad_cam": SHARDS, "vit grad_cam": SHARDS}
        case "relevance of the units of a layer by LRP":
            assert work.explained == {"cnn lrp-relevance": SHARDS}
        case "Kernel SHAP beside LIME, of the same segments":
            assert work.explained == {"cnn kernel_shap": SHARDS, "vit kernel_shap": SHARDS}
        case "head of the CNN trained again, where its images are explained":
            assert work.explained == {"cnn gradient_x_input": SHARDS, "cnn saliency": SHARDS}
        case "one more method of attribution, where the CNN's are audited":
            assert work.explained == {"cnn grad_cam": SHARDS, "vit grad_cam": SHARDS}
            assert set(work.audited) == {"axioms grad_cam", "functions grad_cam"}
        case "pictures of units of the CNN switched on":
            assert work.drawn == {"cnn maximised-pixels": 2, "cnn projections": 1}
        case "head of the CNN trained again, where its units are drawn":
            assert work.drawn == {} and "visualize scenes cnn mine" in work.steps
        case "pictures by MACO beside those of pixels":
            assert work.drawn == {"cnn maximised-maco": 2}
        case "other rules of projection, where units are drawn":
            assert work.drawn == {"cnn projections": 1}
        case "attacks on the CNN switched on":
            assert work.attacked == {"cnn pgd-linf-4": SHARDS}
        case "one more bound of attacks on the CNN":
            assert work.attacked == {"cnn pgd-linf-8": SHARDS}
        case "text or code of the report":
            assert work.steps == ["report"]
        case "one more source of concepts (colours of the pixels)":
            assert work.categories == {"pixels/colour"}, "the others are taken over"
        case "head of the CNN trained again":
            assert work.stages("vit") == work.stages("cnn-untrained") == []


def test_a_network_of_another_machine(tmp_path):
    """The same recipe gave other weights there: everything that read the old ones, and no training."""
    raw = with_training(experiment(tmp_path))
    run(raw)
    # Other validation images ask for another accuracy, not for another training.
    grown = changed(raw, "datasets", "scenes", "images", to={"train": 32, "validation": 44})
    work = run(grown)
    assert work.decoded == 1 and set(work.forwards.values()) == {1}
    assert work.ablated == 2, "the shard that has new images, without units and without sets of them"
    assert len(list((tmp_path / "results/networks/cnn").glob("training-*"))) == 1

    retrain_elsewhere(tmp_path, grown)
    elsewhere = (tmp_path / "results/networks/cnn/model.safetensors").read_bytes()
    work = run(grown)
    assert {name for name, layers in work.written.items() if layers} == {"cnn"}
    assert work.written["cnn"] == work.counted["cnn"] == CNN_LAYERS
    assert sorted(work.steps) == ["ablate scenes cnn", "dissect scenes cnn", "extract scenes cnn", "report"]
    assert work.ablated == 2 + 2 * SHARDS, "units of both splits, sets of the one that judges"

    run(raw)
    assert len(list((tmp_path / "results/networks/cnn").glob("training-*"))) == 1
    back = (tmp_path / "results/networks/cnn/model.safetensors").read_bytes()
    assert back != elsewhere, "what was trained here is back"


def test_a_line_of_a_randomization_trains_its_run(tmp_path):
    raw = experiment(tmp_path)
    assert run(randomized(raw)).trained == 2
    work = run(randomized(raw, 0.6))
    assert work.trained == 1 and work.steps == ["randomize scenes noise", "report"]
    assert not any(work.forwards.values()) and work.shard_writes == 0


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_come_go_or_change(tmp_path, name):
    touched = {"one image changed": 1, "one image deleted": 1, "three images added": 2, "all images touched": 0}[name]
    (tmp_path / "grown").mkdir()
    (tmp_path / "fresh").mkdir()
    raw = photographs(tmp_path / "grown")
    run(raw)
    IMAGES[name](tmp_path / "grown")
    work = run(raw)
    assert work.forwards == {"tiny": touched}
    assert work.decoded == (touched or 3)
    assert work.counted["tiny"] == (["a", "b"] if touched else [])


def test_grown_equals_made_at_once(tmp_path):
    """Images added in three steps, to one results folder, give the bytes that a fresh one has."""
    source = tmp_path / "source"
    source.mkdir()
    raw = experiment_of_photographs(source, 4)
    for count in (4, 7, 10):
        raw = experiment_of_photographs(source, count)
        run(raw)
    fresh = changed(raw, "results", to=str(tmp_path / "fresh"))
    run(fresh)
    grown, once = table_of(source / "results"), table_of(tmp_path / "fresh")
    assert grown == once


def experiment_of_photographs(folder: Path, count: int) -> dict:
    from experiments import labelled_images, segmentation

    labelled_images(folder, [f"town/{i}" for i in range(count)])
    return segmentation(folder)


def table_of(results: Path) -> str:
    """units.csv: slots depend on when images came, and no number does."""
    return hashlib.sha256((results / "photos/tiny/units.csv").read_bytes()).hexdigest()
