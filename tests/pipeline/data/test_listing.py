"""Listings: layouts, splits, labels, hostile names, slots that never move, and what a changed file changes."""

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.data.snapshot as snapshot_module
from pipeline.data.listing import (
    Fixed,
    Folders,
    Listing,
    Share,
    SplitTable,
    assign_splits,
    group,
    list_imagefolder,
    list_segmentation,
    list_table,
    read_labels,
    slots,
)
from pipeline.data.snapshot import scan, snapshot, unchanged
from pipeline.errors import MicrotomeError

SHARED = Path(os.environ.get("MICROTOME_SHARED", Path(__file__).parents[4] / "shared"))
real_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="the shared real data are not on this machine")
ALL = Fixed("validation")


def make(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def ids(listing: Listing) -> list[str]:
    return listing.image_id.tolist()


def listing_of(image_ids: list[str], split: list[str] | None = None) -> Listing:
    n = len(image_ids)
    return Listing(
        root=Path("x"),
        image_id=np.array(image_ids, np.dtypes.StringDType()),
        size=np.arange(n),
        mtime_ns=np.arange(n) + 7,
        label=np.zeros(n, np.int64),
        split=np.array(split or ["train"] * n, np.dtypes.StringDType()),
        classes=["one"],
        label_map_roots={},
        label_map_path={},
        label_map_size=np.empty((n, 0), np.int64),
        label_map_mtime_ns=np.empty((n, 0), np.int64),
        refused={},
        ignored={},
    )


# Layouts


def test_classes_are_sorted_and_folders_may_be_nested(tmp_path):
    make(
        tmp_path,
        "dog/b.JPG",
        "cat/x/y/a.png",
        "cat/c.jpeg",
        "cat/notes.txt",
        ".git/a.png",
        "dog/.hidden.png",
        "dog/LICENSE",
    )
    listing = list_imagefolder(tmp_path, ALL)
    assert ids(listing) == ["cat/c.jpeg", "cat/x/y/a.png", "dog/b.JPG"]
    assert listing.classes == ["cat", "dog"] and listing.label.tolist() == [0, 0, 1]
    assert listing.split.tolist() == ["validation"] * 3
    assert listing.ignored == {".txt": 1, "(no extension)": 1, "hidden": 2}
    assert listing.size.tolist() == [len(i) for i in ids(listing)]
    assert listing.path(2).read_bytes() == b"dog/b.JPG"


def test_splits_from_folders(tmp_path):
    make(tmp_path, "train/dog/a.png", "val/cat/a.png", "val/dog/b.png", "test/dog/c.png")
    listing = list_imagefolder(tmp_path, Folders())
    assert dict(zip(ids(listing), listing.split.tolist(), strict=True)) == {
        "train/dog/a.png": "train",
        "val/cat/a.png": "validation",
        "val/dog/b.png": "validation",
        "test/dog/c.png": "test",
    }
    assert listing.classes == ["cat", "dog"]
    assert dict(zip(ids(listing), listing.label.tolist(), strict=True))["val/cat/a.png"] == 0
    make(tmp_path, "extra/dog/a.png")
    with pytest.raises(
        MicrotomeError, match=r"'extra/dog/a.png' is not in the folder of a split; expected one of train"
    ):
        list_imagefolder(tmp_path, Folders())


def test_flat_folders_have_no_labels(tmp_path):
    make(tmp_path / "a", "1.png", "2.png")
    listing = list_imagefolder(tmp_path / "a", ALL)
    assert listing.label.tolist() == [-1, -1] and listing.classes == []
    make(tmp_path / "b", "train/1.png", "val/2.png")
    listing = list_imagefolder(tmp_path / "b", Folders())
    assert listing.label.tolist() == [-1, -1] and listing.classes == []


def test_one_image_of_one_class(tmp_path):
    listing = list_imagefolder(make(tmp_path, "only/1.png"), ALL)
    assert ids(listing) == ["only/1.png"] and listing.classes == ["only"] and listing.label.tolist() == [0]
    assert slots(listing)[1].tolist() == [0]


@pytest.mark.parametrize(
    ("names", "rule", "message"),
    [
        ([], ALL, "no images in .*: found no files; expected files that end in"),
        (["a/x.txt", "a/y.csv", "a/z.txt"], ALL, r"found 1 \.csv, 2 \.txt"),
        (["cat/a.png", "b.png"], ALL, "1 images in .* lie beside class folders, the first is 'b.png'"),
        (
            ["train/cat/a.png", "val/cat/b.png"],
            ALL,
            "are splits, not classes: train, val; take the splits from folders",
        ),
        (["cat/a.png", "dog/x.txt"], ALL, "1 class folders in .* have no images, the first is 'dog'"),
        (["train/cat/a.png", "train/dog/x.txt"], Folders(), "1 class folders in .* the first is 'dog'"),
        (["a.png"], Folders(), "the image 'a.png' is not in the folder of a split"),
    ],
)
def test_layouts_that_are_refused(tmp_path, names, rule, message):
    make(tmp_path, *names)
    with pytest.raises(MicrotomeError, match=message):
        list_imagefolder(tmp_path, rule)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MicrotomeError, match=r"cannot read the folder .*nowhere/: No such file"):
        list_imagefolder(tmp_path / "nowhere", ALL)
    make(tmp_path, "file.png")
    with pytest.raises(MicrotomeError, match="Not a directory"):
        list_imagefolder(tmp_path / "file.png", ALL)


def test_classes_given_fix_the_numbers(tmp_path):
    make(tmp_path, "dog/a.png", "cat/a.png")
    listing = list_imagefolder(tmp_path, ALL, classes=["zebra", "dog", "cat"])
    assert listing.label.tolist() == [2, 1] and listing.classes == ["zebra", "dog", "cat"]
    with pytest.raises(MicrotomeError, match=r"folder 'dog' in .* is not one of the classes given; nearest: dogs"):
        list_imagefolder(tmp_path, ALL, classes=["dogs", "cat"])


HOSTILE = [
    "with space",
    "quote'\"",
    "$(touch pwned)",
    "`id`",
    "<script>alert(1)</script>".replace("/", "∕"),
    "ünïcødé 漢字 🐈",
    "new\nline",
    "tab\there",
    "-rf",
    "{braces}%s",
    "a;b|c&d",
    "..jpg",
    "*?[x]",
    "back\\slash",
]


