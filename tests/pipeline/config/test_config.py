"""The configuration: what is accepted, what is refused, and that the refusal says where and what is near."""

import copy
import json
from dataclasses import replace

import pytest
import yaml
from experiments import scenes

from pipeline.config.datasets import PRESETS, Dissect
from pipeline.config.messages import known_keys
from pipeline.errors import MicrotomeError
from pipeline.run import planner
from pipeline.run.experiment import Config, configuration, load, parse, refuse_repeated_keys, select
from pipeline.stages.registry import STAGES


def full(folder):
    """A configuration with every section written out."""
    raw = scenes(folder)
    raw["datasets"]["scenes"]["dissect"] = {"method": "standard"}
    raw["datasets"]["photos"] = {
        "kind": "segmentation",
        "root": "images",
        "label_maps": {"part": {"folder": "maps", "classes": "classes.txt"}},
        "split": {"all": "validation"},
        "resize": {"squash": [32, 48]},
    }
    raw["datasets"]["folder"] = {"kind": "imagefolder", "root": "images", "split": {"share": {"a": 0.5, "b": 0.5}}}
    raw["networks"]["tiny"] |= {"weights": "train", "train": {"dataset": "scenes", "recipe": {"steps": 3}}}
    raw["networks"]["tiny"] |= {"preprocessing": {"mean": [0, 0, 0]}}
    return raw | {"controls": {"images": 5}, "cluster": {"workers": 1}, "report": {"title": "T"}}


def at(raw, path):
    for key in path:
        raw = raw[key]
    return raw


SECTIONS = {
    (): "dataset",
    ("datasets", "scenes"): "shard_image",
    ("datasets", "scenes", "images"): "training",
    ("datasets", "scenes", "dissect"): "quantil",
    ("datasets", "photos"): "labelmaps",
    ("datasets", "photos", "label_maps", "part"): "class",
    ("datasets", "photos", "split"): "folder",
    ("datasets", "photos", "resize"): "sqash",
    ("datasets", "folder"): "max_bad_fractions",
    ("networks", "tiny"): "layer",
    ("networks", "tiny", "numerics"): "microbatch",
    ("networks", "tiny", "preprocessing"): "means",
    ("networks", "tiny", "train"): "recipes",
    ("networks", "tiny", "train", "recipe"): "learning_rat",
    ("controls",): "image",
    ("cluster",): "worker",
    ("report",): "top_image",
}
NEAREST = {
    "dataset": "datasets",
    "training": "train",
    "labelmaps": "label_maps",
    "class": "classes",
    "means": "mean",
    "sqash": "squash",
}


@pytest.mark.parametrize("path", SECTIONS, ids=".".join)
def test_an_unknown_key_is_refused_in_every_section_with_the_nearest(tmp_path, path):
    raw = full(tmp_path)
    parse(raw)
    wrong = SECTIONS[path]
    at(raw, path)[wrong] = 1
    with pytest.raises(MicrotomeError) as error:
        parse(raw)
    line = next(line for line in str(error.value).splitlines() if "unknown key" in line)
    assert ".".join(path) in line.replace(".segmentation.", ".").replace(".scenes.scenes", ".scenes") or path
    assert line.strip().split(":")[0].endswith(wrong)
    near = [NEAREST[wrong]] if wrong in NEAREST else [key for key in known_keys() if key.startswith(wrong[:4])]
    assert any(key in line.partition("nearest: ")[2] for key in near)


def test_every_error_is_said_at_once(tmp_path):
    raw = full(tmp_path)
    raw["datasets"]["scenes"]["size"] = 8
    raw["networks"]["tiny"]["numerics"] = {"micro_batch": 0}
    del raw["name"]
    with pytest.raises(MicrotomeError) as error:
        parse(raw)
    text = str(error.value)
    assert "name: missing" in text and "found 8" in text and "micro_batch" in text and len(text.splitlines()) == 4


