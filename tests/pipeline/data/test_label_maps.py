"""Label maps: indices as they are stored in every depth, class lists in every form, and what is refused."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.decode import Geometry, Refused, size_of
from pipeline.data.label_maps import ClassList, decode_label_map, read_class_list, read_label_map
from pipeline.errors import MicrotomeError

LIMIT = 1_000_000
AS_IS = Geometry()
SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))
rng = np.random.default_rng(0)


def png(indices: np.ndarray, bits: int, kind: int) -> bytes:
    """A PNG written by hand: `bits` a pixel, kind 0 (grey) or 3 (palette of unrelated colours)."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = indices.shape
    rows = b""
    for row in indices:
        if bits == 16:
            rows += b"\0" + row.astype(">u2").tobytes()
        else:
            spread = (row[:, None] >> np.arange(bits)[::-1]) & 1
            rows += b"\0" + np.packbits(spread.astype(np.uint8)).tobytes()
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    palette = (
        chunk(b"PLTE", rng.integers(0, 256, 3 * 2 ** min(bits, 8), dtype=np.uint8).tobytes()) if kind == 3 else b""
    )
    parts = chunk(b"IHDR", header), palette, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("bits", "kind"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (1, 3), (2, 3), (4, 3), (8, 3)])
def test_indices_are_read_as_they_are_stored(tmp_path, bits, kind):
    indices = rng.integers(0, 2**bits, (7, 13))
    indices[0, :2] = 0, 2**bits - 1
    (tmp_path / "a.png").write_bytes(png(indices, bits, kind))
    read = read_label_map(tmp_path / "a.png", LIMIT)
    assert read.dtype == np.uint16
    np.testing.assert_array_equal(read, indices)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_label_maps_are_turned_upright(tmp_path, dtype):
    indices = np.arange(35).reshape(5, 7).astype(dtype)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(indices).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(read_label_map(tmp_path / "a.png", LIMIT), np.rot90(indices, -1))


def reason(path: Path) -> str:
    with pytest.raises(Refused) as error:
        read_label_map(path, LIMIT)
    return error.value.reason


def test_what_is_no_label_map_is_refused(tmp_path):
    path = tmp_path / "a.png"
    for mode in ("RGB", "RGBA", "LA"):
        Image.new(mode, (4, 4)).save(path)
        assert reason(path) == f"colours ({mode}); expected one index per pixel, as grey or palette"
    Image.new("L", (4, 4)).save(path, "JPEG")  # a lossy label map under another name
    assert reason(path) == "not an image; expected PNG"
    path.write_bytes(png(np.zeros((4, 4), int), 8, 0)[:45])
    assert reason(path) == "truncated"
    Image.new("L", (2000, 2000)).save(path)
    assert reason(path) == "too many pixels: 4,000,000 > 1,000,000"
    assert reason(tmp_path / "none.png") == "no such file"


