"""What a configuration says of its files: EXIF, bits, transparency, lists, paths; and what the plan tells of them."""

import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pipeline.config.base import at_home
from pipeline.config.datasets import AnyDataset
from pipeline.config.networks import Network, Preprocessing, Segmenter
from pipeline.data import kinds
from pipeline.data.decode import Geometry, Reading, Refused, decode
from pipeline.errors import MicrotomeError

ADAPTER = TypeAdapter(AnyDataset)
LIMIT = 1_000_000
ORIENTATION = 0x0112


def dataset(**keys) -> AnyDataset:
    return ADAPTER.validate_python(keys)


def labelled(folder: Path, orientation: int, shape: tuple[int, int], upright: bool = False, of_map: int = 1, **keys):
    """A picture whose upper left quarter as stored is red, and a label map of it, drawn on one of both forms."""
    stored = np.zeros(shape, np.uint8)
    stored[: shape[0] // 2, : shape[1] // 2] = 1
    red = np.where(stored[..., None] == 1, np.array([255, 0, 0], np.uint8), np.uint8(255))
    for name in ("images", "maps"):
        (folder / name).mkdir(exist_ok=True)
    exif, own = Image.Exif(), Image.Exif()
    exif[ORIENTATION], own[ORIENTATION] = orientation, of_map
    Image.fromarray(red).save(folder / "images/a.png", exif=exif)
    turns = {3: 2, 6: -1, 8: 1}
    drawn = np.rot90(stored, turns.get(orientation, 0)) if upright else stored
    Image.fromarray(np.ascontiguousarray(drawn)).save(folder / "maps/a.png", **({"exif": own} if of_map != 1 else {}))
    (folder / "classes.txt").write_text("0 rest\n1 red\n")
    maps = {"folder": str(folder / "maps"), "classes": str(folder / "classes.txt")}
    return dataset(kind="segmentation", root=str(folder / "images"), label_maps={"object": maps}, **keys)


def red_is_labelled(data: AnyDataset) -> bool:
    listed = kinds.listing(data, Path("unused"))
    size = kinds.image_size(data, listed)
    image = kinds.read_image(data, "a.png", size)
    (labels,) = kinds.read_label_maps(data, "a.png", {"object": listed.label_map(0, "object")}, size).values()
    return bool(((labels == 2) == (image[1] == 0)).all())


# EXIF


@pytest.mark.parametrize(("orientation", "shape"), [(3, (4, 6)), (6, (4, 6)), (8, (4, 6)), (3, (6, 6)), (6, (6, 6))])
def test_an_orientation_with_a_label_map_without_one_is_refused_until_told(tmp_path, orientation, shape):
    with pytest.raises(
        Refused, match=f"EXIF orientation {orientation}, its label map a.png has none: .*`exif: ignore`"
    ):
        red_is_labelled(labelled(tmp_path, orientation, shape))
    assert red_is_labelled(labelled(tmp_path, orientation, shape, exif="ignore"))
    assert red_is_labelled(labelled(tmp_path, orientation, shape, like="torchvision"))
    assert red_is_labelled(labelled(tmp_path, orientation, shape, upright=True, exif="turn"))


def test_label_maps_whose_form_is_known_need_no_key(tmp_path):
    assert red_is_labelled(labelled(tmp_path, 1, (4, 6)))
    assert red_is_labelled(labelled(tmp_path, 6, (4, 6), upright=True))  # it has the shape of the upright image alone
    assert red_is_labelled(labelled(tmp_path, 3, (4, 6), of_map=3))


def test_what_files_are_read_as_is_in_the_id_where_it_is_said(tmp_path):
    data = labelled(tmp_path, 1, (4, 6))
    plain = kinds.settings(data, kinds.listing(data, tmp_path))
    assert "reading" not in plain
    for keys, expected in (
        ({"exif": "turn"}, None),
        ({"exif": "ignore"}, {"upright": False}),
        ({"bits": 12}, {"bits": 12}),
        ({"like": "torchvision"}, {"upright": False, "composited": False}),
    ):
        said = labelled(tmp_path, 1, (4, 6), **keys)
        assert kinds.settings(said, kinds.listing(said, tmp_path)).get("reading") == expected
    with pytest.raises(ValidationError, match="`like: torchvision` ignores EXIF"):
        labelled(tmp_path, 1, (4, 6), like="torchvision", exif="turn")


# Depth and transparency


def test_grey_of_twelve_bits(tmp_path):
    values = np.array([[0, 2048, 4095]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.png", Geometry(), LIMIT)[0].tolist() == [[0, 8, 16]]
    assert decode(tmp_path / "a.png", Geometry(), LIMIT, Reading(bits=12))[0].tolist() == [[0, 128, 255]]
    with pytest.raises(Refused, match=r"the value 4,095 in an image of `bits: 11`, whose largest is 2,047"):
        decode(tmp_path / "a.png", Geometry(), LIMIT, Reading(bits=11))


@pytest.mark.parametrize(("largest", "hint"), [(4095, "bits: 12"), (1000, "bits: 10"), (200, "bits: 9"), (65535, "")])
def test_the_range_of_deep_grey_is_told(tmp_path, largest, hint):
    (tmp_path / "d").mkdir()
    Image.fromarray(np.array([[0, largest]], np.uint16)).save(tmp_path / "d/a.png")
    (notice,) = kinds.summary(dataset(kind="imagefolder", root=str(tmp_path / "d")), tmp_path, 1).notices
    assert f"the largest value is {largest:,}" in notice and hint in notice and bool(hint) == ("give" in notice)
    assert kinds.summary(dataset(kind="imagefolder", root=str(tmp_path / "d"), bits=12), tmp_path, 1).notices == []


def deep_colours(path, largest):
    """Write a PNG of 16-bit colours, which Pillow does not."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = b"\0" + struct.pack(">6H", 0, 0, 0, largest, largest, largest)
    parts = [(b"IHDR", struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in parts))


@pytest.mark.parametrize(("largest", "dark"), [(4095, True), (65535, False)])
def test_the_range_of_deep_colours_is_told(tmp_path, largest, dark):
    (tmp_path / "d").mkdir()
    deep_colours(tmp_path / "d/a.png", largest)
    (notice,) = kinds.summary(dataset(kind="imagefolder", root=str(tmp_path / "d")), tmp_path, 1).notices
    assert "16-bit colours: their upper bytes are taken, 0 to 65,535 becomes 0 to 255" in notice
    assert f"the largest is {largest >> 8} of 255" in notice and dark == ("spread them over all 16" in notice)
    assert decode(tmp_path / "d/a.png", Geometry(), LIMIT)[:, 0, 1].tolist() == [largest >> 8] * 3
    with pytest.raises(Refused, match="colours of 16 bits, whose upper bytes alone can be read"):
        decode(tmp_path / "d/a.png", Geometry(), LIMIT, Reading(bits=12))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_like_torchvision_equals_its_loader(tmp_path, mode):
    """`ImageFolder` opens with Pillow and converts to RGB."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 256, (5, 7, 4), dtype=np.uint8), "RGBA").convert(mode)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    pixels.save(tmp_path / "a.png", exif=exif, **({"transparency": 3} if mode == "P" else {}))
    with Image.open(tmp_path / "a.png") as image:
        expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    like = kinds.reading(dataset(kind="imagefolder", root="x", like="torchvision"))
    np.testing.assert_array_equal(decode(tmp_path / "a.png", Geometry(), LIMIT, like), expected)
    assert decode(tmp_path / "a.png", Geometry(), LIMIT).shape != expected.shape


# What the plan tells


def test_the_plan_names_classes_splits_and_concepts(tmp_path):
    (tmp_path / "d").mkdir()
    rows = "".join(f"{i}.png,{i % 4},{('train', 'test')[i % 2]},{i}\n" for i in range(8))
    (tmp_path / "t.csv").write_text("path,label,split,patient\n" + rows)
    for i in range(8):
        Image.new("L", (4, 4)).save(tmp_path / f"d/{i}.png")
    data = dataset(kind="csv", root=str(tmp_path / "d"), table=str(tmp_path / "t.csv"))
    made = kinds.summary(data, tmp_path / "scratch", 1)
    assert list(kinds.described("x", data, made)) == [
        "x: 4 classes (0 → 0, 1 → 1, 2 → 2, ...); images: test 4, train 4"
    ]
    assert made.notices == ["t.csv: not used: patient"]
    data = labelled(tmp_path, 1, (4, 6))
    made = kinds.summary(data, tmp_path / "scratch", 1)
    assert list(kinds.described("y", data, made)) == [
        "y: no labels; images: validation 1",
        "y, label maps object: 2 concepts (0 → rest, 1 → red)",
    ]


# Paths and numbers of the configuration


def test_a_leading_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    folder = dataset(kind="imagefolder", root="~/x", labels="~/l.csv", split={"csv": "~/s.csv"})
    assert (folder.root, folder.labels, folder.split.csv) == ("/somewhere/x", "/somewhere/l.csv", "/somewhere/s.csv")
    assert dataset(kind="npz", file={"train": "~/a.npz"}).file == {"train": "/somewhere/a.npz"}
    assert dataset(kind="csv", root="~", table="~/t.csv").root == "/somewhere"
    network = Network(module="~/n.py:build", weights="~/w.pt")
    assert (network.module, network.weights) == ("/somewhere/n.py:build", "/somewhere/w.pt")
    head = {"classes": "~/c.txt"}
    segmenter = Segmenter(torchvision="x", weights="~/w.pt", categories={"object": head})
    assert segmenter.categories["object"].classes == "/somewhere/c.txt"
    for other in ("a/~/b", "~other/x", "x~", "."):
        assert at_home(other) == other


@pytest.mark.parametrize(
    "keys",
    [
        {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)},
        {"mean": (0.485, 0.456, 0.406), "std": (58.395, 57.12, 57.375)},
        {"mean": (127.5,), "std": (0.5,)},
        {"mean": (0.0,), "std": (255.0,)},
    ],
)
def test_a_mean_or_std_above_one_is_refused_with_the_formula(keys):
    with pytest.raises(
        ValidationError, match=r"pixels lie between 0 and 1 when \(x - mean\) / std .* give number / 255"
    ):
        Preprocessing(**keys)
    assert Preprocessing(mean=(0.0,), std=(1 / 255,)) and Preprocessing(mean=(0.0,), std=(1.0,))


@pytest.mark.parametrize("names", [("val", "Val"), ("valid", "validation"), ("train", "Train")])
def test_two_names_of_one_split_in_an_npz_are_refused(tmp_path, names):
    x = np.zeros((2, 4, 4), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(2), split=np.array(names))
    with pytest.raises(MicrotomeError, match="may be one split"):
        kinds.listing(dataset(kind="npz", file=str(tmp_path / "a.npz")), tmp_path)
    with pytest.raises(MicrotomeError, match="may be one split"):
        kinds.listing(dataset(kind="npz", file=dict.fromkeys(names, str(tmp_path / "a.npz"))), tmp_path)


@pytest.mark.parametrize("twice", ["cat", "é"])
def test_two_classes_of_one_name_in_an_npz_are_refused(tmp_path, twice):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 4), np.uint8), y=np.arange(2))
    names = [twice, unicodedata.normalize("NFD", twice)]
    with pytest.raises(MicrotomeError, match=r"two classes of .*a.npz have the name"):
        kinds.listing(dataset(kind="npz", file=str(tmp_path / "a.npz"), classes=names), tmp_path)


# The layouts of VOC and Cityscapes, by keys


def test_lists_and_suffixes_are_keys(tmp_path):
    for name in (
        "leftImg8bit/a_leftImg8bit",
        "leftImg8bit/b_leftImg8bit",
        "gt/a_labelIds",
        "gt/a_color",
        "gt/b_labelIds",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "classes.txt").write_text("0 road\n")
    (tmp_path / "val.txt").write_text("b\n")
    keys = {
        "kind": "segmentation",
        "root": str(tmp_path / "leftImg8bit"),
        "image_suffix": "_leftImg8bit.png",
        "label_maps": {
            "object": {
                "folder": str(tmp_path / "gt"),
                "classes": str(tmp_path / "classes.txt"),
                "label_suffix": "_labelIds",
            }
        },
        "list": {"validation": str(tmp_path / "val.txt")},
    }
    listed = kinds.listing(dataset(**keys), tmp_path)
    assert listed.image_id.tolist() == ["b_leftImg8bit.png"]
    assert listed.label_map(0, "object") == tmp_path / "gt/b_labelIds.png"
    with pytest.raises(ValidationError, match="`list` with one file per split and `split` both say the splits"):
        dataset(**keys, split={"all": "validation"})
