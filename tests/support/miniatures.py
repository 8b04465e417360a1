"""Miniatures of ImageNet, Places365 and CIFAR-10, laid out as their publishers do."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

DEVKIT = "ILSVRC2012_devkit_t12"
# WordNet id, ILSVRC id, words: as in meta.mat, not in the order of the WordNet ids; a node with children is no class
SYNSETS = [
    (1, "n02119789", "kit fox, Vulpes macrotis", 0),
    (2, "n02012849", "crane", 0),
    (3, "n01440764", "tench, Tinca tinca", 0),
    (4, "n03126707", "crane", 0),
    (5, "n00001740", "entity", 2),
]
VALIDATION = [3, 1, 2, 4, 3, 1]  # ILSVRC id of each validation image, in the order of their numbers
PLACES = ["/a/airfield", "/a/apartment_building/outdoor", "/b/beach", "/z/zen_garden"]


def jpeg(seed: int, size: tuple[int, int] = (24, 20)) -> bytes:
    """A JPEG of (width, height) in one colour that tells `seed`."""
    data = io.BytesIO()
    Image.new("RGB", size, (10 * seed % 256, 90, 255 - 10 * seed % 256)).save(data, "JPEG")
    return data.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def imagenet_devkit(root: Path, extra: tuple[str, ...] = ()) -> None:
    """Write the archive of the devkit; `extra` members are added to it."""
    import scipy.io

    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    synsets = np.zeros((len(SYNSETS), 1), dtype=[(field, object) for field in fields])
    for at, (number, wnid, words, children) in enumerate(SYNSETS):
        synsets[at, 0] = (number, wnid, words, "a gloss", children, np.arange(1, children + 1), 0)
    mat = io.BytesIO()
    scipy.io.savemat(mat, {"synsets": synsets})
    root.mkdir(parents=True, exist_ok=True)
    with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        add(archive, f"{DEVKIT}/data/meta.mat", mat.getvalue())
        truth = "".join(f"{number}\n" for number in VALIDATION)
        add(archive, f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())
        for name in extra:
            add(archive, name, b"hostile")


def imagenet_archives(root: Path) -> None:
    """Write the devkit and the archives of images, as they are downloaded."""
    imagenet_devkit(root)
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for number in range(len(VALIDATION)):
            add(archive, f"ILSVRC2012_val_{number + 1:08d}.JPEG", jpeg(number))
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as archive:
        for wnid in sorted(wnid for _, wnid, _, children in SYNSETS if not children):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for number in range(2):
                    add(images, f"{wnid}_{number}.JPEG", jpeg(number))
            add(archive, f"{wnid}.tar", inner.getvalue())


def imagenet_folders(root: Path) -> None:
    """Write the devkit and val/<WordNet id>/, as torchvision unpacks them."""
    imagenet_devkit(root)
    wnid_of = {number: wnid for number, wnid, _, _ in SYNSETS}
    for number, truth in enumerate(VALIDATION):
        path = root / "val" / wnid_of[truth] / f"ILSVRC2012_val_{number + 1:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number))


def places365(root: Path) -> None:
    """Write the lists of all splits, and the small images of validation and training."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "categories_places365.txt").write_text("".join(f"{name} {at}\n" for at, name in enumerate(PLACES)))
    validation = [(f"Places365_val_{n + 1:08d}.jpg", (3 * n) % len(PLACES)) for n in range(6)]
    train = [(f"{name}/{n + 1:08d}.jpg", at) for at, name in enumerate(PLACES) for n in range(2)]
    for split, images in (("val", validation), ("train_standard", train), ("train_challenge", train)):
        (root / f"places365_{split}.txt").write_text("".join(f"{image} {label}\n" for image, label in images))
    (root / "places365_test.txt").write_text("Places365_test_00000001.jpg\nPlaces365_test_00000002.jpg\n")
    for folder, images in (("val_256", validation), ("data_256_standard", train)):
        for at, (image, _) in enumerate(images):
            path = root / folder / image.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg(at))


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar10(root: Path, per_batch: int = 4, protocol: int = 2) -> None:
    """Write the batches of CIFAR-10 with a few images each."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        batch = {
            "batch_label": name,
            "labels": [int(label) for label in rng.integers(0, 10, per_batch)],
            "data": rng.integers(0, 256, (per_batch, 3072), np.uint8),
            "filenames": [f"{n}.png" for n in range(per_batch)],
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    meta = {"num_cases_per_batch": per_batch, "label_names": CIFAR10_CLASSES, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol))


def old(*paths: Path) -> None:
    """Give files and the folders they lie in a time long past, so that nothing doubts that they are settled."""
    for path in paths:
        for each in [path, *(path.rglob("*") if path.is_dir() else ())]:
            os.utime(each, ns=(10**18, 10**18))