def test_hostile_names_are_names(tmp_path):
    make(tmp_path, *(f"{name}/{name}.png" for name in HOSTILE if not name.startswith(".")))
    listing = list_imagefolder(tmp_path, ALL)
    wanted = sorted(name for name in HOSTILE if not name.startswith("."))
    assert listing.classes == wanted and ids(listing) == sorted(f"{name}/{name}.png" for name in wanted)
    assert all(listing.path(i).exists() for i in range(len(listing)))
    assert len({bytes(record) for record in listing.record_digests()}) == len(wanted)
    assert len(group(listing.image_id)) == len(slots(listing)[0]) == len(wanted)


def test_names_that_are_not_utf8_are_named(tmp_path):
    make(tmp_path, "cat/fine.png")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/cat/caf\xe9.png")).write_bytes(b"x")
    with pytest.raises(MicrotomeError, match=r"1 names in .* are not UTF-8, the first is b'cat/caf\\xe9.png'; rename"):
        list_imagefolder(tmp_path, ALL)


def test_links_are_followed_and_loops_end(tmp_path):
    make(tmp_path / "store", "1.png", "2.png")
    root = tmp_path / "farm"
    (root / "cat").mkdir(parents=True)
    (root / "cat" / "one.png").symlink_to(tmp_path / "store/1.png")
    (root / "cat" / "broken.png").symlink_to(tmp_path / "store/none.png")
    (root / "cat" / "loop.png").symlink_to(root / "cat" / "loop.png")
    os.mkfifo(root / "cat" / "pipe.png")
    (root / "dog").symlink_to(tmp_path / "store")
    listing = list_imagefolder(root, ALL)
    # what cannot be read keeps its slot, and is refused when it is decoded
    sizes = dict(zip(ids(listing), listing.size.tolist(), strict=True))
    assert sizes == {
        "cat/broken.png": -1,
        "cat/loop.png": -1,
        "cat/one.png": 5,
        "cat/pipe.png": -1,
        "dog/1.png": 5,
        "dog/2.png": 5,
    }
    (root / "cat" / "up").symlink_to(root)
    with pytest.raises(MicrotomeError, match="lead to one folder twice: '' and 'cat/up'; remove one"):
        list_imagefolder(root, ALL)


# Splits and labels


def test_splits_and_labels_from_a_csv(tmp_path):
    make(tmp_path / "d", "1.png", "2.png", "x, y.png")
    table = tmp_path / "t.csv"
    table.write_text(
        'Image,Label,split\n2.png,dog,val\n"x, y.png",cat,train\n\n1.png,dog,holdout-1\n', encoding="utf-8-sig"
    )
    listing = list_imagefolder(tmp_path / "d", SplitTable(table), labels=table)
    assert listing.split.tolist() == ["holdout-1", "validation", "train"]
    assert listing.classes == ["cat", "dog"] and listing.label.tolist() == [1, 1, 0]


def test_labels_as_indices(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("file,class_index,name\na,3,fox\nb,0,\nc,3,fox\n")
    label, classes = read_labels(table, ["a", "b", "c"])
    assert label.tolist() == [3, 0, 3] and classes == ["0", "1", "2", "fox"]
    label, classes = read_labels(table, ["a", "b", "c"], classes=["p", "q", "r", "s", "t"])
    assert label.tolist() == [3, 0, 3] and classes == ["p", "q", "r", "s", "t"]
    with pytest.raises(MicrotomeError, match=r"line 2 of .* has the label 3; expected 0 to 1"):
        read_labels(table, ["a", "b", "c"], classes=["p", "q"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\); expected one of image_id, image, path, file"),
        ("image,tag\na,x\n", "has the columns image, tag; expected one of label, class_index, class"),
        ("image,label\na,x\nb,y,z\n", "line 3 of .* has 3 fields, its header 2"),
        ("image,label\na,x\naa,y\n", "line 3 of .* names 'aa', which is not an image of the data set; nearest: a"),
        ("image,label\na,x\nb,x\na,y\n", "line 4 of .* names 'a' again, first on line 2"),
        ("image,label\na,x\nb,\n", "line 3 of .* has an empty 'label' for 'b'"),
        ("image,label\na,x\n", "1 images have no label in .*, the first is 'b'; add their rows"),
        ('image,label\na,"x\n', "is not a CSV in UTF-8"),
        ("image,label\na,1\nb,99999999\n", "line 3 of .* has the label 99999999; expected 0 to 999,999"),
        ("image,label,name\na,1,cat\nb,1,dog\n", "line 3 of .* names class 1 'dog', but it is 'cat'"),
    ],
)
def test_tables_that_are_refused_name_the_row(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        read_labels(tmp_path / "t.csv", ["a", "b"])


def test_more_tables_that_are_refused(tmp_path):
    with pytest.raises(MicrotomeError, match=r"cannot read .*none.csv"):
        read_labels(tmp_path / "none.csv", ["a"])
    (tmp_path / "latin.csv").write_bytes(b"image,label\ncaf\xe9,x\n")
    with pytest.raises(MicrotomeError, match="is not a CSV in UTF-8"):
        read_labels(tmp_path / "latin.csv", ["a"])
    (tmp_path / "t.csv").write_text("image,split\na,../../etc\n")
    with pytest.raises(MicrotomeError, match=r"line 2 of .* has the split '\.\./\.\./etc'"):
        assign_splits(["a"], SplitTable(tmp_path / "t.csv"))
    (tmp_path / "t.csv").write_text("image,label\na,cta\n")
    with pytest.raises(MicrotomeError, match=r"line 2 of .* has the label 'cta', which is not a class; nearest: cat"):
        read_labels(tmp_path / "t.csv", ["a"], classes=["cat", "dog"])


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 0.5, "b": 0.6}, {"a": -0.5, "b": 1.5}, {"a b": 1}, {"a": 1, "b": 0}]
)
def test_shares_that_are_refused(shares):
    with pytest.raises(MicrotomeError):
        Share(shares)


names = st.lists(
    st.text(min_size=1, max_size=12).filter(lambda t: t.isprintable() and "/" not in t),
    min_size=1,
    max_size=40,
    unique=True,
)


