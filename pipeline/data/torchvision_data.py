"""File lists, metadata, checksums and downloads of torchvision's data set classes.

Importing torchvision takes seconds, so it runs in a separate process. Its answer is cached until one of the files that
it read changes, and a later start reads a small file.

    python -m pipeline.data.torchvision_data request.json answer.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.data.snapshot import stamp
from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import digest
from pipeline.workers.processes import in_own_process

VERSION = 1
PLACES365_SPLITS = {
    "train": "train-standard",
    "train-challenge": "train-challenge",
    "validation": "val",
    "test": "test",
}
IMAGENET_FOLDERS = {"train": "train", "validation": "val"}
IMAGENET_META = "meta.bin"
IMAGENET_DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


def ask(request: Mapping[str, Any], files: Sequence[Path], scratch: Path) -> dict[str, Any]:
    """Return torchvision's answer to a request, from `scratch` unless one of `files` has changed.

    Raises `MicrotomeError` with what torchvision found wrong.
    """
    kept = _kept(request, files, scratch)
    try:
        return json.loads(kept.read_bytes())
    except (OSError, ValueError):
        pass  # never asked, or half a file
    print(f"asking torchvision about {request['root']}", file=sys.stderr)
    found = in_own_process("pipeline.data.torchvision_data", dict(request), f"torchvision, on {request['root']},")
    if "error" in found:
        raise MicrotomeError(found["error"])
    # A download changes the files, and with them the name of the cached answer.
    write_atomically(_kept(request, files, scratch), json.dumps(found["result"]))
    return found["result"]


def _kept(request: Mapping[str, Any], files: Sequence[Path], scratch: Path) -> Path:
    stamps = [stamp(path) for path in files]
    return scratch / "torchvision" / f"{digest([VERSION, dict(request), stamps])}.json"


# In the process of its own --------------------------------------------------------------------------------------------


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the `result` of a request, or the `error` to show."""
    kinds: dict[str, Callable[..., dict[str, Any]]] = {"imagenet": imagenet, "places365": places365, "cifar10": cifar10}
    arguments = dict(request)
    function = kinds[arguments.pop("kind")]
    try:
        with _safe_archives():
            return {"result": function(**arguments)}
    except MicrotomeError as error:
        return {"error": str(error)}
    except Exception as error:  # with damaged files, torchvision raises nearly every type of error
        return {"error": f"torchvision cannot read {request['root']}: {type(error).__name__}: {error}"}


@contextlib.contextmanager
def _safe_archives() -> Iterator[None]:
    """Unpack archives with Python's `data` filter: a member that leads out of the folder is an error."""
    before = tarfile.TarFile.__dict__.get("extraction_filter")
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del tarfile.TarFile.extraction_filter
        else:
            tarfile.TarFile.extraction_filter = before


def imagenet(root: str, splits: list[str], verify: bool, unpack: bool) -> dict[str, Any]:
    """Return words by WordNet id, in torchvision's order of classes: from meta.bin, or from the devkit's archive.

    unpack: let torchvision unpack the archives of the wanted splits whose folders are missing. Nothing else is written
        below the root.
    """
    from torchvision.datasets import imagenet as known

    published = known.ARCHIVE_META
    try:
        if not verify:
            known.ARCHIVE_META = {name: (file, None) for name, (file, _) in published.items()}
        words, validation = _imagenet_meta(known, root)
        if unpack:
            for split in splits:
                _unpack_imagenet(known, root, split, validation)
    finally:
        known.ARCHIVE_META = published
    return {"words": {str(wnid): [str(word) for word in words[wnid]] for wnid in sorted(words)}}


def _imagenet_meta(known: Any, root: str) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """Return words by WordNet id, and the WordNet id of each validation image."""
    with tempfile.TemporaryDirectory() as folder:
        meta = root
        if not Path(root, known.META_FILE).exists():
            archive = Path(root, known.ARCHIVE_META["devkit"][0])
            if not archive.exists():
                raise MicrotomeError(
                    f"{root} has neither {known.META_FILE}, which torchvision writes, nor {archive.name}; put one of "
                    "them there"
                )
            meta = folder
            Path(folder, archive.name).symlink_to(archive.absolute())
            known.parse_devkit_archive(folder)
        return known.load_meta_file(meta)


def _unpack_imagenet(known: Any, root: str, split: str, validation: list[str]) -> None:
    folder = IMAGENET_FOLDERS[split]
    if Path(root, folder).exists():
        return
    # Unpack under another name until complete: an existing folder counts as unpacked.
    partial = f"{folder}.partial"
    if Path(root, partial).exists():
        raise MicrotomeError(f"{root}/{partial} is left from an interrupted unpacking: remove it and run again")
    if split == "train":
        known.parse_train_archive(root, folder=partial)
    else:
        known.parse_val_archive(root, wnids=validation, folder=partial)
    Path(root, partial).rename(Path(root, folder))


def places365(root: str, splits: list[str], small: bool, verify: bool, download: bool) -> dict[str, Any]:
    """Return class names by number and, for each split, the images below the root with their labels, -1 for none."""
    from torchvision.datasets import Places365

    class Unverified(Places365):
        _CATEGORIES_META = (Places365._CATEGORIES_META[0], None)
        _FILE_LIST_META = {split: (file, None) for split, (file, _) in Places365._FILE_LIST_META.items()}  # noqa: RUF012

    numbers: dict[str, int] = {}
    found = {}
    for split in splits:
        try:
            data = (Places365 if verify else Unverified)(root, PLACES365_SPLITS[split], small, download)
        except RuntimeError as error:
            said = str(error).replace("You can set download=True to download it.", "").strip()
            raise MicrotomeError(
                f"{said} Give the data set `download: true` to have torchvision get what is missing, or "
                "`verify: false` if the lists are not the published ones"
            ) from error
        numbers = data.class_to_idx
        images = [path.removeprefix(os.path.join(root, "")) for path, _ in data.imgs]  # noqa: PTH118 - as torchvision does
        found[split] = {"images": images, "labels": [-1 if label is None else label for label in data.targets]}
    if sorted(numbers.values()) != list(range(len(numbers))):
        raise MicrotomeError(f"{root}/{Places365._CATEGORIES_META[0]} does not number its classes from 0 on")
    return {"classes": sorted(numbers, key=numbers.__getitem__), "splits": found}


def cifar10(root: str, files: list[str], verify: bool, download: bool) -> dict[str, Any]:
    """Raise `MicrotomeError` unless all files exist and are the published ones (`verify`); return an empty dict."""
    from torchvision.datasets import CIFAR10, utils

    published = {file: md5 for file, md5 in (*CIFAR10.train_list, *CIFAR10.test_list)}  # noqa: C416 - of lists
    published[CIFAR10.meta["filename"]] = CIFAR10.meta["md5"]
    folder = Path(root, CIFAR10.base_folder)

    def wrong() -> list[str]:
        return [name for name in files if not utils.check_integrity(folder / name, published[name] if verify else None)]

    if download and wrong():
        utils.download_and_extract_archive(CIFAR10.url, root, filename=CIFAR10.filename, md5=CIFAR10.tgz_md5)
    if wrong():
        raise MicrotomeError(
            f"{folder}: not the published files (by their md5): {', '.join(wrong())}. Give the data set "
            "`download: true` to have torchvision get them, or `verify: false` for batches of your own"
        )
    return {}


def main(request: str, answered: str) -> None:
    """Read one request and write its answer."""
    Path(answered).write_text(json.dumps(answer(json.loads(Path(request).read_text()))))


if __name__ == "__main__":
    main(*sys.argv[1:])