# Class lists


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.txt", "sky\nroad\ntraffic light\n", {0: "sky", 1: "road", 2: "traffic light"}),
        ("a.txt", "7 sky\n\n0\tdark road \r\n255 3d thing", {7: "sky", 0: "dark road", 255: "3d thing"}),
        ("a.txt", "\ufeff1 ciel bleu\n2 forêt\n", {1: "ciel bleu", 2: "forêt"}),
        ("a.csv", "Idx,Ratio,Name\n1,.5,wall\n2,.1,building;edifice\n", {1: "wall", 2: "building"}),
        ("a.csv", 'name,id\n"a, b",4\n\n', {4: "a, b"}),
        ("a.csv", "id,name\n1,screen;door\n2,screen;film\n3,;\n", {1: "screen;door", 2: "screen;film", 3: ";"}),
        ("a.csv", "id,name,category\n1,glass;pane,object\n2,glass,material\n", {1: "glass;pane", 2: "glass"}),
        (
            "a.txt",
            "-- 13 person --\n1\thead\t\t\n2\tleft arm\n\n-- 9 bed --\n3\tleg\n",
            {1: "person head", 2: "person left arm", 3: "bed leg"},
        ),
    ],
)
def test_class_lists_in_every_form(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text, newline="")
    assert dict(read_class_list(tmp_path / name).names) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", "has no names that are not void"),
        ("a.txt", "11 unlabelled\n", "has no names that are not void"),
        ("a.txt", "1 sky\nroad\n", r"line 2 of .* is 'road' ''; expected an index up to 65535 and a name"),
        ("a.txt", "1 sky\n2\n", r"line 2 of .* is '2' ''"),
        ("a.txt", "1 sky\n70000 road\n", r"line 2 of .* is '70000' 'road'"),
        ("a.txt", "1 sky\n1 road\n", r"line 2 of .* names index 1 'road', but it is 'sky'"),
        ("a.txt", "1 sky\n2 sky\n", r"gives the name 'sky' to the indices 1 and 2; make them differ"),
        ("a.txt", "sky\n\nroad\n", r"line 2 of .* is empty; it would shift"),
        ("a.csv", "a,b\n1,sky\n", r"has the columns a, b; expected name and one of id, idx, index"),
        ("a.csv", "id,name\n1,sky\n2,a,b\n", r"line 3 of .* has 3 fields, its header 2"),
        ("a.csv", "id,name\n-1,sky\n", r"line 2 of .* is '-1' 'sky'"),
        ("a.csv", 'id,name\n1,"sky\n', r"is not a CSV"),
    ],
)
def test_class_lists_that_are_refused(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        read_class_list(tmp_path / name, void=[11])


def test_more_class_lists_that_are_refused(tmp_path):
    with pytest.raises(MicrotomeError, match=r"cannot read the class list .*none.txt"):
        read_class_list(tmp_path / "none.txt")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(MicrotomeError, match="is not text in UTF-8"):
        read_class_list(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("sky\n")
    with pytest.raises(MicrotomeError, match=r"the void value 65536 for .* cannot be in a label map"):
        read_class_list(tmp_path / "a.txt", void=[65536])


def test_void_names_are_no_concepts_and_may_repeat(tmp_path):
    (tmp_path / "a.txt").write_text("0 void\n1 sky\n2 void\n")
    classes = read_class_list(tmp_path / "a.txt", void=[0, 2, 255])
    assert classes.concepts() == {1: "sky"}


# Concept numbers


@pytest.fixture
def classes() -> ClassList:
    return ClassList(
        Path("somewhere/classes.txt"), {0: "sky", 1: "road", 5: "car", 11: "unlabelled"}, frozenset([11, 255])
    )


NUMBERS = {"road": 300, "sky": 2, "car": 7, "another": 9}


def test_indices_become_concept_numbers(tmp_path, classes):
    indices = np.array([[0, 1, 5], [11, 255, 1]], np.uint8)
    Image.fromarray(indices).save(tmp_path / "a.png")
    numbers = decode_label_map(tmp_path / "a.png", classes, classes.lookup(NUMBERS), AS_IS, (2, 3), LIMIT)
    assert numbers.dtype == np.uint16 and numbers.tolist() == [[2, 300, 7], [0, 0, 300]]
    crop = decode_label_map(tmp_path / "a.png", classes, classes.lookup(NUMBERS), Geometry(4, 2), (2, 3), LIMIT)
    assert crop.tolist() == [[300, 300], [0, 0]]


def test_an_index_that_is_not_listed_is_refused(tmp_path, classes):
    indices = np.ones((6, 9), np.uint8)
    indices[4, 7] = 77
    Image.fromarray(indices).save(tmp_path / "a.png")
    with pytest.raises(Refused) as error:
        decode_label_map(tmp_path / "a.png", classes, classes.lookup(NUMBERS), AS_IS, (6, 9), LIMIT)
    assert error.value.reason == (
        "label map a.png: index 77 at row 4, column 7 is neither in classes.txt (0 to 11) nor void"
    )


def test_another_shape_than_the_images_is_refused(tmp_path, classes):
    Image.fromarray(np.ones((6, 9), np.uint8)).save(tmp_path / "a.png")
    lookup = classes.lookup(NUMBERS)
    assert decode_label_map(tmp_path / "a.png", classes, lookup, AS_IS, (12, 18), LIMIT).shape == (12, 18)
    with pytest.raises(Refused, match=r"^label map a.png: the label map is 9x6, but its image is 6x9$"):
        decode_label_map(tmp_path / "a.png", classes, lookup, AS_IS, (9, 6), LIMIT)


@pytest.mark.parametrize("number", [0, -1, 65536])
def test_numbers_that_label_maps_cannot_hold(classes, number):
    with pytest.raises(MicrotomeError, match=f"concept 'car' of .* has the number {number}; expected 1 to 65535"):
        classes.lookup({**NUMBERS, "car": number})
    with pytest.raises(MicrotomeError, match=r"concept 'car' of .* has the number 0"):
        classes.lookup({"sky": 1, "road": 2})


@pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared real data are not on this machine")
def test_camvid_label_maps():
    root = SHARED / "data/camvid"
    classes = read_class_list(root / "classes.txt", void=[11])
    concepts = classes.concepts()
    assert len(concepts) == 11 and concepts[0] == "sky" and concepts[8] == "car"
    lookup = classes.lookup({name: number for number, name in enumerate(concepts.values(), start=1)})
    path = sorted((root / "labels").glob("*.png"))[0]
    size = size_of(root / "images" / f"{path.stem}.jpg", LIMIT)
    numbers = decode_label_map(path, classes, lookup, AS_IS, size, LIMIT)
    with Image.open(path) as image:
        stored = np.asarray(image)
    np.testing.assert_array_equal(numbers, np.where(stored == 11, 0, stored + 1))


# Class lists in formats that people have


@pytest.mark.parametrize(
    "text",
    [
        "# id name\n1 wall\n2 road\n",
        "1,wall\n2,road\n",
        "1: wall\n2: road\n",
        "1. wall\n2. road\n",
        "wall 1\nroad 2\n",
        "wall,1\nroad,2\n",
        "wall: 1.0\nroad: 2.0\n",
    ],
)
def test_separators_comments_and_indices_behind_names_are_read(tmp_path, text):
    path = tmp_path / "a.txt"
    path.write_text(text)
    classes = read_class_list(path)
    assert classes.concepts() == {1: "wall", 2: "road"}
    # Earlier versions read such a file otherwise: what they made of it must not be taken for this.
    assert classes.digest(lambda _: "digest") == "digest by marks"


def test_plain_class_lists_keep_their_digest(tmp_path):
    path = tmp_path / "a.txt"
    for text in (
        "1 wall\n2 =road, side\n",
        "class 0\nclass 1\n",
        "0 0\n1 1\n",
        "1 zone 1\n2 zone 2\n",
        "wall\n3d thing\n",
    ):
        path.write_text(text)
        assert read_class_list(path).digest(lambda _: "digest") == "digest"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-1 none\n0 wall\n", r"line 1 of .* is '-1' 'none'; expected an index"),
        ("id name\n1 wall\n", r"line 2 of .* '1 wall', begins with the number 1, in a list of names alone"),
        ("name\nwall\nroad\n", r"line 1 of .* 'name', is a heading"),
        ("wall\nlane 2\nroad\n", r"line 2 of .* ends with the number 2, .* it would be index 1"),
        ("zone 1\nzone 2\n", r"line 1 of .* ends with the number 1"),
        ("# classes\nwall\nroad\n", r"line 1 of .* begins with a mark"),
        ("wall,\nroad,\n", r"line 1 of .* ends with a mark"),
        ("names:\n  0: wall\n", r"line 1 of .* 'names:', ends with a mark"),
        ("wall.\nroad.\n", r"line 1 of .* ends with a mark"),
        ("0 0 0 wall\n128 0 0 road\n", r"line 1 of .* holds a colour"),
        ("wall 0 0 0\nroad 128 0 0\n", r"line 1 of .* holds a colour"),
        ("1 wall\n2 road (128, 0, 0)\n", r"line 2 of .* holds a colour"),
        ("1 wall #a0b0c0\n", r"line 1 of .* holds a colour"),
        ("7 road 0\n8 wall 1\n", r"line 1 of .* and all others have two numbers"),
        ("road 7 0\nwall 8 1\n", r"line 1 of .* and all others have two numbers"),
        ("0 7 road\n1 8 wall\n", r"line 1 of .* begins with two numbers"),
    ],
)
def test_class_lists_that_may_mean_two_things_are_refused(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        read_class_list(tmp_path / "a.txt")


def test_other_numbers_in_a_second_column_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("id,index,name\n7,0,road\n")
    with pytest.raises(MicrotomeError, match=r"line 2 of .* has other numbers in id and index"):
        read_class_list(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("id,index,name\n7,7,road\n")
    assert read_class_list(tmp_path / "a.csv").concepts() == {7: "road"}


@pytest.mark.parametrize("first", ["wall", "north", "backpack"])
def test_names_alone_whose_first_is_void_are_refused_unless_it_says_so(tmp_path, first):
    path = tmp_path / "a.txt"
    path.write_text(f"{first}\nroad\n")
    with pytest.raises(MicrotomeError, match=f"is '{first}' void, or index 1\\? Write `0 {first}` or `1 {first}`"):
        read_class_list(path, void=[0])
    assert read_class_list(path, void=[255]).concepts() == {0: first, 1: "road"}
    for nothing in ("void", "_background_", "Unlabelled", "no label", "unlabeled"):
        path.write_text(f"{nothing}\n{first}\n")
        assert read_class_list(path, void=[0]).concepts() == {1: first}