@settings(deadline=None, max_examples=50)
@given(names, st.data())
def test_shares_are_stable_when_images_come_and_go(image_ids, data):
    kept = data.draw(st.lists(st.sampled_from(image_ids), unique=True))
    shares = {"train": 0.6, "validation": 0.3, "test": 0.1}
    before = dict(zip(image_ids, assign_splits(image_ids, Share(shares)).tolist(), strict=True))
    after = assign_splits(kept, Share(dict(reversed(shares.items())))).tolist()
    assert after == [before[image_id] for image_id in kept]


def test_shares_are_as_large_as_asked():
    split = assign_splits(
        [f"n{i:05d}.jpg" for i in range(20_000)], Share({"train": 0.7, "validation": 0.2, "test": 0.1})
    )
    for name, share in (("train", 0.7), ("validation", 0.2), ("test", 0.1)):
        assert abs((split == name).mean() - share) < 0.015


# Tables that name the images


def test_a_table_names_the_images(tmp_path):
    make(tmp_path / "d", "b/2.JPG", "a/1", "x, y.png", "not named.png", ".hidden/3.png")
    table = tmp_path / "t.csv"
    table.write_text(
        'Path,class,Split,name\nb/2.JPG,7,val,fox\n"x, y.png",0,train,\na/1,7,test,fox\n.hidden/3.png,0,val,\n'
    )
    listing = list_table(tmp_path / "d", table, None)
    assert ids(listing) == [".hidden/3.png", "a/1", "b/2.JPG", "x, y.png"]
    assert listing.split.tolist() == ["validation", "test", "validation", "train"]
    assert listing.label.tolist() == [0, 7, 7, 0] and listing.classes[7] == "fox" and len(listing.classes) == 8
    assert listing.size.tolist() == [13, 3, 7, 8] and (listing.mtime_ns > 0).all()
    assert listing.path(2).read_bytes() == b"b/2.JPG"
    assert list_table(tmp_path / "d", table, Fixed("train")).splits() == {"train": 4}
    assert list_table(tmp_path / "d", table, SplitTable(table)).splits() == listing.splits()


def test_a_table_of_paths_alone(tmp_path):
    make(tmp_path, "b", "a")
    (tmp_path / "t.csv").write_text("file\nb\na\nabsent/c\n")
    listing = list_table(tmp_path, tmp_path / "t.csv", None)
    assert ids(listing) == ["a", "absent/c", "b"] and listing.classes == [] and listing.splits() == {"validation": 3}
    assert listing.size.tolist() == [1, -1, 1]  # what is not there is refused when it is decoded
    by_hash = list_table(tmp_path, tmp_path / "t.csv", Share({"a": 0.5, "b": 0.5}))
    assert by_hash.split.tolist() == assign_splits(["a", "absent/c", "b"], Share({"a": 0.5, "b": 0.5})).tolist()


@pytest.mark.parametrize("path", ["../a", "/etc/passwd", "a/../../b", "./a", "a//b", "a/", "", "a/.", "..", "nul\0l"])
def test_paths_that_lead_elsewhere_are_refused(tmp_path, path):
    (tmp_path / "t.csv").write_text(f'path\nfine.png\n"{path}"\n')
    with pytest.raises(MicrotomeError, match=r"line 3 of .* has the path .*; expected one below"):
        list_table(tmp_path, tmp_path / "t.csv", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has the columns \(none\); expected one of image_id, image, path, file"),
        ("path,label\n", "names no images"),
        ("path,label\na,x\na,y\n", "line 3 of .* names 'a' again, first on line 2"),
        ("path,label\na,x\nb,\n", "line 3 of .* has an empty 'label' for 'b'"),
        ("path,split\na,train\nb,../x\n", r"line 3 of .* has the split '\.\./x'"),
        ("path,label,label\na,x,y\n", "has two columns 'label'; rename one"),
        ("path,label\na,99999999\n", "line 2 of .* has the label 99999999"),
    ],
)
def test_tables_of_images_that_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        list_table(tmp_path, tmp_path / "t.csv", None)
    with pytest.raises(MicrotomeError, match=r"cannot read the folder .*nowhere"):
        (tmp_path / "fine.csv").write_text("path\na\n")
        list_table(tmp_path / "nowhere", tmp_path / "fine.csv", None)


# Slots and groups


@settings(deadline=None, max_examples=60)
@given(names, st.data())
def test_known_images_keep_their_slots(image_ids, data):
    first = data.draw(st.lists(st.sampled_from(image_ids), unique=True, min_size=1))
    second = data.draw(st.lists(st.sampled_from(image_ids), unique=True, min_size=1))
    splits = {image_id: data.draw(st.sampled_from(["train", "validation"])) for image_id in image_ids}

    def listed(chosen):
        return listing_of(sorted(chosen), [splits[image_id] for image_id in sorted(chosen)])

    before, before_index = slots(listed(first))
    assert sorted(before.tolist()) == sorted(first) and (before_index >= 0).all()
    now = listed(second)
    after, index = slots(now, before)
    assert after[: len(before)].tolist() == before.tolist()
    assert sorted(after[len(before) :].tolist()) == sorted(set(second) - set(first))
    for image_id, position in zip(after.tolist(), index.tolist(), strict=True):
        assert (position == -1) == (image_id not in second)
        assert position == -1 or now.image_id[position] == image_id
    # the order of the new ones: all of one split together, and the same whatever else is there
    new = after[len(before) :].tolist()
    assert [splits[image_id] for image_id in new] == sorted(splits[image_id] for image_id in new)
    alone, _ = slots(listed(new)) if new else (np.array([]), None)
    assert alone.tolist() == new


def test_the_first_slots_are_a_random_sample():
    image_ids = [f"{c:02d}/{i:03d}.png" for c in range(10) for i in range(200)]
    order, _ = slots(listing_of(image_ids))
    share = np.unique([name[:2] for name in order.tolist()[:500]], return_counts=True)[1]
    assert len(share) == 10 and share.min() > 25 and share.max() < 80


def test_slots_and_groups_never_change():
    """Written down once: another order would orphan every store that exists."""
    image_ids = ["a.png", "b.png", "c.png", "d/é.png", "e f.png"]
    assert slots(listing_of(image_ids))[0].tolist() == SLOTS
    assert group(image_ids).tolist() == GROUPS
    assert assign_splits(image_ids, Share({"a": 0.5, "b": 0.5})).tolist() == SHARES


SLOTS = ["a.png", "b.png", "c.png", "e f.png", "d/é.png"]
GROUPS = [11, 0, 7, 5, 2]
SHARES = ["a", "b", "a", "a", "b"]


