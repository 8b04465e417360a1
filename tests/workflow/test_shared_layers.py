"""Two data sets, two networks with one backbone and a third that fails, two jobs at a time; and names of every kind."""

import csv
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray
from PIL import Image
from workflow_run import TINY, jobs_run, ledger_shards, snakemake, states

SIZE = 24
CLASSES = ["plain", "it's; touch pwned", "$(touch pwned)", "<script>pwned()", 'é\n"雪" & {wildcard}']
CONCEPT = "<img src=x onerror=pwned()> `touch pwned` $(touch pwned) 'quoted' \"雪\" {network}"
BLACK = "black $(touch pwned)\n.png"


@pytest.fixture
def experiment(tmp_path):
    random = np.random.default_rng(0)
    for at, name in enumerate(CLASSES):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for image in (f"{at}.png", f"<b>{at} $(touch pwned) `touch pwned`.png"):
            Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(folder / image)
    Image.new("RGB", (SIZE, SIZE)).save(tmp_path / "photos/plain" / BLACK)

    for folder in ("one/only", "maps/only"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(random.integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(tmp_path / "one/only/it's <i>one.png")
    label_map = np.zeros((SIZE, SIZE), np.uint8)
    label_map[:, : SIZE // 2] = 1
    Image.fromarray(label_map).save(tmp_path / "maps/only/it's <i>one.png")
    (tmp_path / "classes.txt").write_text(f"0 nothing\n1 {CONCEPT}\n")

    tiny = {
        "module": f"{TINY}:tiny",
        "weights": "random",
        "layers": ["0.1", "0.3"],
        "numerics": {"micro_batch": 4},
        "preprocessing": {"mean": [0, 0, 0], "std": [1, 1, 1]},
    }
    return {
        "name": "shared",
        "results": "results",
        "datasets": {
            "photos": {"kind": "imagefolder", "root": "photos", "shard_images": 4, "dissect": {"min_iou": 0}},
            "single": {
                "kind": "segmentation",
                "root": "one",
                "label_maps": {"side": {"folder": "maps", "classes": "classes.txt", "void": [0]}},
                "dissect": {"min_iou": 0},
            },
        },
        "networks": {
            "three": tiny,
            "five": tiny | {"arguments": {"classes": 5}},
            "failing": tiny | {"module": f"{TINY}:brightest_is_one", "layers": ["0"], "datasets": ["photos"]},
        },
        "cluster": {"workers": 2},
        "report": {"cards": 4, "top_images": 3},
    }


def test_two_data_sets_and_networks_that_share_a_backbone(tmp_path, experiment):
    results = tmp_path / "results"
    said = snakemake(tmp_path, experiment, "dissect", "-j", "2", "--keep-going", code=1)
    black = f"plain/{BLACK}"
    assert (
        f"error: extract photos failing: network 'failing', layer '0': unit 0: its output for image {black!r} of "
        "data set 'photos' is not finite"
    ) in said
    assert jobs_run(said) == {
        "make_ingest": 2,
        "make_concepts": 2,
        "make_network": 3,
        "make_extract": 4,
        "make_dissect": 4,
    }
    assert not list(results.glob("photos/failing/done/*")), "no manifest says that it finished"
    _check_shared(results)
    _check_names(results)
    before = states(results)

    # The report of the networks that work: nothing else is made again.
    said = snakemake(tmp_path, experiment, "-j", "2", "--config", "only=three,five")
    assert jobs_run(said) == {"make_report": 1}
    after = states(results)
    assert {name: after.get(name) for name in before} == before
    _check_page(results / "report/shared/index.html")
    assert not [path for path in tmp_path.rglob("*") if path.name == "pwned"], "a name was taken for a command"


def _check_shared(results: Path) -> None:
    """Both networks refer to the same two layers, and each shard of these was extracted once."""
    for data, shards in (("photos", ["0", "1", "2"]), ("single", ["0"])):
        three, five = (json.loads((results / data / name / "layers.json").read_text()) for name in ("three", "five"))
        assert three == five
        assert list(three) == ["0.1", "0.3"]
        for layer in three.values():
            ledger = (results / data / layer["activations"]).with_suffix(".ledger")
            assert sorted(ledger_shards(ledger)) == shards
        units = [(results / data / name / "units.csv").read_bytes() for name in ("three", "five")]
        assert units[0] == units[1]
        heads = [xarray.open_zarr(results / data / name / "logits.zarr").logits for name in ("three", "five")]
        assert [head.sizes["class"] for head in heads] == [3, 5]
        assert all(np.isfinite(head.values).all() for head in heads)


def _check_names(results: Path) -> None:
    """Names come through as they are on disk."""
    images = xarray.open_zarr(results / "photos/images.zarr")
    assert images.attrs["classes"] == sorted(CLASSES)
    names = images.image_id.values.tolist()
    assert f"plain/{BLACK}" in names
    assert len(names) == 2 * len(CLASSES) + 1
    classes = [images.attrs["classes"][label] for label in images.label.values]
    assert [name.partition("/")[0] for name in names] == classes
    assert bool(images.valid.all())

    iou = json.loads((results / "single/three/layers.json").read_text())["0.3"]["iou"]
    found = xarray.open_zarr(results / "single" / iou)
    assert found.concept.values.tolist() == [CONCEPT]
    assert found.category.values.tolist() == ["truth/side"]
    assert found.concept_area.values.tolist() == [SIZE * SIZE // 2]
    with (results / "single/three/units.csv").open(newline="", encoding="utf-8") as file:
        assert {row["concept"] for row in csv.DictReader(file)} <= {CONCEPT, ""}


def _check_page(path: Path) -> None:
    """A browser sees names as text: no element and no attribute comes from one."""
    page = Elements()
    page.feed(path.read_text(encoding="utf-8"))
    page.close()
    assert CONCEPT in page.text, "the concept's name is shown"
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    scripts = [text for tag, text in page.inside if tag == "script"]
    assert not [text for text in scripts if "pwned" in text]
    assert not [value for name, value in page.attributes if name in ("src", "href") and "://" in (value or "")]
    assert not {"b", "i"} & {tag for tag, _ in page.inside if "pwned" in _ or "one.png" in _}


class Elements(HTMLParser):
    """Text and attributes of a page, with the element each piece of text is in."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = [""]
        self.inside: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while len(self.stack) > 1 and self.stack.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.inside.append((self.stack[-1], data))

    @property
    def text(self) -> str:
        return "".join(data for _, data in self.inside)
