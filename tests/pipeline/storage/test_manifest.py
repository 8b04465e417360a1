"""Manifests: written whole, read back as written, and refused when one bit is another."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically
from pipeline.storage.manifest import Manifest, remove_others

MANIFEST = Manifest(
    stage="extract",
    id="0123456789abcdef0123",
    digest="d" * 20,
    parents={"scenes/done/ingest.a.json": "p"},
    files={"logits.zarr/logits/c/0/0": (123, 4567)},
    result={"layers": [{"name": 'a "quoted" näme\n'}], "scale": 0.5},
    settings={"quantile": 0.01},
    provenance={"seconds": 1.5},
)


def test_read_as_written(tmp_path):
    path = tmp_path / "done" / "extract.0.json"
    MANIFEST.write(path)
    assert Manifest.read(path) == MANIFEST
    assert [file.name for file in path.parent.iterdir()] == ["extract.0.json"]


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_flipped_bit_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("done") / "extract.0.json"
    MANIFEST.write(path)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    try:
        assert Manifest.read(path) == MANIFEST  # a blank of the frame around the manifest itself
    except MicrotomeError as error:
        assert "extract.0.json is damaged" in str(error) and "delete it" in str(error)


@settings(deadline=None)
@given(st.integers(0, 700))
def test_a_truncated_one_is_damaged(tmp_path_factory, length):
    path = tmp_path_factory.mktemp("done") / "extract.0.json"
    MANIFEST.write(path)
    raw = path.read_bytes()
    path.write_bytes(raw[: min(length, len(raw) - 3)])
    with pytest.raises(MicrotomeError, match=r"extract\.0\.json is damaged"):
        Manifest.read(path)


def test_a_missing_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        Manifest.read(tmp_path / "absent.json")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new, and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_others_of_the_stage_are_removed(tmp_path):
    for name in ["extract.a.json", "extract.b.json", "dissect.a.json", "extract-more.a.json"]:
        (tmp_path / name).touch()
    remove_others(tmp_path, "extract", keep="b")
    assert {path.name for path in tmp_path.iterdir()} == {"extract.b.json", "dissect.a.json", "extract-more.a.json"}
    remove_others(tmp_path / "absent", "extract")