def test_a_slot_twice_is_an_error():
    with pytest.raises(MicrotomeError, match=r"the image id 'a' has two slots"):
        slots(listing_of(["a", "b"]), ["a", "c", "a"])


def test_groups_are_even_and_independent_of_slots_and_shares():
    image_ids = [f"n{i:05d}.jpg" for i in range(20_000)]
    groups = group(image_ids)
    assert groups.dtype == np.uint8 and np.abs(np.bincount(groups, minlength=20) - 1000).max() < 150
    order = slots(listing_of(image_ids))[1]
    assert np.abs(np.bincount(groups[order[:4000]], minlength=20) - 200).max() < 70
    split = assign_splits(image_ids, Share({"train": 0.5, "validation": 0.5}))
    assert np.abs(np.bincount(groups[split == "train"], minlength=20) - 500).max() < 110
    with pytest.raises(MicrotomeError, match="257 groups"):
        group(image_ids, 257)


# Digests


def test_the_digest_does_not_depend_on_the_order_of_the_file_system(tmp_path, monkeypatch):
    make(tmp_path, *(f"{c}/{i}.png" for c in "abc" for i in range(5)))
    expected = list_imagefolder(tmp_path, ALL)

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *arguments):
            pass

    scandir = os.scandir
    monkeypatch.setattr(snapshot_module.os, "scandir", lambda path: Reversed(reversed(list(scandir(path)))))
    again = list_imagefolder(tmp_path, ALL)
    assert again.digest() == expected.digest()
    assert (again.record_digests() == expected.record_digests()).all()


def test_the_digest_does_not_depend_on_the_place(tmp_path):
    make(tmp_path / "one", "a/1.png")
    (tmp_path / "one").rename(tmp_path / "two")
    digest = list_imagefolder(tmp_path / "two", ALL).digest()
    (tmp_path / "two").rename(tmp_path / "three")
    assert list_imagefolder(tmp_path / "three", ALL).digest() == digest


def test_every_field_changes_the_digest():
    base = listing_of(["a", "bc"])
    strings = np.dtypes.StringDType()
    others = [
        replace(base, image_id=np.array(["ab", "c"], strings)),
        replace(base, size=base.size + 1),
        replace(base, mtime_ns=base.mtime_ns + 1),
        replace(base, label=base.label - 1),
        replace(base, split=np.array(["train", "test"], strings)),
        replace(base, split=np.array(["trai", "ntrain"], strings)),
        replace(base, classes=["one", ""]),
        replace(base, classes=["on", "e"]),
        replace(
            base,
            label_map_path={"x": base.image_id},
            label_map_size=base.size[:, None],
            label_map_mtime_ns=base.size[:, None],
        ),
    ]
    digests = {listing.digest() for listing in [base, *others]}
    assert len(digests) == len(others) + 1
    assert replace(base, root=Path("elsewhere")).digest() == base.digest()


def test_a_record_changes_with_its_file_alone(tmp_path):
    make(tmp_path, "a/1.png", "a/2.png", "b/3.png")
    before = list_imagefolder(tmp_path, ALL)
    os.utime(tmp_path / "a/2.png", ns=(1, 1))
    after = list_imagefolder(tmp_path, Fixed("train"))
    assert (before.record_digests() == after.record_digests()).all(axis=1).tolist() == [True, False, True]
    assert before.digest() != after.digest()
    (tmp_path / "a").rename(tmp_path / "c")  # another id, the same file
    renamed = list_imagefolder(tmp_path, ALL)
    assert not (set(map(bytes, renamed.record_digests()[1:])) & set(map(bytes, after.record_digests()[:2])))


# Segmentation


@pytest.fixture
def scenes(tmp_path) -> Path:
    make(tmp_path / "images", "1.jpg", "2.jpg", "sub/3.jpg")
    make(tmp_path / "objects", "1.png", "2.png", "sub/3.png")
    make(tmp_path / "parts", "1.png", "2.png", "sub/3.png")
    return tmp_path


def segmentation(root: Path, **options) -> Listing:
    return list_segmentation(root / "images", {"part": root / "parts", "object": root / "objects"}, ALL, **options)


def test_label_maps_are_paired_by_stem(scenes):
    listing = segmentation(scenes)
    assert list(listing.label_map_path) == ["object", "part"]
    assert listing.label_map(2, "part") == scenes / "parts/sub/3.png"
    assert listing.label_map_size.tolist() == [[5, 5], [5, 5], [9, 9]]
    assert listing.label.tolist() == [-1] * 3 and not listing.refused
    table = scenes / "t.csv"
    table.write_text("image,label\n1.jpg,x\n2.jpg,y\nsub/3.jpg,x\n")
    assert segmentation(scenes, labels=table).label.tolist() == [0, 1, 0]


def test_a_missing_label_map_refuses_the_image_and_keeps_its_slot(scenes):
    (scenes / "parts/2.png").unlink()
    make(scenes, "parts/extra.png", "parts/readme.txt")
    listing = segmentation(scenes)
    assert listing.refused == {"2.jpg": "no label map of category 'part'"}
    assert ids(listing) == ["1.jpg", "2.jpg", "sub/3.jpg"]
    assert listing.label_map(1, "part") is None and listing.label_map_size[1].tolist() == [5, -1]
    assert listing.ignored == {"label maps of category 'part' without an image": 1}


def test_a_changed_label_map_changes_that_record_alone(scenes):
    before = segmentation(scenes)
    (scenes / "objects/2.png").write_bytes(b"another mask")
    after = segmentation(scenes)
    assert (before.record_digests() == after.record_digests()).all(axis=1).tolist() == [True, False, True]
    assert before.digest() != after.digest()
    alone = list_segmentation(scenes / "images", {"object": scenes / "objects"}, ALL)
    assert not (alone.record_digests() == after.record_digests()).all(axis=1).any()


