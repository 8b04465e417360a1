"""What is left to do of stores that were begun: no part is made twice, and none is left out."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.cluster import Cluster
from pipeline.errors import MicrotomeError
from pipeline.storage.identity import crc32c
from pipeline.storage.store import Ledger
from pipeline.workers import client as workers_client
from pipeline.workers import resumable
from pipeline.workers.resumable import Done, Parts, grouped, lacking, resumed, resumed_in_groups

PARTS = ("0", "1", "10", "2")  # in the order that they are asked for, which is not that of their names


@pytest.fixture
def client(workers, tmp_path):
    with workers_client.client(Cluster(workers=1), tmp_path) as found:
        yield found


@pytest.fixture
def here(monkeypatch):
    """Tasks are done in this process, one after the other."""
    monkeypatch.setattr(resumable, "run_tasks", one_by_one)


def one_by_one(client, task, tasks, total, label, remedy):
    asked = list(tasks)
    assert len(asked) == total
    return (task(*arguments) for arguments in asked)


def write(store: Path, name: str, data: bytes) -> tuple[int, int]:
    path = store / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return len(data), crc32c(data)


def make(stores: dict[str, Path], part: str, names: list[str]) -> Done:
    """A task: two files of a part in each of these stores."""
    files = {
        name: {f"{at}/{part}": write(stores[name], f"{at}/{part}", f"{name} {at} {part}".encode()) for at in "ab"}
        for name in names
    }
    return Done(part, files, {"made": part}, {name: {"in": name} for name in names})


def fail_at(stores: dict[str, Path], part: str, names: list[str], last: str) -> Done:
    if part == last:
        raise MicrotomeError(f"part {part} failed")
    return make(stores, part, names)


def of(folder: Path, name: str, parts=PARTS, suffix: str = "") -> Parts:
    """The parts of a store, read from the disk as a run that begins reads them."""
    return Parts(folder / f"{name}.zarr", {part: f"made of {part}" for part in parts}, suffix=suffix)


# One store ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Begun:
    """A store of which some parts are whole, and others in a state that is none."""

    folder: Path

    def part(self, part: str, state: str, suffix: str = "") -> None:
        store = self.folder / "one.zarr"
        ledger = Ledger(store.with_suffix(".ledger"))
        files = {f"x/{part}": write(store, f"x/{part}", b"1234")}
        match state:
            case "unrecorded":
                return
            case "of something else":
                ledger.record(part + suffix, "another id", files)
                return
        ledger.record(part + suffix, f"made of {part}", files)
        match state:
            case "gone":
                (store / f"x/{part}").unlink()
            case "cut short":
                (store / f"x/{part}").write_bytes(b"123")
            case "made since":
                ledger.record(part + suffix, "another id", files)
            case "cut line":
                ledger.path.write_bytes(ledger.path.read_bytes()[:-3])
            case "changed line":
                *lines, last = ledger.path.read_bytes().splitlines(keepends=True)
                ledger.path.write_bytes(b"".join([*lines, last.replace(b"made of", b"made in")]))


STATES = ("whole", "unrecorded", "of something else", "gone", "cut short", "made since", "cut line", "changed line")


@pytest.mark.parametrize("suffix", ["", " a/b"])
@pytest.mark.parametrize("state", STATES)
def test_a_part_is_there_when_it_is_recorded_and_its_files_are(tmp_path, state, suffix):
    begun = Begun(tmp_path)
    begun.part("0", "whole", suffix)
    begun.part("10", state, suffix)
    parts = of(tmp_path, "one", suffix=suffix)
    assert parts.missing() == (["1", "2"] if state == "whole" else ["1", "10", "2"])
    assert of(tmp_path, "one", suffix=f"{suffix} other").missing() == list(PARTS)


@settings(deadline=None, max_examples=50)
@given(states=st.lists(st.sampled_from(STATES), min_size=len(PARTS), max_size=len(PARTS)))
def test_what_is_missing_is_what_is_not_whole(tmp_path_factory, states):
    folder = tmp_path_factory.mktemp("begun")
    begun = Begun(folder)
    for part, state in zip(PARTS, states, strict=True):
        begun.part(part, state)
    # What comes after a line that was cut short begins a line of its own.
    assert of(folder, "one").missing() == [part for part, state in zip(PARTS, states, strict=True) if state != "whole"]


def test_parts_of_several_kinds_share_a_ledger(tmp_path):
    store, ledger = tmp_path / "one.zarr", Ledger(tmp_path / "one.ledger")
    kinds = {kind: Parts(store, {"0": kind, "1": kind}, ledger, suffix=f" {kind}") for kind in ("x", "y")}
    for kind, part in (("x", "0"), ("y", "1"), ("x", "1")):
        kinds[kind].record(part, {f"{kind}/{part}": write(store, f"{kind}/{part}", b"1")}, place=3)
    assert (kinds["x"].missing(), kinds["y"].missing()) == ([], ["0"])
    assert lacking(kinds) == {"0": ["y"]}
    assert set(kinds["x"].files()) == {"x/0", "x/1"}
    assert [entry["shard"] for entry in kinds["x"].entries().values()] == ["0 x", "1 x"]
    assert list(kinds["x"].entries()) == ["0", "1"] and kinds["x"].entries()["1"]["place"] == 3
    with pytest.raises(KeyError):
        kinds["y"].files()
    assert set(Ledger(ledger.path).entries) == {"0 x", "1 y", "1 x"}


def test_a_part_that_is_no_longer_asked_for_is_not_among_the_files(tmp_path):
    begun = Begun(tmp_path)
    for part in PARTS:
        begun.part(part, "whole")
    parts = of(tmp_path, "one", parts=("2", "0"))
    assert parts.missing() == [] and list(parts.files()) == ["x/2", "x/0"] and list(parts.entries()) == ["2", "0"]


# Several stores -------------------------------------------------------------------------------------------------------


def test_what_is_lacking_is_told_by_part_with_its_stores(tmp_path):
    stores = {"x": of(tmp_path, "x", ("3", "0", "1")), "y": of(tmp_path, "y", ("1", "2"))}
    assert lacking(stores) == {"3": ["x"], "0": ["x"], "1": ["x", "y"], "2": ["y"]}
    stores["x"].record("0", {})
    stores["y"].record("1", {})
    assert lacking(stores) == {"3": ["x"], "1": ["x"], "2": ["y"]}
    assert lacking({}) == {} and lacking({"z": of(tmp_path, "z", ())}) == {}


def recorded(ledger: Path, part: str) -> str | None:
    """The id in the last line of a part, read the plain way."""
    found = None
    for line in ledger.read_text().splitlines() if ledger.exists() else ():
        entry = json.loads(line.rpartition("\t")[0])
        found = entry["id"] if entry["shard"] == part else found
    return found


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_what_is_done_against_brute_force(tmp_path_factory, data):
    """Any parts of three stores, some of them made before: each that is missing is made once, and the others never."""
    folder = tmp_path_factory.mktemp("resumed")
    paths = {name: folder / f"{name}.zarr" for name in "xyz"}
    asked = {name: data.draw(st.lists(st.sampled_from(PARTS), unique=True), label=name) for name in paths}
    for name in paths:
        for part in data.draw(st.lists(st.sampled_from(PARTS), unique=True), label=f"before in {name}"):
            done = make(paths, part, [name])
            id = "another" if data.draw(st.booleans(), label=f"{name} {part} of something else") else f"made of {part}"
            Ledger(paths[name].with_suffix(".ledger")).record(part, id, done.files[name])
            if data.draw(st.booleans(), label=f"{name} {part} lost"):
                (paths[name] / f"b/{part}").unlink()
    expected: dict[str, list[str]] = {}
    for name, parts in asked.items():
        for part in parts:
            there = (paths[name] / f"b/{part}").exists()
            if not (there and recorded(paths[name].with_suffix(".ledger"), part) == f"made of {part}"):
                expected.setdefault(part, []).append(name)
    calls: list[tuple[str, list[str]]] = []

    def arguments(part, names):
        calls.append((part, names))
        return paths, part, names

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resumable, "run_tasks", one_by_one)
        stores = {name: of(folder, name, parts) for name, parts in asked.items()}
        assert resumed(None, make, stores, arguments, "these") == set(expected)
        assert dict(calls) == expected and len(calls) == len(expected)
        for name, parts in asked.items():
            assert set(stores[name].files()) == {f"{at}/{part}" for part in parts for at in "ab"}
            for file, (size, crc) in of(folder, name, parts).files().items():
                there = (paths[name] / file).read_bytes()
                assert (len(there), crc32c(there)) == (size, crc)
            assert of(folder, name, parts).missing() == []
        calls.clear()
        again = {name: of(folder, name, parts) for name, parts in asked.items()}
        assert resumed(None, make, again, arguments, "these") == set() and calls == []


@pytest.mark.usefixtures("here")
def test_facts_are_kept_with_the_parts(tmp_path):
    paths = {name: tmp_path / f"{name}.zarr" for name in "xy"}
    stores = {name: of(tmp_path, name) for name in paths}
    stores["x"].record("1", {}, made="before")
    resumed(None, make, stores, lambda part, names: (paths, part, names), "these")
    for name in paths:
        found = of(tmp_path, name).entries()
        assert list(found) == list(PARTS)
        for part, entry in found.items():
            kept = {key: value for key, value in entry.items() if key not in ("shard", "id", "files")}
            assert kept == ({"made": "before"} if (name, part) == ("x", "1") else {"made": part, "in": name})
            assert (entry["shard"], entry["id"]) == (part, f"made of {part}")


@pytest.mark.usefixtures("here")
def test_a_store_that_a_task_leaves_out_still_lacks_the_part(tmp_path):
    paths = {name: tmp_path / f"{name}.zarr" for name in "xy"}
    stores = {name: of(tmp_path, name, ("0",)) for name in paths}
    assert resumed(None, make, stores, lambda part, names: (paths, part, names[:1]), "these") == {"0"}
    assert lacking({name: of(tmp_path, name, ("0",)) for name in paths}) == {"0": ["y"]}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("last", PARTS)
def test_an_interrupted_run_goes_on_after_the_last_part(tmp_path, last):
    paths = {"x": tmp_path / "x.zarr"}
    with pytest.raises(MicrotomeError, match=f"part {last} failed"):
        resumed(None, fail_at, {"x": of(tmp_path, "x")}, lambda part, names: (paths, part, names, last), "these")
    left = list(PARTS[PARTS.index(last) :])
    assert of(tmp_path, "x").missing() == left
    made = []

    def arguments(part, names):
        made.append(part)
        return paths, part, names

    assert resumed(None, make, {"x": of(tmp_path, "x")}, arguments, "these") == set(left)
    assert made == left


# On workers -----------------------------------------------------------------------------------------------------------


def test_on_workers(client, tmp_path):
    """An error stops it; what was made before is recorded, and not made again."""
    paths = {name: tmp_path / f"{name}.zarr" for name in "xy"}
    parts = [str(part) for part in range(40)]

    def stores():
        return {name: of(tmp_path, name, parts) for name in paths}

    with pytest.raises(MicrotomeError, match="part 30 failed"):
        resumed(client, fail_at, stores(), lambda part, names: (paths, part, names, "30"), "these")
    left = lacking(stores())
    assert "30" in left and len(left) < len(parts)
    inodes = {path: path.stat().st_ino for part in parts if part not in left for path in tmp_path.glob(f"*/*/{part}")}
    assert resumed(client, make, stores(), lambda part, names: (paths, part, names), "these") == set(left)
    assert lacking(stores()) == {}
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert all((path / f"b/{part}").exists() for path in paths.values() for part in parts)


def test_memory_that_lacks_is_told_with_the_remedy(client, tmp_path):
    with pytest.raises(MicrotomeError, match=r"^these: out of memory \(.*\): lower the portions, or lower `cluster"):
        resumed(client, hungry, {"x": of(tmp_path, "x")}, lambda *_: (), "these", "lower the portions")


def hungry() -> Done:
    raise MemoryError("no more")


# Parts of few images together -----------------------------------------------------------------------------------------


@given(
    lacked=st.dictionaries(
        st.integers(0, 30).map(str),
        st.tuples(
            st.integers(0, 9), st.sets(st.sampled_from("abc"), min_size=1).map(sorted), st.sets(st.sampled_from("abc"))
        ),
        max_size=12,
    ),
    full=st.integers(1, 12),
)
@settings(max_examples=200, deadline=None)
def test_groups_hold_every_part_once_and_are_full_but_for_the_last(lacked, full):
    left = {part: list(names) for part, (_, names, _) in lacked.items()}
    having = {part: sorted({*names, *others}) for part, (_, names, others) in lacked.items()}
    sizes = {part: size for part, (size, _, _) in lacked.items()}
    groups = list(grouped(left, sizes, full, having))
    assert [part for parts, _ in groups for part in parts] == list(left), "in order"
    for parts, names in groups:
        assert set(names) == {name for part in parts for name in left[part]}
        assert all(left[part] == [name for name in having[part] if name in names] for part in parts), (
            "all lack the same"
        )
    assert all(sum(sizes[part] for part in parts[:-1]) < full for parts, _ in groups), "no more than it takes"
    for (parts, _), (following, _) in itertools.pairwise(groups):
        own = {part: set(left[part]) for part in (*parts, following[0])}
        apart = any(
            (a in own[p]) != (a in own[q])
            for p, q in itertools.combinations(own, 2)
            for a in {*having[p]} & {*having[q]}
        )
        assert apart or sum(sizes[part] for part in parts) >= full


@pytest.mark.parametrize(("workers_there", "tasks"), [(1, 1), (2, 2), (4, 4), (40, 4)])
def test_every_worker_has_a_task(tmp_path, monkeypatch, workers_there, tasks):
    asked = []

    def several(stores, parts, names):
        asked.append(parts)
        return [make(stores, part, names) for part in parts]

    monkeypatch.setattr(resumable, "run_tasks", one_by_one)
    monkeypatch.setattr(resumable, "workers_of", lambda client: workers_there)
    stores = {name: of(tmp_path, name) for name in "xy"}
    folders = {name: each.store for name, each in stores.items()}
    sizes = dict.fromkeys(PARTS, 3)
    made = resumed_in_groups(
        None, several, stores, lambda parts, names: (folders, parts, names), sizes, 32, "together", "remedy"
    )
    assert made == set(PARTS) and len(asked) == tasks
    assert all(not of(tmp_path, name).missing() for name in "xy")
    assert not resumed_in_groups(None, several, stores, lambda *_: (), sizes, 32, "together", "remedy")


def test_a_store_without_a_part_parts_no_group(tmp_path, monkeypatch):
    """Tests of few images leave out most shards: the others still go through the network together."""
    asked = []

    def several(stores, parts, names):
        asked.append((parts, names))
        return [make(stores, part, [name for name in names if name == "x" or part == "1"]) for part in parts]

    monkeypatch.setattr(resumable, "run_tasks", one_by_one)
    monkeypatch.setattr(resumable, "workers_of", lambda client: 1)
    stores = {"x": of(tmp_path, "x"), "y": of(tmp_path, "y")}
    stores["y"] = Parts(stores["y"].store, {"1": stores["y"].ids["1"]})
    folders = {name: each.store for name, each in stores.items()}
    sizes = dict.fromkeys(PARTS, 1)
    resumed_in_groups(None, several, stores, lambda parts, names: (folders, parts, names), sizes, 32, "some", "remedy")
    assert asked == [(list(PARTS), ["x", "y"])]
    assert not any(each.missing() for each in stores.values())
