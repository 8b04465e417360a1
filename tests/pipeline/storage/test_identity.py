"""Ids and remembered checksums of files."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import MicrotomeError
from pipeline.storage.identity import ID_LENGTH, FileDigests, crc32c, digest

ROOT = Path(__file__).parents[3]
LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    LEAVES | st.text(), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)


def shuffled(value, draw):
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: shuffled(value[key], draw) for key in keys}
    return [shuffled(item, draw) for item in value] if isinstance(value, list) else value


@given(VALUES, st.data())
def test_the_order_of_keys_does_not_matter(value, data):
    assert digest(shuffled(value, data.draw)) == digest(value)


@given(VALUES, VALUES)
def test_other_values_have_other_ids(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (digest(one) == digest(other)) == same


def test_an_id_is_the_same_in_another_process():
    value = {"b": [1, 2.5, "ü"], "a": None}
    code = f"from pipeline.storage.identity import digest; print(digest({value!r}))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert output.stdout.strip() == digest(value)
    assert len(digest(value)) == ID_LENGTH and set(digest(value)) <= set("0123456789abcdef")


def test_nan_has_no_id():
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest({"quantile": float("nan")})


def test_crc32c_of_the_standard():
    assert crc32c(b"123456789") == 0xE3069283  # RFC 3720, appendix B.4, check value


@pytest.fixture
def reads(monkeypatch):
    """Paths of which the content was read."""
    seen = []
    original = hashlib.file_digest

    def note(file, name):
        seen.append(Path(file.name).name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", note)
    return seen


def test_a_file_is_read_once(tmp_path, reads):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"one")
    memory = tmp_path / "memory" / "files.json"
    digests = FileDigests(memory)
    assert digests(file) == digests(str(file)) == hashlib.sha256(b"one").hexdigest()
    digests.save()
    assert FileDigests(memory)(file) == hashlib.sha256(b"one").hexdigest()
    assert reads == ["weights.pt"]


def test_a_replaced_file_of_the_same_size_and_an_older_time_is_noticed(tmp_path):
    file, other = tmp_path / "weights.pt", tmp_path / "other.pt"
    file.write_bytes(b"one")
    digests = FileDigests(tmp_path / "files.json")
    digests(file)
    stat = file.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**12))
    other.replace(file)
    assert digests(file) == hashlib.sha256(b"two").hexdigest()


def test_a_replaced_file_of_the_same_size_and_time_is_noticed_by_its_inode(tmp_path):
    file, other = tmp_path / "weights.pt", tmp_path / "other.pt"
    file.write_bytes(b"one")
    digests = FileDigests(tmp_path / "files.json")
    digests(file)
    stat = file.stat()
    other.write_bytes(b"two")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert digests(file) == hashlib.sha256(b"two").hexdigest()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"x": 1}', "\xff"])
def test_a_damaged_memory_costs_a_read(tmp_path, text):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"one")
    memory = tmp_path / "files.json"
    memory.write_bytes(text.replace('"x"', json.dumps(digest(str(file.resolve())))).encode("latin-1"))
    digests = FileDigests(memory)
    assert digests(file) == hashlib.sha256(b"one").hexdigest()
    digests.save()
    assert FileDigests(memory).known[digest(str(file.resolve()))][-1] == hashlib.sha256(b"one").hexdigest()


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(MicrotomeError, match=r"cannot read .*absent.*No such file"):
        FileDigests(tmp_path / "files.json")(tmp_path / "absent")
    with pytest.raises(MicrotomeError, match="cannot read"):
        FileDigests(tmp_path / "files.json")(tmp_path)


def in_place(path):
    path.write_bytes(b"other")


def removed_and_copied(path):
    other = path.with_name("other")
    other.write_bytes(b"other")
    path.unlink()
    shutil.copy2(other, path)


def unpacked(path):
    """A file of an archive with one time for all: its new inode may be the number of the old one."""
    with tarfile.open(path.with_name("a.tar"), "w") as archive:
        entry = tarfile.TarInfo(path.name)
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"other"))
    with tarfile.open(path.with_name("a.tar")) as archive:
        archive.extractall(path.parent, filter="data")


def moved_over(path):
    other = path.with_name("other")
    other.write_bytes(b"other")
    other.rename(path)


@pytest.mark.parametrize("replace", [in_place, removed_and_copied, unpacked, moved_over])
def test_a_file_of_the_same_size_and_time_is_read_again(tmp_path, replace):
    path = tmp_path / "weights.pt"
    path.write_bytes(b"first")
    before = path.stat()
    digests = FileDigests(tmp_path / "memory.json")
    assert digests(path) == hashlib.sha256(b"first").hexdigest()
    digests.save()
    time.sleep(0.02)  # the clock of a file system ticks in milliseconds
    replace(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert FileDigests(tmp_path / "memory.json")(path) == hashlib.sha256(b"other").hexdigest()
