"""A network's code may open or import only the files that its description names, whose digests are in its id."""

import contextlib
import sqlite3
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.identity import architecture
from pipeline.storage.identity import FileDigests

NETWORK = """
import contextlib
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

FOLDER = Path(__file__).parent


def with_file(name):
    return json.loads((FOLDER / name).read_text())

def with_open(name):
    return os.read(os.open(FOLDER / name, os.O_RDONLY), 9)

def with_numpy(name):
    return np.load(FOLDER / name)

def with_torch(name):
    return torch.load(FOLDER / name, mmap=True)

def with_safetensors(name):
    from safetensors.torch import load_file
    return load_file(FOLDER / name)

def with_script(name):
    import warnings
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.load(FOLDER / name)

def with_torch_mapped(name):
    return torch.from_file(str(FOLDER / name), size=1, dtype=torch.uint8)

def with_storage(name):
    globals()["kept"] = torch.UntypedStorage.from_file(str(FOLDER / name), False, 4)

def with_c_left_open(name):
    import ctypes
    ctypes.CDLL(None).open(os.fsencode(FOLDER / name), os.O_RDONLY)

def with_sqlite(name):
    import sqlite3
    with contextlib.closing(sqlite3.connect(FOLDER / name)) as connection:
        return connection.execute("select * from anchors").fetchall()

def with_torchvision(name):
    import warnings
    from torchvision.io import image
    with warnings.catch_warnings(action="ignore"):
        return image.read_file(str(FOLDER / name))

def with_fromfile(name):
    return np.fromfile(FOLDER / name, np.uint8)

def with_its_own(name):
    path = FOLDER / "scratch.json"
    path.write_text("[1]")
    return json.loads(path.read_text())

def with_source(name):
    return Path(__file__).read_text(), Path(torch.__file__).read_text(), Path("/proc/self/status").read_text()

def net(how, name="x"):
    globals()[how](name)
    return nn.Conv2d(3, 2, 1)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nets.py").write_text(NETWORK)
    return tmp_path


def spec(folder, how, name="x", **more):
    return NetworkSpec(module=f"{folder}/nets.py:net", arguments={"how": how, "name": name}, **more)


def written(folder, how):
    name = {"with_numpy": "x.npy", "with_safetensors": "x.safetensors"}.get(how, "x.json")
    path = folder / name
    if how == "with_safetensors":
        save_file({"a": torch.ones(2)}, path)
    elif how == "with_torch":
        torch.save({"a": torch.ones(2)}, path)
    elif how == "with_script":
        with warnings.catch_warnings(action="ignore"):  # scripting is deprecated
            torch.jit.save(torch.jit.script(torch.nn.ReLU()), path)
    elif how == "with_sqlite":
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("create table anchors (size real)")
    elif how == "with_numpy":
        np.save(path, np.ones(2))
    else:
        path.write_text("[1, 2]")
    return path


PYTHONS = ["file", "open", "numpy", "fromfile", "torch", "sqlite"]
COMPILED = ["safetensors", "script", "torch_mapped", "storage", "c_left_open", "torchvision"]


@pytest.mark.parametrize("how", [f"with_{each}" for each in PYTHONS + COMPILED])
def test_a_file_that_the_builder_opens_is_refused_until_it_is_named(folder, monkeypatch, how):
    monkeypatch.setattr(threading, "active_count", lambda: 1)  # as where networks are inspected
    path = written(folder, how)
    with pytest.raises(MicrotomeError, match=rf"net opens {path}, .*name what it depends on, `files: \["):
        build(spec(folder, how, path.name))
    assert build(spec(folder, how, path.name, files=[str(path)])).out_channels == 2


@pytest.mark.parametrize("how", ["with_its_own", "with_source"])
def test_files_that_decide_nothing_are_not(folder, how):
    assert build(spec(folder, how)).out_channels == 2


@pytest.mark.parametrize("where", ["helper.py", "parts/__init__.py"])
def test_a_module_beside_the_network_is_refused_until_it_is_named(folder, monkeypatch, where):
    helper = folder / where
    helper.parent.mkdir(exist_ok=True)
    helper.write_text("WIDTH = 5\n")
    name = where.removesuffix(".py").removesuffix("/__init__")
    (folder / "own.py").write_text(
        f"from torch import nn\nfrom {name} import WIDTH\ndef net(): return nn.Linear(2, WIDTH)"
    )
    monkeypatch.syspath_prepend(folder)
    for _ in range(2):  # the second import has bytecode, and would find the module among those known
        with pytest.raises(MicrotomeError, match=rf"net imports {helper}, .*installed package"):
            build(NetworkSpec(module=f"{folder}/own.py:net"))
    assert build(NetworkSpec(module=f"{folder}/own.py:net", files=[str(helper)])).out_features == 5
    del sys.modules[name]


def test_a_named_module_is_found_beside_the_network(folder):
    (folder / "beside_it.py").write_text("WIDTH = 5\n")
    (folder / "own.py").write_text(
        "from torch import nn\nfrom beside_it import WIDTH\ndef net(): return nn.Linear(2, WIDTH)"
    )
    paths = list(sys.path)
    found = build(NetworkSpec(module=f"{folder}/own.py:net", files=[str(folder / "beside_it.py")]))
    assert (found.out_features, sys.path) == (5, paths)
    del sys.modules["beside_it"]


def test_the_id_holds_what_the_files_hold(folder):
    path = written(folder, "with_file")

    def made_of(**more):
        return architecture(spec(folder, "with_file", **more), FileDigests(folder / "digests.json"))

    assert "files" not in made_of()
    before = made_of(files=[str(path)])
    path.write_text("[3, 4, 5]")
    assert made_of(files=[str(path)]) != before
    with pytest.raises(MicrotomeError, match=r"cannot read .*nowhere\.json"):
        made_of(files=[str(folder / "nowhere.json")])


def test_the_key_belongs_to_modules():
    with pytest.raises(ValueError, match="`files` goes with `module`"):
        NetworkSpec(torchvision="resnet18", files=["a.json"])
