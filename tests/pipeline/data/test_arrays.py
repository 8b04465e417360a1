"""Images in arrays: npz files and the batches of CIFAR-10; what is in them is data, never a program."""

import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path

import miniatures
import numpy as np
import pytest
import zarr
from experiments import run, segmentation
from PIL import Image

from pipeline.data import arrays, plain_pickle
from pipeline.data.arrays import cifar10_batch, list_cifar10, list_npz, member, npz_image, values
from pipeline.data.plain_pickle import NotPlainError, read_dict
from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner

GREY = np.random.default_rng(1).integers(0, 256, (7, 8, 6), np.uint8)
COLOUR = np.random.default_rng(2).integers(0, 256, (7, 8, 6, 3), np.uint8)
LABELS = np.array([3, 0, 1, -1, 2, 2, 0])


def experiment(folder: Path, **dataset):
    return segmentation(folder) | {"datasets": {"digits": {"shard_images": 4} | dataset}}


def stored(folder: Path) -> zarr.Group:
    return zarr.open_group(folder / "results/digits/images.zarr", mode="r", use_consolidated=False)


# npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (GREY, np.repeat(GREY[:, None], 3, 1)),
        (GREY[:, None], np.repeat(GREY[:, None], 3, 1)),
        (COLOUR, COLOUR.transpose(0, 3, 1, 2)),
        (COLOUR.transpose(0, 3, 1, 2), COLOUR.transpose(0, 3, 1, 2)),
        (np.asfortranarray(COLOUR), COLOUR.transpose(0, 3, 1, 2)),
    ],
)
def test_every_layout_gives_rgb(tmp_path, save, images, expected):
    save(tmp_path / "a.npz", x=images, y=LABELS)
    assert arrays.image_size(member(tmp_path / "a.npz", "x")) == (8, 6)
    found = np.stack([npz_image(tmp_path / "a.npz", "x", index) for index in range(7)])
    np.testing.assert_array_equal(found, expected)


def test_what_is_not_compressed_is_mapped(tmp_path):
    np.savez(tmp_path / "a.npz", other=np.arange(5), x=GREY)
    np.savez_compressed(tmp_path / "b.npz", x=GREY)
    assert isinstance(values(member(tmp_path / "a.npz", "x")), np.memmap)
    assert not isinstance(values(member(tmp_path / "b.npz", "x")), np.memmap)


@pytest.mark.usefixtures("workers")
def test_an_npz_from_a_config_to_the_store(tmp_path):
    split = np.array(["train", "val", "val", "train", "val", "val", "train"])
    np.savez(tmp_path / "a.npz", pictures=GREY, kind=LABELS[:, None], split=split)
    raw = experiment(
        tmp_path, kind="npz", file=str(tmp_path / "a.npz"), x="pictures", y="kind", classes=["a", "b", "c", "d"]
    )
    run(raw, "ingest")
    group = stored(tmp_path)
    ids = group["image_id"][:].astype(object).tolist()
    assert sorted(ids) == [f"{n:07d}" for n in range(7)] and group.attrs["classes"] == ["a", "b", "c", "d"]
    for slot, name in enumerate(ids):
        index = int(name)
        np.testing.assert_array_equal(group["image"][slot], np.repeat(GREY[index][None], 3, 0))
        assert group["label"][slot] == LABELS[index]
        assert group["split"][slot] == {"train": "train", "val": "validation"}[split[index]]
    assert group["valid"][:].all()


