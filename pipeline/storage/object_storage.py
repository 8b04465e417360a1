"""Stores on object storage: chunk files in a bucket, metadata both there and in the results folder.

With `stores: s3://bucket/prefix` in the configuration, the results folder holds a file that names this location, the
ledgers, the manifests, and the `zarr.json` files of every store. Chunk files become objects, under the path that they
would have in the results folder. The `zarr.json` files are copied there too, so that other programs can open
`s3://bucket/prefix/<data set>/images.zarr` directly. A PUT is atomic, like a rename.

Credentials and endpoint come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...) and are never written.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import crc32c

NAME = "microtome-stores.json"
URL = re.compile(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(/(?P<prefix>[^?#\s]*))?")
RETRIES: Any = {"max_retries": 6, "retry_timeout": timedelta(seconds=60)}


@dataclass(frozen=True)
class Objects:
    """The objects of one store or folder: those whose keys begin with `prefix` and a slash."""

    url: str
    prefix: str

    def get(self, key: str) -> bytes:
        """Return the bytes of an object. Raises `FileNotFoundError` if it does not exist."""
        import obstore

        with told(self.url, missing=key):
            return bytes(obstore.get(bucket(self.url), self._key(key)).bytes())

    def put(self, key: str, data: bytes) -> None:
        import obstore

        with told(self.url):
            obstore.put(bucket(self.url), self._key(key), data)

    def sizes(self) -> dict[str, int]:
        """Return the size of every object in bytes, by key."""
        import obstore

        found: dict[str, int] = {}
        with told(self.url):
            for part in obstore.list(bucket(self.url), f"{self.prefix}/"):
                found |= {each["path"].removeprefix(f"{self.prefix}/"): each["size"] for each in part}
        return found

    def remove(self, *keys: str) -> None:
        """Remove these objects, or all of them without keys; ignore missing ones."""
        import obstore

        for key in keys or self.sizes():
            with told(self.url):
                obstore.delete(bucket(self.url), self._key(key))

    def copy(self, key: str, target: Path) -> tuple[int, int]:
        """Copy an object to another store of the same results folder; return its size and crc32c."""
        import obstore

        other = objects_of(target)
        assert other is not None
        with told(self.url):
            obstore.copy(bucket(self.url), self._key(key), other._key(key))
        data = other.get(key)
        return len(data), crc32c(data)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}"


def objects_of(path: Path) -> Objects | None:
    """Return the objects that hold the chunk files of a store or folder, or None if the chunks are files."""
    for folder in path.parents:
        try:
            url = json.loads((folder / NAME).read_bytes())["url"]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise MicrotomeError(
                f'{folder / NAME} is damaged ({error}): write {{"url": "s3://..."}} into it, the place of the stores'
            ) from None
        return Objects(url, path.relative_to(folder).as_posix())
    return None


def size_of(path: Path) -> int:
    """Return the bytes of a store, or a folder with stores, on disk and on object storage; 0 if there is none."""
    files = sum((Path(at) / name).stat().st_size for at, _, names in os.walk(path) for name in names)
    objects = objects_of(path)
    return files if objects is None else files + sum(size for key, size in objects.sizes().items() if "/c/" in key)


def settle(results: Path, wanted: str | None, dry: bool = False) -> None:
    """Make a results folder keep its stores where the configuration says; with `dry`, only see whether it can.

    Raises
    ------
    MicrotomeError
        The folder already keeps them elsewhere, or the bucket cannot be reached.
    """
    try:
        there = json.loads((results / NAME).read_bytes())["url"]
    except FileNotFoundError:
        there = None
    if there == wanted:
        return
    filled = next(results.glob("*/images.zarr"), None) is not None
    if there is not None or filled:
        raise MicrotomeError(
            f"stores: the results folder {results} keeps its stores {f'at {there}' if there else 'in itself'}, and the "
            f"configuration says {wanted or 'nothing of another place'}: name another folder as `results`, "
            f"or leave `stores` as it was"
        )
    assert wanted is not None
    Objects(wanted, "stores").sizes()  # fails unless the bucket exists and can be listed
    if not dry:
        write_atomically(results / NAME, json.dumps({"url": wanted}))


@functools.cache
def bucket(url: str) -> Any:
    """Return the client for a location, one per process."""
    try:
        from obstore.store import S3Store
    except ModuleNotFoundError:
        raise MicrotomeError(
            "obstore is not installed, which `stores: s3://...` needs: install the extra, `pip install '.[s3]'` in "
            "Microtome's folder"
        ) from None
    found = URL.fullmatch(url)
    assert found is not None
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3"):
        # Do not repeat the value: it may hold a password.
        if name in os.environ and not re.fullmatch(r"https?://[A-Za-z0-9._:\[\]-]+(/[^?#@\s]*)?", os.environ[name]):
            raise MicrotomeError(f"{name}: expected http://host:port or https://host, without a user or password")
    return S3Store(found["bucket"], prefix=(found["prefix"] or "").strip("/") or None, retry_config=RETRIES)


@contextmanager
def told(url: str, missing: str | None = None) -> Iterator[None]:
    """Translate errors of the object storage for users, without the request, which may hold credentials.

    With `missing`, a missing object raises `FileNotFoundError`.
    """
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except (PermissionDeniedError, UnauthenticatedError, PermissionError):
        why = "access is denied: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, for some accounts AWS_SESSION_TOKEN"
    except FileNotFoundError:
        if missing is not None:
            raise FileNotFoundError(errno.ENOENT, "no such object", missing) from None
        why = "there is no such bucket"
    except (BaseError, OSError) as error:
        status = re.search(r"status code: (\d+ [\w ]+)", str(error))
        why = (
            f"it cannot be reached ({status[1] if status else type(error).__name__}): look at its name, "
            f"AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and at AWS_ALLOW_HTTP for a "
            f"server without TLS"
        )
    else:
        return
    raise MicrotomeError(f"stores: {url}: {why}; finished work is kept; rerun to resume")


def chunks_of(root: Path, key: str) -> Objects | None:
    """Return the objects that hold a file below a folder, if it is a chunk on object storage; else None."""
    return objects_of(root) if "/c/" in key else None