def test_segmentations_that_are_refused(scenes):
    with pytest.raises(
        MicrotomeError, match=r"no label map of category 'object' in .* the image '1.jpg' needs '1.png'; found 3 .jpg"
    ):
        list_segmentation(scenes / "images", {"object": scenes / "images"}, ALL)
    make(scenes / "images", "1.png")
    with pytest.raises(MicrotomeError, match=r"differ in their extension alone: '1.jpg' and '1.png'"):
        segmentation(scenes)
    (scenes / "images/1.png").unlink()
    make(scenes / "objects", "1.PNG")
    with pytest.raises(MicrotomeError, match=r"differ in their extension alone: '1.PNG' and '1.png'"):
        segmentation(scenes)
    with pytest.raises(MicrotomeError, match=r"cannot read the folder .*masks"):
        list_segmentation(scenes / "images", {"object": scenes / "masks"}, ALL)


# What labels, splits and folders may mean


@pytest.mark.parametrize(
    ("labels", "expected", "classes"),
    [
        (["0.0", "10.0", "2.0"], [0, 10, 2], [str(i) for i in range(11)]),
        (["0", "1.00", "-1"], [0, 1, -1], ["0", "1"]),
        (["-1.0", "-1", "0"], [-1, -1, 0], ["0"]),
        (["-1", "-1", "-1"], [-1, -1, -1], []),
        (["cat", "-1", "dog"], [0, -1, 1], ["cat", "dog"]),
        (["0", "A", "9"], [0, 2, 1], ["0", "9", "A"]),  # names, some of which are digits
        (["123456789012", "3", "4"], [0, 1, 2], ["123456789012", "3", "4"]),
    ],
)
def test_labels_are_numbers_where_they_are_whole_and_minus_one_is_none(tmp_path, labels, expected, classes):
    rows = (f"{i},{label}\n" for i, label in zip("abc", labels, strict=True))
    (tmp_path / "t.csv").write_text("image,label\n" + "".join(rows))
    label, found = read_labels(tmp_path / "t.csv", ["a", "b", "c"])
    assert label.tolist() == expected and found == classes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label\na,0\nb,0.5\n", r"line 3 of .* has the label '0.5' among numbers; expected whole numbers"),
        ("image,label\na,0\nb,nan\n", r"line 3 of .* has the label 'nan' among numbers"),
        ("image,label\na,1e0\nb,10\n", r"line 2 of .* has the label '1e0' among numbers"),
        ("image,label\na,N/A\nb,10\n", r"line 2 of .* has the label 'N/A' among numbers"),
        ("image,label\na,0\nb,-2\n", r"line 3 of .* has the label -2; expected 0 to 999,999, -1 for none"),
        ("image,label,name\na,0,cat\nb,3,cat\n", r"gives the name 'cat' to the classes 0 and 3; make them differ"),
        ("image,label,name\na,0,3\nb,3,\n", r"gives the name '3' to the classes 0 and 3"),
        ("image,label,name\na,0,e\u0301\nb,1,\u00e9\n", r"gives the name .* to the classes 0 and 1"),
        ("image,label,class_index\na,dog,0\nb,cat,1\n", r"names in 'label' and other numbers in 'class_index'"),
    ],
)
def test_labels_that_may_mean_two_things_are_refused(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        read_labels(tmp_path / "t.csv", ["a", "b"])


def test_names_and_their_numbers_may_stand_in_two_columns(tmp_path):
    (tmp_path / "t.csv").write_text("image,label,class_index\na,dog,1\nb,cat,0\n")
    assert read_labels(tmp_path / "t.csv", ["a", "b"])[1] == ["cat", "dog"]


@pytest.mark.parametrize("names", [("val", "Val"), ("val", "valid"), ("train", "training"), ("Test", "testing")])
def test_two_names_of_one_split_are_refused_everywhere(tmp_path, names):
    make(tmp_path / "d", "a", "b")
    rows = (f"{i},{name}\n" for i, name in zip("ab", names, strict=True))
    (tmp_path / "t.csv").write_text("path,split\n" + "".join(rows))
    for ask in (
        lambda: list_table(tmp_path / "d", tmp_path / "t.csv", None),
        lambda: assign_splits(["a", "b"], SplitTable(tmp_path / "t.csv")),
        lambda: Share(dict.fromkeys(names, 0.5)),
    ):
        with pytest.raises(MicrotomeError, match="may be one split: give both the same name"):
            ask()


def test_one_name_of_a_split_stays_as_it_is(tmp_path):
    for name, split in (("valid", "valid"), ("Val", "Val"), ("val", "validation")):
        (tmp_path / "t.csv").write_text(f"image,split\na,{name}\nb,train\n")
        assert assign_splits(["a", "b"], SplitTable(tmp_path / "t.csv")).tolist() == [split, "train"]
    make(tmp_path / "d", "train/x/1.png", "valid/x/1.png")
    assert list_imagefolder(tmp_path / "d", Folders()).splits() == {"train": 1, "validation": 1}


def test_columns_that_are_not_used_are_told(tmp_path):
    make(tmp_path / "d", "1.png", "2.png")
    table = tmp_path / "t.csv"
    table.write_text("path,target,split\n1.png,3,train\n2.png,4,test\n")
    assert list_table(tmp_path / "d", table, None).notices == [
        "t.csv: not used: target",
        "no labels were read; they are in a column label, class_index, class",
    ]
    table.write_text("image,label,split,name\n1.png,0,train,cat\n2.png,1,train,dog\n")
    assert list_imagefolder(tmp_path / "d", SplitTable(table), labels=table).notices == []
    assert list_imagefolder(tmp_path / "d", ALL, labels=table).notices == ["t.csv: not used: split"]


def test_of_two_columns_of_images_the_one_with_files_is_used(tmp_path):
    make(tmp_path / "d", "1.png", "2.png")
    table = tmp_path / "t.csv"
    table.write_text("image_id,path,label\n1,1.png,0\n2,2.png,1\n")
    listing = list_table(tmp_path / "d", table, None)
    assert ids(listing) == ["1.png", "2.png"] and listing.notices == ["t.csv: not used: image_id"]
    assert read_labels(table, ["1.png", "2.png"])[0].tolist() == [0, 1]
    table.write_text("image_id,path,label\n1.png,/elsewhere/1.png,0\n2.png,/elsewhere/2.png,1\n")
    assert ids(list_table(tmp_path / "d", table, None)) == ["1.png", "2.png"]


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "valid", "test"),
        ("Train", "Val"),
        ("train2017", "val2017"),
        ("training_set", "testing_set"),
        ("train", "test", "extra"),
    ],
)
def test_folders_of_splits_are_no_classes(tmp_path, folders):
    make(tmp_path, *(f"{name}/cat/1.png" for name in folders))
    with pytest.raises(MicrotomeError, match=r"are splits, not classes: .*; take the splits from folders"):
        list_imagefolder(tmp_path, ALL)