@pytest.mark.usefixtures("workers")
def test_a_file_for_each_split_and_a_resize(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=COLOUR[:4], y_train=[0, 1, 2, 1], x_test=COLOUR[4:], y_test=[1, 1, 0])
    files = dict.fromkeys(("train", "test"), str(tmp_path / "a.npz"))
    raw = experiment(
        tmp_path, kind="npz", file=files, x="x_{split}", y="y_{split}", resize=12, crop=10, dissect={"split": "test"}
    )
    run(raw, "ingest")
    group = stored(tmp_path)
    assert group["image"].shape == (7, 3, 10, 10) and group.attrs["classes"] == ["0", "1", "2"]
    at = group["image_id"][:].astype(object).tolist().index("test/0000002")
    resized = np.asarray(Image.fromarray(COLOUR[6]).resize((12, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(group["image"][at], resized[3:13, 1:11].transpose(2, 0, 1))
    assert (group["split"][at], group["label"][at]) == ("test", 0)


def test_ids_of_a_file_for_each_split(tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY, y=LABELS)
    listing = list_npz({"train": tmp_path / "a.npz", "a": tmp_path / "a.npz"}, "x", None, None)
    assert listing.image_id.tolist() == [f"{split}/{n:07d}" for split in ("a", "train") for n in range(7)]
    assert listing.classes == [] and set(listing.label) == {-1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": GREY}, r"has the arrays x; expected 'y'"),
        ({"images": GREY, "y": LABELS}, r"has the arrays images, y; expected 'x'"),
        ({"x": GREY / 255, "y": LABELS}, r"type float64 and shape \(7, 8, 6\); expected uint8 of shape"),
        ({"x": GREY.reshape(7, -1), "y": LABELS}, r"shape \(7, 48\); expected"),
        ({"x": GREY[:0], "y": LABELS[:0]}, r"shape \(0, 8, 6\); expected"),
        ({"x": np.zeros((2, 3, 9, 3), np.uint8), "y": [0, 1]}, "may have its channels first or last"),
        ({"x": np.zeros((2, 9, 9, 4), np.uint8), "y": [0, 1]}, r"shape \(2, 9, 9, 4\); expected"),
        ({"x": GREY, "y": LABELS[:6]}, r"'y' has type int64 and shape \(6,\); expected 7 whole numbers"),
        ({"x": GREY, "y": LABELS / 2}, "'y' has type float64"),
        ({"x": GREY, "y": LABELS - 1}, "label -2 of image 3; expected 0 to 999,999, -1 for none"),
        ({"x": GREY, "y": LABELS, "split": np.arange(7)}, "'split' has type int64"),
        ({"x": GREY, "y": LABELS, "split": np.array(["../x"] * 7)}, "has the split '../x'; expected letters"),
        ({"x": np.array([{}] * 7), "y": LABELS}, "'x' holds Python objects, which are not read"),
    ],
)
def test_arrays_that_are_refused(tmp_path, content, message):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(MicrotomeError, match=message):
        list_npz(tmp_path / "a.npz", "x", "y", None)


def test_labels_need_names_for_all(tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY, y=LABELS)
    with pytest.raises(MicrotomeError, match="has the label 3, but 2 classes are named"):
        list_npz(tmp_path / "a.npz", "x", "y", ["a", "b"])


def npy(array: np.ndarray, shape: str | None = None) -> bytes:
    data = io.BytesIO()
    np.save(data, array)
    return data.getvalue() if shape is None else data.getvalue().replace(b"(7, 8, 6), }", shape.encode())


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("shape", ["(9999999,8,6)}", "(-7,-8,6), } ", "(7, 8, 5), }"])
def test_a_header_that_does_not_fit_its_bytes(tmp_path, shape, compression):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", compression) as archive:
        archive.writestr("x.npy", npy(GREY, shape))
    with pytest.raises(MicrotomeError, match=r"does not have the bytes for it|is not an npz"):
        list_npz(tmp_path / "a.npz", "x", None, None)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found_when_listing(tmp_path, save):
    save(tmp_path / "a.npz", x=np.random.default_rng(0).integers(0, 256, (40, 64, 64), np.uint8))
    data = bytearray((tmp_path / "a.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(MicrotomeError, match="array 'x' is damaged"):
        list_npz(tmp_path / "a.npz", "x", None, None)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 and no more"])
def test_files_that_are_no_npz(tmp_path, content):
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(MicrotomeError, match="is not an npz file of numpy"):
        list_npz(tmp_path / "a.npz", "x", "y", None)
    with pytest.raises(MicrotomeError, match=r"cannot read .*none.npz: No such file"):
        list_npz(tmp_path / "none.npz", "x", "y", None)


def test_a_large_compressed_array_is_refused(tmp_path, monkeypatch):
    np.savez_compressed(tmp_path / "a.npz", x=GREY)
    monkeypatch.setattr(arrays, "MOST_LOADED", 300)
    with pytest.raises(MicrotomeError, match=r"too large for every worker to hold .* save it with numpy.savez"):
        list_npz(tmp_path / "a.npz", "x", None, None)
    np.savez(tmp_path / "a.npz", x=GREY)
    assert len(list_npz(tmp_path / "a.npz", "x", None, None)) == 7


def test_headers_that_unpack_to_gigabytes_are_refused_unread(tmp_path):
    """A header of 4 GB of zeros, and a text with room for a gigabyte: both are kilobytes on the disk."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x02\x00" + (4_000_000_000).to_bytes(4, "little") + bytes(5_000_000))
    tracemalloc.start()
    with pytest.raises(MicrotomeError, match="is not an npz file of numpy"):
        member(tmp_path / "a.npz", "x")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    split = np.full(7, "train", "<U2000")
    np.savez_compressed(tmp_path / "b.npz", x=GREY, split=split)
    with pytest.raises(MicrotomeError, match=r"'split' has room for 2,000 characters in each text"):
        list_npz(tmp_path / "b.npz", "x", None, None)
    np.savez_compressed(tmp_path / "b.npz", x=GREY, split=split.astype("<U200"))
    assert list_npz(tmp_path / "b.npz", "x", None, None).splits() == {"train": 7}


def test_a_split_that_is_not_there_is_said_before_any_work(tmp_path):
    np.savez(tmp_path / "a.npz", x=GREY, y=LABELS)
    raw = experiment(tmp_path, kind="npz", file={"test": str(tmp_path / "a.npz")})
    with pytest.raises(MicrotomeError, match=r"data set 'digits' has no split 'validation'; it has test \(7 images\)"):
        planner.make(run_experiment.parse(raw))


# CIFAR-10


@pytest.mark.parametrize("protocol", range(6))
def test_batches_are_read_as_torchvision_does(tmp_path, protocol, monkeypatch):
    """With torchvision's own class as the oracle, which unpickles."""
    from torchvision.datasets import CIFAR10

    miniatures.cifar10(tmp_path, protocol=protocol)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    listing = list_cifar10(tmp_path, ["train", "test"])
    assert len(listing) == 24
    for split in ("train", "test"):
        oracle = CIFAR10(str(tmp_path), train=split == "train")
        rows = np.flatnonzero(listing.split == split)
        assert listing.label[rows].tolist() == oracle.targets and listing.classes == oracle.classes
        for row in rows:
            _, _, index = str(listing.image_id[row]).partition("/")
            pixels = arrays.cifar10_image(tmp_path, split, int(index))
            np.testing.assert_array_equal(pixels.transpose(1, 2, 0), oracle.data[int(index)])


def test_names_are_those_of_torchvision():
    from torchvision.datasets import CIFAR10

    assert CIFAR10.base_folder == arrays.CIFAR10_FOLDER
    assert [name for name, _ in CIFAR10.train_list] == list(arrays.CIFAR10_BATCHES["train"])
    assert [name for name, _ in CIFAR10.test_list] == list(arrays.CIFAR10_BATCHES["test"])
    assert CIFAR10.meta["filename"] == arrays.CIFAR10_META


@pytest.mark.usefixtures("workers")
def test_cifar10_from_a_config_to_the_store(tmp_path):
    miniatures.cifar10(tmp_path / "d")
    raw = experiment(
        tmp_path, kind="cifar10", root=str(tmp_path / "d"), verify=False, dissect={"split": "test"}, resize=16
    )
    run(raw, "ingest")
    group = stored(tmp_path)
    assert group["image"].shape == (24, 3, 16, 16) and group.attrs["classes"] == miniatures.CIFAR10_CLASSES
    at = group["image_id"][:].astype(object).tolist().index("train/0000005")
    images, labels = cifar10_batch(tmp_path / "d/cifar-10-batches-py/data_batch_2")
    expected = Image.fromarray(images[1].transpose(1, 2, 0)).resize((16, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(group["image"][at], np.asarray(expected).transpose(2, 0, 1))
    assert group["label"][at] == labels[1]


class Runs:
    """A pickle that does something when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("where", ["data", "labels", "elsewhere"])
def test_a_malicious_batch_is_refused_and_nothing_runs(tmp_path, protocol, where):
    mark = tmp_path / "ran"
    miniatures.cifar10(tmp_path)
    batch = {"data": np.zeros((1, 3072), np.uint8), "labels": [0]} | {where: Runs(os.system, f"touch {mark}")}
    path = tmp_path / "cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps(batch, protocol))
    with pytest.raises(NotPlainError, match=rf"{path}: it names (posix|nt)\.system, .* nothing was run"):
        list_cifar10(tmp_path, ["test"])
    assert not mark.exists()
    pickle.loads(path.read_bytes())  # what it would have done
    assert mark.exists()


HOSTILE = {
    "eval": pickle.dumps(Runs(eval, "1 + 1")),
    "an import by attribute": b"\x80\x04\x8c\x08builtins\x8c\x0cgetattr\x93.",
    "a name behind a dot": b"\x80\x04\x8c\x05numpy\x8c\x0bf2py.crackfortran\x93.",
    "an extension number": b"\x80\x02\x82\x01.",
    "an object of a class": b"\x80\x02cnumpy\nndarray\n)\x81.",
    "an instance": b"(iposix\nsystem\n.",
    "a memo of gigabytes": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "the state of a name": b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.",
    "a call of ndarray": b"\x80\x02cnumpy\nndarray\n(K\x03tR.",
    "an array that is larger than its bytes": pickle.dumps(np.zeros(9, np.uint8)).replace(b"K\t", b"K\x7f"),
    "objects in an array": pickle.dumps(np.array([{}, 1], object)),
    "a structured type": pickle.dumps(np.zeros(2, [("a", "u1"), ("b", "O")])),
    "floats": pickle.dumps({"data": np.zeros(3)}),
    "a persistent id": b"\x80\x02K\x01Q.",
    "a long text that is not there": b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x0f.",
    "no stop": b"\x80\x02}",
    "nothing": b"",
    "text": b"not a pickle",
    "a list": pickle.dumps([1]),
    "keys that are no text": pickle.dumps({1: 2}),
    "a list in itself": b"\x80\x04]\x94h\x00a.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(tmp_path, name):
    (tmp_path / "p").write_bytes(HOSTILE[name])
    with pytest.raises(NotPlainError):
        read_dict(tmp_path / "p")


def test_pickles_that_are_too_large_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(plain_pickle, "MOST_BYTES", 100)
    (tmp_path / "p").write_bytes(pickle.dumps({"data": bytes(200)}))
    with pytest.raises(NotPlainError, match="has more than 100 bytes"):
        read_dict(tmp_path / "p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((2, 3071), np.uint8)}, r"data has shape \(2, 3071\); expected \(n, 3072\)"),
        ({"data": b"x" * 6144}, r"data has shape None"),
        ({"labels": [0]}, "labels are not 2 whole numbers"),
        ({"labels": [0, "1"]}, "labels are not 2 whole numbers"),
        ({"labels": [0, -1]}, "labels are not 2 whole numbers"),
        ({"labels": [0, 10]}, "has the label 10; expected 0 to 9"),
    ],
)
def test_batches_with_other_things_in_them(tmp_path, change, message):
    miniatures.cifar10(tmp_path)
    batch = {"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1]} | change
    (tmp_path / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(batch))
    with pytest.raises(MicrotomeError, match=message):
        list_cifar10(tmp_path, ["test"])


def test_a_missing_batch_is_named(tmp_path):
    miniatures.cifar10(tmp_path)
    (tmp_path / "cifar-10-batches-py/data_batch_3").unlink()
    with pytest.raises(MicrotomeError, match=r"cannot read .*data_batch_3: No such file"):
        list_cifar10(tmp_path, ["train"])
    assert len(list_cifar10(tmp_path, ["test"])) == 4