@pytest.mark.parametrize("where", ["datasets", "networks", "name"])
@pytest.mark.parametrize("name", Config.reserved)
def test_reserved_names(tmp_path, where, name):
    raw = scenes(tmp_path)
    if where == "name":
        raw["name"] = name
    else:
        (raw[where][name],) = raw[where].values()
    with pytest.raises(MicrotomeError, match=f"'{name}' is reserved"):
        parse(raw)


def test_a_stage_reserves_the_name_of_its_folder(tmp_path):
    raw = scenes(tmp_path) | {"name": "pairs"}
    assert parse(raw).name == "pairs" and {"similarity", "randomization"} < set(Config.reserved)
    stages = [replace(stage, folder="pairs") if stage.folder else stage for stage in STAGES.values()]
    with pytest.raises(ValueError, match="'pairs' is reserved"):
        configuration(stages).model_validate(raw)


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "a b",
    "$(id)",
    "a;b",
    "-x",
    "a\n",
    "ä",
    "x" * 65,
    "<b>",
    "a\x00",
    "`id`",
    "{x}",
]


@pytest.mark.parametrize("where", ["datasets", "networks", "name"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names(tmp_path, where, name):
    raw = scenes(tmp_path)
    if where == "name":
        raw["name"] = name
    else:
        (raw[where][name],) = raw[where].values()
    with pytest.raises(MicrotomeError, match="refused"):
        parse(raw)


@pytest.mark.parametrize("name", ["images.zarr", "layers.json", "quarantine.csv", "concepts.ledger"])
def test_names_of_files_of_the_results_folder(tmp_path, name):
    raw = scenes(tmp_path)
    (raw["networks"][name],) = raw["networks"].values()
    with pytest.raises(MicrotomeError, match="ends like a file of the results folder"):
        parse(raw)


def test_the_name_of_the_control_is_taken(tmp_path):
    raw = scenes(tmp_path)
    raw["networks"]["tiny-untrained"] = raw["networks"]["tiny"]
    with pytest.raises(MicrotomeError, match="untrained control"):
        parse(raw)


def test_references_to_data_sets(tmp_path):
    raw = full(tmp_path)
    raw["networks"]["tiny"]["datasets"] = ["photo"]
    with pytest.raises(MicrotomeError, match="no data set 'photo'; nearest: photos"):
        parse(raw)
    raw = full(tmp_path)
    raw["networks"]["tiny"]["train"]["dataset"] = "scene"
    with pytest.raises(MicrotomeError, match="no data set 'scene'; nearest: scenes"):
        parse(raw)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("networks", "tiny", "weights"), "random", "go together"),
        (("networks", "tiny", "train"), None, "go together"),
        (("networks", "tiny", "torchvision"), "resnet18", "exactly one of `torchvision: name`, `timm"),
        (("networks", "tiny", "module"), "no function", "path.py:function"),
        (("datasets", "folder", "split"), {"share": {"a": 0.5, "b": 0.4}}, "add up to 0.9"),
        (("datasets", "folder", "split"), {"all": "a", "folders": True}, "exactly one"),
        (("datasets", "folder", "split"), {}, "exactly one"),
        (("datasets", "folder", "concepts"), ["truth"], "pixels"),
        (("datasets", "photos", "label_maps"), {}, "at least 1"),
        (("datasets", "photos", "kind"), "segments", "kind: 'segments' is not one of .*nearest: segmentation"),
        (("datasets", "scenes", "dissect", "quantile"), 1.0, "less than 1"),
        (("datasets",), {}, "at least 1"),
        (("networks",), {}, "networks: name at least one"),
        (("datasets",), "many", "section of keys"),
    ],
)
def test_wrong_values(tmp_path, path, value, message):
    raw = full(tmp_path)
    at(raw, path[:-1])[path[-1]] = value
    with pytest.raises(MicrotomeError, match=message):
        parse(raw)