def test_a_class_may_be_called_like_a_split(tmp_path):
    make(tmp_path, "train/1.png", "car/1.png", "valid/1.png".replace("valid", "bus"))
    assert list_imagefolder(tmp_path, ALL).classes == ["bus", "car", "train"]
    make(tmp_path / "defects", "valid/1.png", "invalid/1.png")
    assert list_imagefolder(tmp_path / "defects", ALL).classes == ["invalid", "valid"]


@pytest.mark.parametrize(
    "names",
    [
        ("train/n1/images/1.png", "train/n2/images/1.png", "val/images/1.png", "test/images/2.png"),  # Tiny ImageNet
        ("train/n1/1.png", "train/n2/1.png", "val/images/1.png"),
        ("train/n1/1.png", "train/n2/1.png", "test/unknown/1.png"),
        ("train/n1/1.png", "val/n1/1.png", "val/n2/1.png", "test/all/1.png"),
    ],
)
def test_a_class_of_one_split_that_lacks_all_others_is_refused(tmp_path, names):
    make(tmp_path, *names)
    with pytest.raises(MicrotomeError, match=r"have the one class '\w+', and the other splits lack it"):
        list_imagefolder(tmp_path, Folders())


def test_splits_may_have_classes_of_their_own(tmp_path):
    make(tmp_path / "few-shot", "train/a/1.png", "train/b/1.png", "val/c/1.png", "val/d/1.png")
    assert len(list_imagefolder(tmp_path / "few-shot", Folders()).classes) == 4
    make(tmp_path / "small", "train/a/1.png", "train/b/1.png", "val/b/1.png")
    assert list_imagefolder(tmp_path / "small", Folders()).label.tolist() == [0, 1, 1]


@pytest.mark.parametrize(("name", "rule"), [("images", ALL), ("JPEGImages", ALL), ("train/labels", Folders())])
def test_folders_of_a_layout_beside_classes_are_refused(tmp_path, name, rule):
    below = name.rpartition("/")[0]
    make(tmp_path, *(f"{below}/{each}/1.png".lstrip("/") for each in ("cat", "dog", name.rpartition("/")[2])))
    with pytest.raises(
        MicrotomeError, match=f"the folder '{name.rpartition('/')[2]}' in .* lies beside 2 class folders"
    ):
        list_imagefolder(tmp_path, rule)


@pytest.mark.parametrize("stem", ["", "class ", "c"])
def test_the_order_of_numbers_in_names_is_told_and_has_a_key(tmp_path, stem):
    make(tmp_path / "d", *(f"{stem}{i}/1.png" for i in range(12)))
    listing = list_imagefolder(tmp_path / "d", ALL)
    assert listing.classes[:3] == [f"{stem}0", f"{stem}1", f"{stem}10"]
    (notice,) = listing.notices
    assert f"2 → {stem}10" in notice and "`class_order: number`" in notice
    ordered = list_imagefolder(tmp_path / "d", ALL, order="number")
    assert ordered.classes == [f"{stem}{i}" for i in range(12)] and ordered.notices == []
    make(tmp_path / "few", *(f"{stem}{i}/1.png" for i in range(10)))
    assert list_imagefolder(tmp_path / "few", ALL).notices == []


def test_a_folder_of_images_without_a_class_is_none(tmp_path):
    """-1 is none in folders as in columns."""
    make(tmp_path / "d", "-1/1.png", "-1/2.png", "0/1.png", "1/1.png")
    listing = list_imagefolder(tmp_path / "d", ALL)
    assert listing.classes == ["0", "1"] and listing.label.tolist() == [-1, -1, 0, 1]
    assert "the folder '-1' is no class: its 2 images have no label" in listing.notices
    assert list_imagefolder(tmp_path / "d", ALL, classes=["0", "1"]).label.tolist() == [-1, -1, 0, 1]
    given = list_imagefolder(tmp_path / "d", ALL, classes=["-1", "0", "1"])
    assert given.label.tolist() == [0, 0, 1, 2]
    make(tmp_path / "s", *(f"{split}/{name}/1.png" for split in ("train", "test") for name in ("-1", "cat", "dog")))
    listing = list_imagefolder(tmp_path / "s", Folders())
    assert listing.classes == ["cat", "dog"] and sorted(listing.label.tolist()) == [-1, -1, 0, 0, 1, 1]


def test_folds_are_no_classes(tmp_path):
    make(tmp_path, *(f"fold{i}/{name}/1.png" for i in range(3) for name in "ab"))
    with pytest.raises(MicrotomeError, match=r"are folds, not classes: fold0, fold1, fold2; give classes"):
        list_imagefolder(tmp_path, ALL)


def test_what_class_folders_may_mean_otherwise_is_told(tmp_path):
    make(tmp_path / "inside", *(f"{name}/{split}/1.png" for name in ("cat", "dog") for split in ("train", "test")))
    assert list_imagefolder(tmp_path / "inside", ALL).notices == [
        "folders of splits lie within the class folders and are not read: test, train"
    ]
    make(tmp_path / "typo", "train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dgo/1.png")
    assert list_imagefolder(tmp_path / "typo", Folders()).notices == [
        "classes that one split alone has: 'dgo' (val), 'dog' (train)"
    ]
    make(tmp_path / "masks", "cat/1.png", "cat/1_mask.png", "dog/2.png", "dog/3_mask.png")
    assert list_imagefolder(tmp_path / "masks", ALL).notices == [
        "1 images, the first is 'cat/1_mask', seem to be label maps of others, and count as images"
    ]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ("1 2 3", "no image has the label 0: if the labels 1 to 3 count from 1, subtract 1"),
        ("1 2 -1", "no image has the label 0"),
        ("0 1 2", None),
        ("1 1 1", None),
        ("cat dog cat|dog", "class names that are made of others, where images have several labels: cat|dog"),
        ("cat dog cat|cow", None),
    ],
)
def test_labels_that_may_mean_something_else_are_told(tmp_path, labels, said):
    make(tmp_path / "d", "1.png", "2.png", "3.png")
    rows = zip(("1.png", "2.png", "3.png"), labels.split(), strict=True)
    (tmp_path / "t.csv").write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in rows))
    notices = list_table(tmp_path / "d", tmp_path / "t.csv", None).notices
    assert notices == [] if said is None else (len(notices) == 1 and said in notices[0])


