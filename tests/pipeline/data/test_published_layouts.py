"""ImageNet and Places365 in miniature, in their true layouts, with torchvision's own classes as the oracle."""

import os
import pickle
import shutil
from pathlib import Path

import miniatures
import numpy as np
import pytest
import zarr
from experiments import run, segmentation
from miniatures import PLACES, SYNSETS, VALIDATION, old

from pipeline.data import kinds as datasets
from pipeline.data import torchvision_data
from pipeline.errors import MicrotomeError
from pipeline.run import experiment as run_experiment
from pipeline.run import planner

WNIDS = sorted(wnid for _, wnid, _, children in SYNSETS if not children)
NAMES = ["tench", "crane (n02012849)", "kit fox", "crane (n03126707)"]


@pytest.fixture
def published(monkeypatch) -> None:
    """The miniatures count as the published files."""
    from torchvision.datasets import CIFAR10, Places365, imagenet

    free = {name: (file, None) for name, (file, _) in imagenet.ARCHIVE_META.items()}
    monkeypatch.setattr(imagenet, "ARCHIVE_META", free)
    monkeypatch.setattr(Places365, "_CATEGORIES_META", (Places365._CATEGORIES_META[0], None))
    monkeypatch.setattr(
        Places365, "_FILE_LIST_META", {split: (file, None) for split, (file, _) in Places365._FILE_LIST_META.items()}
    )
    monkeypatch.setattr(CIFAR10, "train_list", [[name, None] for name, _ in CIFAR10.train_list])
    monkeypatch.setattr(CIFAR10, "test_list", [[name, None] for name, _ in CIFAR10.test_list])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": None})


def experiment(folder: Path, kind: str, **dataset):
    data = {"kind": kind, "root": str(folder / "d"), "verify": False, "shard_images": 4}
    return segmentation(folder) | {"datasets": {"photos": data | dataset}}


def listing(folder: Path, kind: str, **dataset):
    raw = run_experiment.parse(experiment(folder, kind, **dataset))
    return datasets.listing(raw.datasets["photos"], folder / "scratch")


# ImageNet


@pytest.mark.usefixtures("workers")
def test_imagenet_from_a_config_to_the_store(tmp_path):
    """In the process of its own, as it runs."""
    miniatures.imagenet_folders(tmp_path / "d")
    run(experiment(tmp_path, "imagenet", resize=16, crop=16), "ingest")
    group = zarr.open_group(tmp_path / "results/photos/images.zarr", mode="r", use_consolidated=False)
    assert group.attrs["classes"] == NAMES
    wnid_of = {number: wnid for number, wnid, _, _ in SYNSETS}
    label = dict(zip(group["image_id"][:].astype(object), group["label"][:].tolist(), strict=True))
    assert label == {
        f"val/{wnid_of[truth]}/ILSVRC2012_val_{at + 1:08d}.JPEG": WNIDS.index(wnid_of[truth])
        for at, truth in enumerate(VALIDATION)
    }
    assert group["valid"][:].all() and set(group["split"][:].tolist()) == {"validation"}
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["ILSVRC2012_devkit_t12.tar.gz", "val"]


def test_archives_are_unpacked_and_read_as_torchvision_does(tmp_path, in_process, published):
    from torchvision.datasets import ImageNet

    miniatures.imagenet_archives(tmp_path / "d")
    listed = listing(tmp_path, "imagenet", splits=["train", "validation"], unpack=True)
    assert len(listed) == 2 * len(WNIDS) + len(VALIDATION) and listed.classes == NAMES
    for split, folder in (("train", "train"), ("validation", "val")):
        oracle = ImageNet(str(tmp_path / "d"), folder)
        rows = np.flatnonzero(listed.split == split)
        ours = {str(listed.path(row)): int(listed.label[row]) for row in rows}
        assert ours == dict(oracle.samples) and len(ours) == len(rows)
        assert [words[0] for words in oracle.classes] == [name.partition(" (")[0] for name in NAMES]
    assert not list((tmp_path / "d").glob("*.partial"))
    # the oracle has written meta.bin, which is read in place of the devkit from now on
    (tmp_path / "d/ILSVRC2012_devkit_t12.tar.gz").unlink()
    again = listing(tmp_path, "imagenet", splits=["train", "validation"])
    assert again.digest() == listed.digest()


def test_torchvision_is_asked_once(tmp_path, in_process):
    miniatures.imagenet_folders(tmp_path / "d")
    first = listing(tmp_path, "imagenet")
    assert listing(tmp_path, "imagenet").digest() == first.digest() and len(in_process) == 1
    (tmp_path / "d/val" / WNIDS[0] / "new.JPEG").write_bytes(miniatures.jpeg(3))
    assert len(listing(tmp_path, "imagenet")) == len(first) + 1 and len(in_process) == 1
    miniatures.imagenet_devkit(tmp_path / "d")
    listing(tmp_path, "imagenet")
    assert len(in_process) == 2
    for kept in (tmp_path / "scratch/torchvision").iterdir():
        kept.write_text("{half")
    assert len(listing(tmp_path, "imagenet")) == len(first) + 1 and len(in_process) == 3