def test_presets_and_what_overrides_them():
    assert Dissect().resolved().model_dump() == PRESETS["standard"] | {
        "method": "standard",
        "min_iou": 0.04,
        "split": "validation",
    }
    for method, preset in PRESETS.items():
        assert preset.items() <= Dissect(method=method).resolved().model_dump().items()
    own = Dissect(method="cvpr2017", quantile=0.02, border="zeros").resolved()
    assert own.quantile == 0.02 and own.border == "zeros"
    assert own.positions == "native" and own.union == "category"


def test_the_same_again_from_what_is_written_down(tmp_path):
    config = parse(full(tmp_path))
    assert parse(config.model_dump()) == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_only(tmp_path):
    raw = full(tmp_path)
    raw["networks"]["other"] = copy.deepcopy(raw["networks"]["tiny"]) | {"datasets": ["photos"]}
    both = parse(raw)
    assert list(select(both, "tiny").networks) == ["tiny"]
    assert select(both, "tiny").networks["tiny"].datasets == ["scenes", "photos", "folder"]
    assert select(both, "scenes").networks["tiny"].datasets == ["scenes"]
    assert select(both, "scenes").networks["other"].datasets == []
    assert select(both, "tiny, photos").networks["tiny"].datasets == ["photos"]
    assert parse(raw | {"only": "other"}).networks.keys() == {"other"}
    assert parse(raw | {"only": ["tiny", "other"]}).networks.keys() == {"tiny", "other"}
    for wrong, near in [("tinny", "tiny"), ("tiny,scene", "scenes"), (["foto"], "photos")]:
        with pytest.raises(MicrotomeError, match=f"no network or data set has this name; nearest: .*{near}"):
            parse(raw | {"only": wrong})


def test_files(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(full(tmp_path)))
    assert load(file) == parse(full(tmp_path))
    for text in ["", "- a\n", "a: [", "x: !!python/object/apply:os.system ['touch /nowhere']", "text"]:
        file.write_text(text)
        with pytest.raises(MicrotomeError, match=r"c\.yaml"):
            load(file)
    with pytest.raises(MicrotomeError, match="cannot read the configuration"):
        load(tmp_path / "absent.yaml")


def test_an_unknown_key_is_told_those_of_its_section():
    network = {"torchvision": "resnet18", "weights": "random", "ablate": {"nodes": [1]}}
    raw = {"name": "x", "datasets": {"d": {"kind": "scenes"}}, "networks": {"n": network}}
    with pytest.raises(MicrotomeError, match=r"ablate\.nodes: unknown key; there are: datasets, draws, images, judge"):
        parse(raw)
    network["ablate"] = {"layers": ["last"]}
    with pytest.raises(MicrotomeError, match=r"ablate\.layers: for the last layer write `layers: last`"):
        parse(raw)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = {"torchvision": "resnet18", "weights": "missing.pt"}
    raw = {"name": "x", "datasets": {"d": {"kind": "scenes"}}, "networks": {"n": network}}
    with pytest.raises(MicrotomeError, match=r"^network 'n': cannot read missing\.pt: No such file"):
        planner.make(parse(raw))
    raw["datasets"]["d"] = {"kind": "imagefolder", "root": "nowhere"}
    with pytest.raises(MicrotomeError, match=r"^data set 'd': cannot read the folder nowhere/: No such file"):
        planner.make(parse(raw))