SYSTEM = ["@eaDir/1.png", "cat/@eaDir/1.jpg", ".thumbnails/1.png", ".ipynb_checkpoints/1.png", "#recycle/1.png",
          "__MACOSX/cat/._1.png", "cat/Thumbs.db", "$RECYCLE.BIN/1.png", "System Volume Information/1.png"]  # fmt: skip


def test_folders_of_systems_and_editors_are_no_classes(tmp_path):
    make(tmp_path, "cat/1.png", "dog/1.png", *SYSTEM)
    listing = list_imagefolder(tmp_path, ALL)
    assert ids(listing) == ["cat/1.png", "dog/1.png"] and listing.ignored == {"hidden": len(SYSTEM)}


@pytest.mark.parametrize("names", [("Cat", "cat"), ("hot dog", "hot_dog"), ("cat", "cat ")])
def test_class_names_that_are_nearly_one_are_told(tmp_path, names):
    make(tmp_path, *(f"{name}/1.png" for name in (*names, "A", "a")))
    (notice,) = list_imagefolder(tmp_path, ALL).notices
    assert (
        notice.startswith("classes whose names differ in case or spaces alone: ") and "A" not in notice.split(": ")[1]
    )


def test_small_copies_are_told(tmp_path):
    make(tmp_path / "d", "cat/1.png", "cat/thumbs/1.png", "dog/Thumbnails/2.png")
    (notice,) = list_imagefolder(tmp_path / "d", ALL).notices
    assert notice == "2 images lie in folders like 'cat/thumbs/1.png': small copies count as images"
    make(tmp_path / "e", "cat/1.png", "dog/1.png", "thumbnails/1.png")
    with pytest.raises(MicrotomeError, match=r"the folder 'thumbnails' in .* lies beside 2 class folders"):
        list_imagefolder(tmp_path / "e", ALL)


def test_composed_and_decomposed_names_are_one_name(tmp_path):
    """macOS decomposes the names of files; tables and other systems do not."""
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    make(tmp_path / "d", f"train/{composed}/1.png", f"val/{decomposed}/2.png", f"val/{decomposed}/tea.png")
    assert list_imagefolder(tmp_path / "d", Folders()).classes == [composed]
    make(tmp_path / "e", f"{decomposed}.png", "tea.png")
    table = tmp_path / "t.csv"
    table.write_text(f"image,label\n{composed}.png,{composed}\ntea.png,{decomposed}\n")
    listing = list_imagefolder(tmp_path / "e", ALL, labels=table)
    assert listing.classes == [composed] and listing.label.tolist() == [0, 0]
    assert ids(list_table(tmp_path / "e", table, None)) == [f"{decomposed}.png", "tea.png"]
    make(tmp_path / "maps", f"{composed}.png", "tea.png")
    assert not list_segmentation(tmp_path / "e", {"object": tmp_path / "maps"}, ALL).refused
    make(tmp_path / "f", f"{decomposed}/1.png")  # a name that has one form keeps it, and its id
    assert list_imagefolder(tmp_path / "f", ALL).classes == [decomposed]


# The layouts of VOC and Cityscapes


@pytest.fixture
def voc(tmp_path) -> Path:
    make(tmp_path, *(f"JPEGImages/{name}.jpg" for name in ("1", "2", "3")))
    make(tmp_path, *(f"SegmentationClass/{name}.png" for name in ("1", "2")))
    (tmp_path / "train.txt").write_text("1\n")
    (tmp_path / "val.txt").write_text("2\r\n\n")
    return tmp_path


def listed_voc(root: Path, lists) -> Listing:
    return list_segmentation(root / "JPEGImages", {"object": root / "SegmentationClass"}, ALL, lists=lists)


def test_a_list_names_the_images_to_use(voc):
    one = listed_voc(voc, voc / "val.txt")
    assert ids(one) == ["2.jpg"] and one.splits() == {"validation": 1} and not one.refused
    assert one.ignored["images that `list` does not name"] == 2 and voc / "val.txt" in one.read
    both = listed_voc(voc, {"train": voc / "train.txt", "validation": voc / "val.txt"})
    assert dict(zip(ids(both), both.split.tolist(), strict=True)) == {"1.jpg": "train", "2.jpg": "validation"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2\n2x\n", r"line 2 of .*val.txt, '2x', names no image; expected one name per line"),
        ("2 -1\n", r"line 1 of .*val.txt, '2 -1', names no image"),
        ("JPEGImages/2.jpg SegmentationClass/2.png\n", r"line 1 of .* names no image"),
        ("2\n1\n", r"line 2 of .*val.txt: '1' is in two splits, train and validation"),
    ],
)
def test_lists_that_are_refused(voc, text, message):
    (voc / "val.txt").write_text(text)
    with pytest.raises(MicrotomeError, match=message):
        listed_voc(voc, {"train": voc / "train.txt", "validation": voc / "val.txt"})


def test_images_and_label_maps_may_end_differently(tmp_path):
    make(tmp_path / "leftImg8bit", "val/a/1_leftImg8bit.png", "val/a/2_leftImg8bit.png", "val/a/2_preview.png")
    ends = ("gtFine_labelIds", "gtFine_color", "gtFine_instanceIds")
    make(tmp_path / "gtFine", *(f"val/a/{i}_{end}.png" for i in (1, 2) for end in ends))
    maps = {"object": tmp_path / "gtFine"}
    listing = list_segmentation(
        tmp_path / "leftImg8bit",
        maps,
        Folders(),
        image_suffix="_leftImg8bit",
        label_suffixes={"object": "_gtFine_labelIds"},
    )
    assert ids(listing) == ["val/a/1_leftImg8bit.png", "val/a/2_leftImg8bit.png"] and not listing.refused
    assert listing.label_map_path["object"].tolist() == ["val/a/1_gtFine_labelIds.png", "val/a/2_gtFine_labelIds.png"]
    assert listing.ignored == {"images that do not end in '_leftImg8bit'": 1}
    with pytest.raises(MicrotomeError, match="`image_suffix` and `label_suffix` say how their names end"):
        list_segmentation(tmp_path / "leftImg8bit", maps, Folders())
    with pytest.raises(MicrotomeError, match=r"no image in .* ends in '_right'"):
        list_segmentation(tmp_path / "leftImg8bit", maps, Folders(), image_suffix="_right")