def test_fewer_classes_keep_the_numbers_of_the_devkit(tmp_path, in_process):
    miniatures.imagenet_folders(tmp_path / "d")
    shutil.rmtree(tmp_path / "d/val" / WNIDS[0])
    assert set(listing(tmp_path, "imagenet").label.tolist()) == {1, 2, 3}


def test_imagenets_that_are_refused(tmp_path, in_process):
    root = tmp_path / "d"

    def refused(message, **changes):
        with pytest.raises(MicrotomeError, match=message):
            listing(tmp_path, "imagenet", **changes)

    root.mkdir()
    refused(r"has neither meta.bin, which torchvision writes, nor ILSVRC2012_devkit_t12.tar.gz; put one of them there")
    miniatures.imagenet_folders(root)
    refused(r"archive ILSVRC2012_devkit_t12.tar.gz is not present in the root directory or is corrupted", verify=True)
    refused(
        r"has no folder 'train' with the train images; unpack its archive there, or .* `unpack: true`", splits=["train"]
    )
    (root / "val/tench").mkdir()
    refused("folder 'tench' in .*val is not a WordNet id of the devkit")
    (root / "val/tench").rename(root / "val/n0144076")
    refused("folder 'n0144076' in .* is not a WordNet id of the devkit; nearest: n01440764")
    (root / "val/n0144076").rmdir()
    (root / "val/ILSVRC2012_val_00000009.JPEG").write_bytes(miniatures.jpeg(1))
    refused(r"1 images in .*val lie beside class folders, the first is 'ILSVRC2012_val_00000009.JPEG'; expected")
    (root / "val/ILSVRC2012_val_00000009.JPEG").unlink()
    for path in (root / "val" / WNIDS[0]).iterdir():
        path.unlink()
    refused(f"1 class folders in .* have no images, the first is {WNIDS[0]!r}; was unpacking cut short")
    (root / "train.partial").mkdir()
    refused(r"train.partial is left from an interrupted unpacking: remove it", splits=["train"], unpack=True)
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    refused(r"torchvision cannot read .*: ReadError")
    (root / "meta.bin").write_bytes(b"no meta")
    refused("torchvision cannot read .*: UnpicklingError")


def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    miniatures.imagenet_devkit(tmp_path / "d", extra=("../../evil",))
    with pytest.raises(MicrotomeError, match=r"torchvision cannot read .*: OutsideDestinationError"):
        listing(tmp_path, "imagenet")
    assert not list(tmp_path.rglob("evil"))


def test_meta_data_that_would_run_is_refused(tmp_path, in_process):
    miniatures.imagenet_folders(tmp_path / "d")

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "d/meta.bin").write_bytes(pickle.dumps(Runs(), 2))
    with pytest.raises(MicrotomeError, match=r"torchvision cannot read .*: UnpicklingError"):
        listing(tmp_path, "imagenet")
    assert not (tmp_path / "ran").exists()


# Places365


@pytest.mark.usefixtures("workers")
def test_places365_from_a_config_to_the_store(tmp_path, in_process):
    miniatures.places365(tmp_path / "d")
    (tmp_path / "d/val_256/Places365_val_00000003.jpg").unlink()  # listed, and not there
    raw = experiment(tmp_path, "places365", resize={"squash": [16, 16]}, max_bad_fraction=0.2)
    run(raw, "ingest")
    group = zarr.open_group(tmp_path / "results/photos/images.zarr", mode="r", use_consolidated=False)
    assert group.attrs["classes"] == ["airfield", "apartment_building/outdoor", "beach", "zen_garden"]
    ids = group["image_id"][:].astype(object).tolist()
    assert sorted(ids) == [f"val_256/Places365_val_{n + 1:08d}.jpg" for n in range(6)]
    valid = dict(zip(ids, group["valid"][:].tolist(), strict=True))
    assert [name for name, good in valid.items() if not good] == ["val_256/Places365_val_00000003.jpg"]
    assert "no such file" in (tmp_path / "results/photos/quarantine.csv").read_text()
    label = dict(zip(ids, group["label"][:].tolist(), strict=True))
    assert [label[name] for name in sorted(ids)] == [(3 * n) % len(PLACES) for n in range(6)]


