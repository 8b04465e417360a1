"""Stores: layout, recorded files, verified reading, ledgers, and xarray as an outside reader."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
import zarr
from distributed.protocol.pickle import dumps, loads
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.storage.store import (
    Array,
    DamagedStoreError,
    Ledger,
    Reader,
    StoreRef,
    attributes,
    create,
    metadata_files,
    remove_partials,
    write,
    write_whole,
)

MAPS = Array(("image", "unit", "y", "x"), (10, 5, 3, 3), np.float16, (4, 2, 3, 3), shard=(4, 6, 3, 3), fill=np.nan)
PLAIN = Array(("image",), (10,), np.int64, (4,), fill=-1)


@pytest.fixture
def store(tmp_path):
    """A store of three shards, the last one shorter, with its files and values."""
    path = tmp_path / "activations.zarr"
    create(path, {"activation": MAPS, "label": PLAIN}, {"scale": 1.0})
    values = np.random.default_rng(0).standard_normal(MAPS.shape).astype(np.float16)
    files = {}
    for start in (0, 4, 8):
        block = values[start : start + 4]
        files |= write(
            path, {"activation": ((start, 0, 0, 0), block), "label": ((start,), start + np.arange(len(block)))}
        )
    return path, files, values


def test_what_was_written_is_recorded_and_read(store):
    path, files, values = store
    on_disk = {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    assert on_disk == set(files) | set(metadata_files(path))
    assert all((path / name).stat().st_size == size for name, (size, _) in files.items())
    reader = Reader(path, files)
    np.testing.assert_array_equal(reader["activation"][:], values)
    np.testing.assert_array_equal(reader["activation"][5:9, 1:4, 2], values[5:9, 1:4, 2])
    assert reader["label"][:].tolist() == list(range(10))
    assert reader.attrs["scale"] == 1.0


def test_a_chunk_of_zeros_is_a_file(tmp_path):
    create(tmp_path / "s", {"x": Array(("image",), (4,), np.int64, (4,))}, {})
    assert list(write(tmp_path / "s", {"x": ((0,), np.zeros(4, np.int64))})) == ["x/c/0"]
    assert (tmp_path / "s/x/c/0").exists()


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_flipped_bit_is_refused_wherever_it_is(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "s"
    create(path, {"x": Array(("image", "unit"), (4, 6), np.float16, (4, 2), shard=(4, 6))}, {})
    files = write(path, {"x": ((0, 0), np.arange(24, dtype=np.float16).reshape(4, 6))})
    (name,) = files
    raw = bytearray((path / name).read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (path / name).write_bytes(raw)
    with pytest.raises(DamagedStoreError, match=rf"/s: chunk {name} has checksum .*; run `make"):
        Reader(path, files)["x"][0, 5]


def damage_truncate(path: Path, names):
    (path / names[1]).write_bytes((path / names[1]).read_bytes()[:-1])
    return "bytes, "


def damage_empty(path: Path, names):
    (path / names[1]).write_bytes(b"")
    return "has 0 bytes"


def damage_delete(path: Path, names):
    (path / names[1]).unlink()
    return "cannot be read"


def damage_swap(path: Path, names):
    one, other = path / names[0], path / names[1]
    one_bytes, other_bytes = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_bytes)
    other.write_bytes(one_bytes)
    return "has (checksum|[0-9]+ bytes)"


def damage_folder(path: Path, names):
    (path / names[1]).unlink()
    (path / names[1]).mkdir()
    return "cannot be read"


@pytest.mark.parametrize("damage", [damage_truncate, damage_empty, damage_delete, damage_swap, damage_folder])
@pytest.mark.parametrize("array", ["activation", "label"])
def test_damage_is_refused_by_store_and_chunk(store, damage, array):
    path, files, values = store
    names = sorted(name for name in files if name.startswith(array))
    said = damage(path, names)
    reader = Reader(path, files)
    with pytest.raises(DamagedStoreError, match=rf"activations\.zarr: chunk {names[1]}.*{said}"):
        reader[array][4:8]
    np.testing.assert_array_equal(reader["activation"][8:], values[8:])


def test_a_chunk_that_nobody_recorded(store):
    path, files, _ = store
    (name,) = [name for name in files if name.startswith("activation/c/1")]
    with pytest.raises(DamagedStoreError, match=f"chunk {name} was never recorded"):
        Reader(path, {key: value for key, value in files.items() if key != name})["activation"][4]


@pytest.mark.parametrize("layout", [(None, (4, 6)), ((4, 6), (4, 2))], ids=["chunks", "shards"])
def test_a_checksum_says_what_a_file_holds(tmp_path, layout):
    """A file that ends in its own crc32c would have one and the same checksum for every content."""
    shard, chunk = layout
    seen = set()
    for seed in range(20):
        values = np.random.default_rng(seed).integers(0, 256, (4, 6), np.uint8)
        create(tmp_path / "s", {"x": Array(("image", "unit"), (4, 6), np.uint8, chunk, shard)}, {})
        seen |= set(write(tmp_path / "s", {"x": ((0, 0), values)}).values())
    assert len({size for size, _ in seen}) == 1  # noise does not compress
    assert len(seen) == 20


def test_any_reader_notices_a_flipped_bit(tmp_path):
    path = tmp_path / "s"
    create(path, {"x": Array(("image",), (40,), np.float16, (40,))}, {})
    values = np.random.default_rng(0).standard_normal(40).astype(np.float16)
    (name,) = write(path, {"x": ((0,), values)})
    good = (path / name).read_bytes()
    for at in range(8 * len(good)):
        raw = bytearray(good)
        raw[at // 8] ^= 1 << at % 8
        (path / name).write_bytes(raw)
        try:
            read = zarr.open_group(path, mode="r", use_consolidated=False)["x"][:]
        except Exception:
            continue
        np.testing.assert_array_equal(read, values)  # a reserved bit of the frame's header


def test_a_store_that_is_none(tmp_path):
    with pytest.raises(DamagedStoreError, match=r"absent\.zarr: not a readable zarr store") as caught:
        Reader(tmp_path / "absent.zarr", {})
    error = caught.value  # as it comes back from a worker
    assert type(loads(dumps(error))) is DamagedStoreError
    create(tmp_path / "s", {"x": PLAIN}, {})
    (tmp_path / "s/zarr.json").write_text("{")
    with pytest.raises(DamagedStoreError, match="not a readable zarr store"):
        Reader(tmp_path / "s", {})
    assert attributes(tmp_path / "s") == {}


def test_blocks_must_be_whole_files(store):
    path, _, values = store
    for start, stop in [(0, 3), (2, 6), (4, 7)]:
        with pytest.raises(ValueError, match="not made of whole files of 4"):
            write(path, {"activation": ((start, 0, 0, 0), values[start:stop])})
    with pytest.raises(ValueError, match="not made of whole files of 6"):
        write(path, {"activation": ((0, 0, 0, 0), values[:4, :3])})


def test_a_longer_store_keeps_its_chunks_and_another_layout_does_not(store):
    path, files, values = store
    longer = Array(MAPS.dims, (13, 5, 3, 3), MAPS.dtype, MAPS.chunk, MAPS.shard, MAPS.fill)
    labels = Array(PLAIN.dims, (13,), PLAIN.dtype, PLAIN.chunk, None, PLAIN.fill)
    create(path, {"activation": longer, "label": labels}, {"scale": 2.0})
    np.testing.assert_array_equal(Reader(path, files)["activation"][:10], values)
    assert attributes(path) == {"scale": 2.0}
    other = Array(MAPS.dims, (13, 5, 3, 3), MAPS.dtype, (4, 5, 3, 3), (4, 5, 3, 3), MAPS.fill)
    create(path, {"activation": other, "label": labels}, {})
    assert not list(path.glob("activation/c/*"))
    assert np.isnan(xr.open_zarr(path)["activation"].values).all()
    assert Reader(path, files)["label"][0:4].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["zarr.json", "activation/zarr.json", "label/zarr.json"])
@pytest.mark.parametrize("what", ["no json", "", None])
def test_a_damaged_layout_is_written_again_and_its_chunks_stay(store, name, what):
    path, files, values = store
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    if what is None:
        (path / name).unlink()
    else:
        (path / name).write_text(what)
    create(path, {"activation": MAPS, "label": PLAIN}, {"scale": 1.0})
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    np.testing.assert_array_equal(Reader(path, files | metadata_files(path))["activation"][:], values)


CHANGES = {
    "byte order": lambda label: label["codecs"][0]["configuration"].update(endian="big"),
    "fill value": lambda label: label.update(fill_value=0),
    "dtype": lambda label: label.update(data_type="float64"),
    "sign": lambda label: label.update(data_type="uint64", fill_value=0),
    "codec": lambda label: label["codecs"][1].update(name="gzip", configuration={"level": 1}),
    "level": lambda label: label["codecs"][1]["configuration"].update(level=9),
    "no codec": lambda label: label["codecs"].pop(),
    "names of chunks": lambda label: label["chunk_key_encoding"].update(name="v2", configuration={"separator": "/"}),
    "dimension": lambda label: label.update(dimension_names=["row"]),
    "attributes": lambda label: label.update(attributes={"scale_factor": 2.0}),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_unfinished_store_is_never_decoded_otherwise_than_it_was_written(store, ledger, change):
    """What a zarr.json says otherwise is written again, and its shards with it: whose chunks they are is not known."""
    path, _, values = store
    file = path / "label/zarr.json"
    written = file.read_bytes()
    label = json.loads(written)
    change(label)
    file.write_text(json.dumps(label))
    create(path, {"activation": MAPS, "label": PLAIN}, {"scale": 1.0})
    assert file.read_bytes() == written
    assert [Ledger(ledger.path).get(shard, f"id{shard}", path) for shard in "012"] == [None] * 3
    np.testing.assert_array_equal(zarr.open_group(path, mode="r", zarr_format=3)["activation"][:], values)


@pytest.mark.parametrize("name", ["zarr.json", "label/zarr.json"])
@pytest.mark.parametrize("text", ["[]", "{}", "null", "1", '"zarr"', '{"zarr_format": 2}', '{"node_type": "no"}'])
def test_what_is_json_and_no_layout_is_written_again(store, name, text):
    path, _, _ = store
    written = {file: (path / file).read_bytes() for file in ("zarr.json", "label/zarr.json")}
    (path / name).write_text(text)
    create(path, {"activation": MAPS, "label": PLAIN}, {"scale": 1.0})
    assert {file: (path / file).read_bytes() for file in written} == written
    assert zarr.open_group(path, mode="r", zarr_format=3)["label"][:].tolist() == list(range(10))


@pytest.mark.parametrize("name", ["zarr.json", "activation/zarr.json"])
def test_a_layout_that_was_changed_is_refused(store, name):
    """It is still JSON, and a reader that does not know better would take it as it is."""
    path, files, _ = store
    files = files | metadata_files(path)
    text = (path / name).read_text()
    (path / name).write_text(text.replace("1.0", "2.0", 1) if name == "zarr.json" else text.replace("10,", "12,", 1))
    with pytest.raises(DamagedStoreError, match=rf"{path}: chunk {name} has checksum"):
        Reader(path, files)["activation"][:]


def test_xarray_reads_it_as_it_is(tmp_path):
    path = tmp_path / "iou.zarr"
    text = np.array(["tree", "<b>ü\n", ""], dtype=object)
    counts = np.array([[0, 1, 2], [-1, 2**62, 0]])
    arrays = {
        "intersection": (("unit", "concept"), counts),
        "iou": (("unit", "concept"), np.array([[0, np.nan, 1], [0.5, 0, 0]], np.float32)),
        "flag": (("unit",), np.array([True, False])),
        "concept": (("concept",), text),
        "category": (("concept",), text[::-1]),
    }
    write_whole(path, arrays, {"quantile": 0.01}, coordinates=["category"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = xr.open_zarr(path).load()
    assert data["intersection"].dtype == np.int64 and data["flag"].dtype == bool and data["iou"].dtype == np.float32
    np.testing.assert_array_equal(data["intersection"], counts)
    assert data["concept"].values.tolist() == text.tolist()
    assert set(data.coords) == {"concept", "category"} and data.attrs["quantile"] == 0.01
    assert zarr.open_group(path, mode="r")["intersection"].metadata.zarr_format == 3


def test_a_store_written_whole_replaces_the_old_one(tmp_path):
    path = tmp_path / "s"
    write_whole(path, {"old": (("x",), np.arange(3))}, {})
    files = write_whole(path, {"new": (("x",), np.arange(2))}, {})
    assert {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()} == set(files)
    assert "old" not in str(files)


def test_leftovers_of_a_killed_writer_are_removed(store):
    path, files, _ = store
    leftover = path / "activation" / "c" / "0" / "abc.partial"
    leftover.write_bytes(b"half")
    remove_partials(path)
    assert not leftover.exists() and all((path / name).exists() for name in files)


# Ledgers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ledger(store):
    """The ledger of the store: a line for each of its three shards."""
    path, files, _ = store
    ledger = Ledger(path.with_suffix(".ledger"))
    for shard in "012":
        own = {name: value for name, value in files.items() if name.split("/")[2] == shard}
        ledger.record(shard, f"id{shard}", own, maximum=1.5)
    return ledger


def test_a_ledger_is_read_as_it_was_written(store, ledger):
    path, files, _ = store
    again = Ledger(ledger.path)
    assert again.files("012") == files
    assert again.get("1", "id1", path)["maximum"] == 1.5
    assert again.get("1", "another", path) is None
    assert again.get("3", "id1", path) is None


@pytest.mark.parametrize("kept", [1, 10, -2])
def test_half_a_last_line_counts_as_absent(store, ledger, kept):
    path, _, _ = store
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(lines[:2]) + lines[2][:kept])
    again = Ledger(ledger.path)
    assert set(again.entries) == {"0", "1"}
    again.record("2", "id2", again.entries["1"]["files"])
    assert set(Ledger(ledger.path).entries) == {"0", "1", "2"}
    assert Ledger(ledger.path).get("2", "id2", path)


def test_a_last_line_without_its_end_is_whole(ledger):
    ledger.path.write_bytes(ledger.path.read_bytes().removesuffix(b"\n"))
    again = Ledger(ledger.path)
    assert set(again.entries) == {"0", "1", "2"}
    again.record("3", "id3", {})
    assert set(Ledger(ledger.path).entries) == {"0", "1", "2", "3"}


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_line_costs_its_shard_alone(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "s.ledger"
    ledger = Ledger(path)
    for shard in "012":
        ledger.record(shard, f"id{shard}", {f"x/c/{shard}": (10, 20)})
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(raw)
    again = Ledger(path)
    lost = {"0", "1", "2"} - set(again.entries)
    assert len(lost) <= (2 if path.read_bytes().count(b"\n") < 3 else 1)  # a lost line end joins two lines
    for shard, entry in again.entries.items():
        assert entry == ledger.entries[shard]


@pytest.mark.parametrize("change", ["delete", "truncate", "extend"])
def test_a_shard_with_another_size_counts_as_absent(store, ledger, change):
    path, files, _ = store
    name = next(name for name in files if name.startswith("label/c/1"))
    match change:
        case "delete":
            (path / name).unlink()
        case "truncate":
            (path / name).write_bytes(b"")
        case "extend":
            (path / name).write_bytes((path / name).read_bytes() + b"x")
    assert ledger.get("1", "id1", path) is None
    assert ledger.get("0", "id0", path) and ledger.get("2", "id2", path)


def test_the_last_line_of_a_shard_counts(ledger):
    ledger.record("1", "newer", {"x": (1, 2)})
    assert Ledger(ledger.path).entries["1"]["id"] == "newer"
    assert len(ledger.path.read_text().splitlines()) == 4
    assert json.loads(ledger.path.read_text().splitlines()[0].rpartition("\t")[0])["shard"] == "0"


# What tasks carry of a store ------------------------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path):
    """A store of three shards with names that begin alike, and arrays whose shards are one file and several."""
    path = tmp_path / "here" / "many.zarr"
    shapes = {
        "map": Array(("image", "unit"), (10, 6), np.float32, (2, 3), shard=(4, 6)),
        "maps": Array(("image", "unit"), (10, 6), np.float32, (4, 2)),
        "label": Array(("image",), (10,), np.int64, (4,)),
    }
    create(path, shapes, {})
    files = {}
    for start in (0, 4, 8):
        rows = np.arange(start, min(start + 4, 10))
        values = (rows[:, None] * np.ones(6)).astype(np.float32)
        blocks = {"map": ((start, 0), values), "maps": ((start, 0), values), "label": ((start,), rows)}
        files |= write(path, blocks)
    return StoreRef(path, files | metadata_files(path))


@pytest.mark.parametrize("arrays", [[], ["map"], ["maps"], ["label", "map"], ["map", "maps", "label"], ["other"]])
@pytest.mark.parametrize("shards", [[], [0], [1, 2], [2, 0, 1], [7]])
def test_a_task_carries_the_files_that_it_reads_and_no_others(many, arrays, shards):
    found = many.of(arrays, shards)
    expected = {
        name: value
        for name, value in many.files.items()
        if name == "zarr.json"
        or (
            name.partition("/")[0] in arrays
            and ("/c/" not in name or int(name.partition("/c/")[2].partition("/")[0]) in shards)
        )
    }
    assert found.path == many.path and found.files == expected
    assert many.of(iter(arrays), iter(shards)) == found, "of anything that can be gone through once"
    assert found.of(arrays, shards) == found


def test_what_is_carried_is_read_and_the_rest_is_refused(many):
    chosen = many.of(["maps"], [1])
    assert len([name for name in chosen.files if "/c/" in name]) == 3
    reader = chosen.open()
    np.testing.assert_array_equal(reader["maps"][4:8], np.repeat(np.arange(4.0, 8)[:, None], 6, 1))
    with pytest.raises(DamagedStoreError, match=r"many\.zarr: chunk maps/c/0/0 was never recorded"):
        reader["maps"][3:5]
    with pytest.raises(DamagedStoreError, match=r"many\.zarr: chunk label/c/1 was never recorded"):
        reader["label"][4:8]
    (many.path / "maps/c/1/2").write_bytes(b"")
    with pytest.raises(DamagedStoreError, match=r"many\.zarr: chunk maps/c/1/2 has 0 bytes"):
        many.of(["maps"], [1]).open()["maps"][4:8]
    (many.path / "maps/zarr.json").write_text("{}")
    with pytest.raises(DamagedStoreError, match=r"many\.zarr: chunk maps/zarr\.json has 2 bytes"):
        many.of(["maps"], [1]).open()["maps"]


def test_a_manifest_names_the_files_of_several_stores(many):
    described = {f"many.zarr/{name}": value for name, value in many.files.items()}
    others = {"units.csv": (1, 2), "many.zarr.csv": (3, 4), "many/x/c/0": (5, 6), "other.zarr/zarr.json": (7, 8)}
    assert StoreRef.of_manifest(many.path.parent, "many.zarr", described | others) == many
    assert StoreRef.of_manifest(many.path.parent, "none.zarr", described).files == {}


def test_what_is_carried_is_small():
    """Of a million images only what one task reads goes to the workers; what finds it fast does not go at all."""
    files = {"zarr.json": (1, 2)}
    for array in ("image", "label"):
        files |= {f"{array}/zarr.json": (1, 2)} | {f"{array}/c/{shard}/0": (shard, shard) for shard in range(2000)}
    whole = StoreRef(Path("results/scenes/images.zarr"), files)
    before = len(dumps(whole))
    one = whole.of(["image"], [1234])
    assert list(one.files) == ["zarr.json", "image/zarr.json", "image/c/1234/0"]
    assert len(dumps(one)) < 400 < before / 100
    assert len(dumps(whole)) == before, "the index of its files stays here"
    assert loads(dumps(one)) == one and loads(dumps(whole)) == whole
    assert loads(dumps(whole)).of(["image"], [1234]) == one