# The cache


@pytest.fixture
def cached(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """A root and a cache folder; the root is large enough for the cache and was left alone for a while."""
    monkeypatch.setattr(snapshot_module, "CACHE_FROM", 3)
    root = make(tmp_path / "d", "a/1.png", "a/2.png", "b/3.png", "b/4.png")
    settle(root)
    return root, tmp_path / "cache"


def settle(root: Path) -> None:
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        past = folder.stat().st_mtime_ns - 10_000_000_000
        os.utime(folder, ns=(past, past))


def test_an_unchanged_data_set_is_not_walked_again(cached, monkeypatch):
    root, cache = cached
    assert unchanged(root, cache) is None and unchanged(root, None) is None
    files = snapshot(root, cache)
    stamp = unchanged(root, cache)
    assert stamp is not None
    monkeypatch.setattr(snapshot_module, "scan", lambda root: pytest.fail("walked again"))
    again = snapshot(root, cache)
    assert again.names == files.names and again.folders == files.folders and again.hidden == files.hidden
    assert (again.size == files.size).all() and (again.mtime_ns == files.mtime_ns).all()
    assert list_imagefolder(root, ALL, cache=cache).classes == ["a", "b"]


def test_a_changed_folder_or_a_rescan_lists_again(cached):
    root, cache = cached
    stamp = (snapshot(root, cache), unchanged(root, cache))[1]
    make(root, "b/5.png")
    assert unchanged(root, cache) is None
    assert snapshot(root, cache).names[-1] == "b/5.png"
    settle(root)
    assert len(snapshot(root, cache).names) == 5 and unchanged(root, cache) not in (None, stamp)
    (root / "a/1.png").write_bytes(b"changed in place")  # no folder changes
    assert snapshot(root, cache).size[0] == 7
    assert snapshot(root, cache, rescan=True).size[0] == 16
    assert snapshot(root, cache).size[0] == 16
    (root / "b").rename(root.parent / "gone")
    assert snapshot(root, cache).names == ["a/1.png", "a/2.png"]


def test_a_folder_that_has_just_changed_is_not_trusted(cached):
    """A second change within one tick of the file system's clock would leave the same time."""
    root, cache = cached
    now = time.time_ns()
    os.utime(root / "a", ns=(now, now))
    snapshot(root, cache)
    assert unchanged(root, cache) is None


def test_small_data_sets_are_listed_every_time(cached, monkeypatch):
    root, cache = cached
    monkeypatch.setattr(snapshot_module, "CACHE_FROM", 20_000)
    snapshot(root, cache)
    assert unchanged(root, cache) is None and not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"garbage", b"PK\x03\x04 garbage", "cut", "flip", "pickle"])
def test_a_damaged_cache_is_as_none(cached, damage):
    root, cache = cached
    expected = snapshot(root, cache).names
    (path,) = cache.iterdir()
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        path.write_bytes(data.replace(b"a/1.png", b"a/1.pmg"))  # fails the checksum
    elif damage == "pickle":
        np.savez(path, header=np.array([{"version": 1}], object), names=np.array([Path("x")], object))
    else:
        path.write_bytes(damage)
    assert snapshot(root, cache).names == expected


def test_a_cache_that_cannot_be_written_costs_nothing(cached):
    root, cache = cached
    cache.write_bytes(b"a file, not a folder")
    assert len(snapshot(root, cache).names) == 4


def test_names_that_are_not_utf8_survive_the_cache(cached):
    root, cache = cached
    Path(os.fsdecode(os.fsencode(root) + b"/a/caf\xe9.txt")).write_bytes(b"x")
    settle(root)
    assert snapshot(root, cache).names == snapshot(root, cache).names == scan(root).names
    assert unchanged(root, cache) is not None
    assert list_imagefolder(root, ALL, cache=cache).ignored == {".txt": 1}


def test_named_files_are_looked_up_once(cached, monkeypatch):
    root, cache = cached
    table = root.parent / "t.csv"
    table.write_text("path\na/1.png\nb/3.png\nb/4.png\nb/none.png\n")
    expected = list_table(root, table, None, cache)
    whole = snapshot(root, cache)  # the same folder, all of it: another entry
    assert len(whole.names) == 4 and unchanged(root, cache) is not None and unchanged(root, cache, table) is not None
    with monkeypatch.context() as patch:
        patch.setattr(snapshot_module, "look_up", lambda *_: pytest.fail("looked up again"))
        assert list_table(root, table, None, cache).digest() == expected.digest()
    make(root, "b/none.png")
    assert unchanged(root, cache, table) is None
    assert list_table(root, table, None, cache).size.tolist() == [7, 7, 7, 10]
    settle(root)
    list_table(root, table, None, cache)
    table.write_text("path\na/2.png\nb/3.png\nb/4.png\nb/none.png\n")  # no folder has changed
    assert ids(list_table(root, table, None, cache))[0] == "a/2.png"


def test_walking_is_fast(tmp_path):
    """A guard against a step that is not linear: 1.3 million files take seconds."""
    for folder in range(20):
        make(tmp_path, f"{folder:02d}/x.jpg")
        for i in range(200):
            os.link(tmp_path / f"{folder:02d}/x.jpg", tmp_path / f"{folder:02d}/{i}.jpg")
    started = time.process_time()
    listing = list_imagefolder(tmp_path, Share({"train": 0.8, "validation": 0.2}))
    slots(listing), listing.digest(), listing.record_digests()
    assert len(listing) == 4020
    assert time.process_time() - started < 1  # measured: 0.08 s


# Real data


@real_data
def test_real_data_sets():
    data = SHARED / "data"
    cifar = list_imagefolder(data / "cifar10", Folders())
    assert len(cifar) == 3000 and len(cifar.classes) == 10 and (cifar.split == "test").sum() == 1000
    samples = data / "imagenet_samples"
    imagenet = list_imagefolder(samples / "images", ALL, labels=samples / "labels.csv")
    assert imagenet.label.tolist() == list(range(0, 1000, 10)) and imagenet.classes[10] == "brambling"
    camvid = list_segmentation(data / "camvid/images", {"object": data / "camvid/labels"}, ALL)
    assert len(camvid) == 100 and not camvid.refused and not camvid.ignored