def test_every_split_of_places365_is_read_as_torchvision_does(tmp_path, in_process, published):
    from torchvision.datasets import Places365

    root = tmp_path / "d"
    miniatures.places365(root)
    (root / "test_256").mkdir()
    (root / "data_256_challenge").mkdir()
    splits = ["train", "train-challenge", "validation", "test"]
    listed = listing(tmp_path, "places365", splits=splits, verify=True)
    assert sorted(listed.image_id.tolist()) == listed.image_id.tolist()
    for split in splits:
        oracle = Places365(str(root), torchvision_data.PLACES365_SPLITS[split], small=True)
        rows = np.flatnonzero(listed.split == split)
        ours = {str(listed.path(row)): int(listed.label[row]) for row in rows}
        assert ours == {path: -1 if label is None else label for path, label in oracle.imgs}
        assert len(ours) == len(oracle) and [name[3:] for name in oracle.classes] == listed.classes
    assert (listed.size[listed.split == "validation"] > 0).all() and (listed.size[listed.split == "test"] == -1).all()


def test_places365s_that_are_refused(tmp_path, in_process):
    root = tmp_path / "d"

    def refused(message, **changes):
        with pytest.raises(MicrotomeError, match=message):
            listing(tmp_path, "places365", **changes)

    root.mkdir()
    refused(r"categories_places365.txt does not exist or is corrupted. Give .* `download: true`", verify=True)
    miniatures.places365(root)
    refused(r"categories_places365.txt does not exist or is corrupted. Give .* or `verify: false`", verify=True)
    refused(r"has no folder 'val_large' with the validation images; .* `small: true for those of", small=False)
    refused(r"has no folder 'test_256' with the test images", splits=["test"])
    val = root / "places365_val.txt"
    val.write_text("../../../etc/passwd 0\n")
    refused(r"has the path 'val_256/\.\./\.\./\.\./etc/passwd'; expected one below it")
    val.write_text("Places365_val_00000001.jpg 4\n")
    refused(r"have the label 4; .*categories_places365.txt has 4 classes")
    val.write_text("Places365_val_00000001.jpg 1\n" * 2)
    refused(r"have 'val_256/Places365_val_00000001.jpg' twice")
    val.write_text("Places365_val_00000001.jpg one\n")
    refused(r"torchvision cannot read .*: ValueError: invalid literal")
    (root / "categories_places365.txt").write_text("/a/airfield 1\n")
    val.write_text("Places365_val_00000001.jpg 1\n")
    refused("does not number its classes from 0 on")


# What is downloaded


@pytest.mark.parametrize("kind", ["places365", "cifar10"])
def test_nothing_is_downloaded_unless_asked(tmp_path, in_process, monkeypatch, kind):
    got: list[str] = []

    def download(url, root, **_):
        got.append(url)
        if kind == "cifar10":
            miniatures.cifar10(Path(root))
        elif "filelist" in url:
            miniatures.places365(Path(root))
            shutil.rmtree(Path(root, "val_256"))
        else:
            Path(root, "val_256").mkdir()

    monkeypatch.setattr("torchvision.datasets.utils.download_and_extract_archive", download)
    monkeypatch.setattr("torchvision.datasets.places365.download_and_extract_archive", download)
    for wanted in (False, True):
        with pytest.raises(MicrotomeError, match="`download: true`"):
            listing(tmp_path, kind, verify=wanted, root=str(tmp_path / "absent"))
    assert not got and not (tmp_path / "absent").exists()
    assert len(listing(tmp_path, kind, download=True)) > 0
    assert len(got) == (1 if kind == "cifar10" else 2)
    requests = len(in_process)
    listing(tmp_path, kind, download=True)
    assert len(in_process) == requests  # what was downloaded is known


def test_batches_that_are_not_the_published_ones(tmp_path, in_process, published, monkeypatch):
    from torchvision.datasets import CIFAR10

    miniatures.cifar10(tmp_path / "d")
    assert len(listing(tmp_path, "cifar10", verify=True)) == 24
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", "40351d587109b95175f43aff81a1287e"]])
    old(tmp_path / "d")  # another time: they are compared again
    with pytest.raises(MicrotomeError, match=r"not the published files \(by their md5\): test_batch\."):
        listing(tmp_path, "cifar10", verify=True)
    assert len(listing(tmp_path, "cifar10", verify=True, splits=["train"])) == 20


def test_a_start_asks_neither_torchvision_nor_the_files(tmp_path, in_process, monkeypatch):
    miniatures.cifar10(tmp_path / "d")
    old(tmp_path / "d")
    raw = run_experiment.parse(experiment(tmp_path, "cifar10", verify=False, dissect={"split": "test"}))
    first = planner.make(raw)
    monkeypatch.setattr(datasets, "listing", lambda *_, **__: pytest.fail("listed again"))
    assert list(planner.make(raw).steps) == list(first.steps)
    (tmp_path / "d/cifar-10-batches-py/data_batch_2").touch()
    with pytest.raises(pytest.fail.Exception, match="listed again"):
        planner.make(raw)