def explained(**keys):
    return {"attribute": {"x": {"methods": {"saliency": {}}} | keys}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"calibrate": {"methods": ["isotonic", "isotonic"]}}, r"calibrate: methods: 'isotonic' is named twice"),
        ({"sight": {"measures": ["skips", "skips"]}}, r"sight: measures: 'skips' is named twice"),
        ({"sight": {"networks": ["tiny", "tiny"]}}, r"sight: networks: 'tiny' is named twice"),
        ({"probes": {"datasets": ["scenes", "scenes"]}}, r"probes: datasets: 'scenes' is named twice"),
        ({"calibrate": {"penalty": float("inf")}}, r"calibrate.penalty: Input should be a finite number \(found inf\)"),
        ({"probes": {"penalties": [float("nan")]}}, r"probes.penalties.0: Input should be a finite number"),
        ({"calibrate": {"splits": 10**12}}, r"calibrate.splits: Input should be less than or equal to 100000"),
        ({"probes": []}, r"probes: Input should be a section of keys \(found \[\]\)"),
        # A value of several kinds is told what its own kind lacks, once.
        (
            explained(targets="labels"),
            r"x\.targets: Input should be 'predicted' or 'label' or a section of keys \(f.*; near",
        ),
        (explained(targets={"clas": 1}), r"\n  attribute\.x\.targets\.clas: unknown key; nearest: class, contrast$"),
        (explained(targets={"top": 0}), r"\n  attribute\.x\.targets\.top: Input should be greater than 0 \(found 0\)$"),
        (
            explained(targets={"class": -1}),
            r"\n  attribute\.x\.targets\.class: Input should be greater than or equal to 0",
        ),
        (explained(targets={}), r"\n  attribute\.x\.targets: give one of `class`, `top`, `contrast`$"),
        (explained(baseline={"fil": "x"}), r"\n  attribute\.x\.baseline\.fil: unknown key; nearest: file$"),
        # The kind of a section is no part of where it stands, whatever the entry is called.
        (explained(methods={"lrp": {"alpha": 1, "beta": 1}}), r"\n  attribute\.x\.methods\.lrp: beta: alpha"),
        (
            explained(methods={"saliency": {"method": "integrated_gradients", "steps": 0}}),
            r"x\.methods: saliency: its method is",
        ),
        (
            explained(methods={"ig": {"method": "integrated_gradients", "steps": 0}}),
            r"\n  attribute\.x\.methods\.ig\.steps: Input should be greater than 0",
        ),
        (
            explained(methods={"lime": {"segments": {"kind": "labels", "categry": "x"}}}),
            r"lime\.segments\.category: missing\n  attribute\.x\.methods\.lime\.segments\.categry: unknown key",
        ),
    ],
)
def test_slips_in_sections_of_questions(tmp_path, section, message):
    with pytest.raises(MicrotomeError, match=message):
        parse(scenes(tmp_path) | section)


def test_what_is_not_default_can_be_written_and_read_again(tmp_path):
    raw = scenes(tmp_path)
    raw["networks"]["tiny"]["preprocessing"] = {"mean": [0.1, 0.2, 0.3]}
    made = parse(raw)
    said = json.loads(made.model_dump_json(exclude_defaults=True))
    assert said["networks"]["tiny"]["preprocessing"] == {"mean": [0.1, 0.2, 0.3]}
    assert parse(said) == made


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("name: a\nresults: r\nname: b\n", "name", "1 and 3"),
        ("networks:\n  cnn: {layers: [a]}\n  cnn: {layers: [b]}\n", "cnn", "2 and 3"),
        (
            "datasets:\n  scenes:\n    kind: scenes\n    dissect: {quantile: 0.1, quantile: 0.2}\n",
            "quantile",
            "4 and 4",
        ),
        ('{"name": "a",\n "name": "b"}', "name", "1 and 2"),
    ],
)
def test_a_key_that_is_given_twice(tmp_path, text, key, lines):
    """YAML's own reader, and Snakemake's, take the last one in silence."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read in (load, refuse_repeated_keys):
        with pytest.raises(MicrotomeError, match=f"{key!r} is given twice, in lines {lines}"):
            read(file)


def test_a_key_that_a_merge_brings_is_not_given_twice(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("a: &a {size: 1}\nb: {<<: *a, size: 2}\n")
    refuse_repeated_keys(file)


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ("", "give the folder"),
        (" ", "give the folder"),
        ("/", "holds more than results"),
        ("~", "holds more than results"),
        ("~/", "holds more than results"),
        ("a/{run}", "placeholder"),
    ],
)
def test_a_results_folder_of_its_own(tmp_path, results, message):
    with pytest.raises(MicrotomeError, match=rf"results.*{message}"):
        parse(scenes(tmp_path) | {"results": results})
