"""Which files a builder opens: its network depends on them, and an id covers only those that the configuration names.

Python announces every `open`, every import of source code, every library that ctypes loads and every database of
sqlite3 to its audit hooks. Other compiled code is not seen there. Functions of a few libraries are replaced while a
builder runs, and a file that is open or mapped afterwards, and was not before, is found whoever opened it. What
compiled code of other libraries opens and closes, and what a program that the builder starts reads, is not noticed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import site
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator
from importlib.util import source_from_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pipeline
from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError

_COMPILED = (
    ("safetensors", "safe_open"),
    ("safetensors.torch", "safe_open"),
    ("torch.jit", "load"),
    ("torch", "from_file"),
)
# Of libraries that may be absent: looked at if they are there and the network's own code names them.
_OPTIONAL = (
    ("cv2", "imread"),
    ("cv2", "imreadmulti"),
    ("h5py.h5f", "open"),
    ("torchvision.io.image", "read_file"),
    ("torchvision.io", "read_file"),
)
_EVENTS = {"sqlite3.connect", "ctypes.dlopen"}
_CODE = {".py", ".so", ".pyd"}
_SYSTEM = ("/proc", "/sys", "/dev", "/etc", "/usr/share")
_MAPPED_BY_THE_SYSTEM = ("/usr", "/lib", "/lib64")


class _Watched(threading.local):
    """The paths that the builder that this thread runs has read and written."""

    def __init__(self) -> None:
        self.running = False
        self.read: list[str] = []
        self.written: list[str] = []


_watched = _Watched()
_installed = threading.Lock()


@contextlib.contextmanager
def only_named_files(spec: NetworkSpec) -> Iterator[None]:
    """Refuse files that a network's own code opens, or imports from beside it, unless `files` names them.

    Modules that `files` names can be imported.
    Networks of a library may open files: their ids hold the library's name, and the digests of what it publishes.

    Raises
    ------
    MicrotomeError
        With the paths, also if the code failed after it had opened them.
    """
    if spec.module_file is None or _watched.running:
        yield
        return
    before = set(sys.modules)
    with contextlib.ExitStack() as stack:
        for module, name in (*_COMPILED, *_named(spec)):
            stack.enter_context(_announced(module, name))
        helpers = dict.fromkeys(str(Path(each).resolve().parent) for each in spec.files or () if each.endswith(".py"))
        stack.enter_context(patch.object(sys, "path", [*helpers, *sys.path] if helpers else sys.path))
        _install()
        held = _held()
        _watched.running = True
        try:
            yield
        finally:
            _watched.read += sorted(_held() - held)
            read, written = _watched.read, set(map(_real, _watched.written))
            _watched.__init__()  # type: ignore[misc]
            named = {_real(path) for path in (spec.module_file, *(spec.files or ()))} | written
            found = [path for path in dict.fromkeys(map(_real, read)) if path not in named]
            found = [path for path in found if path.is_file() and not _installed_or_system(path, spec.module_file)]
            if found:
                # Else a second build would find them imported, and open nothing.
                own = {_real(spec.module_file), *found}
                for name in set(sys.modules) - before:
                    if _real(getattr(sys.modules[name], "__file__", None) or "") in own:
                        del sys.modules[name]
                raise MicrotomeError(_refusal(spec, found))


def _named(spec: NetworkSpec) -> list[tuple[str, str]]:
    """Return the functions of optional libraries that the network's own code may call."""
    own = [spec.module_file, *(Path(each) for each in spec.files or () if each.endswith(".py"))]
    text = "".join(path.read_text(errors="ignore") for path in own if path is not None and path.is_file())
    libraries = {module.partition(".")[0] for module, _ in _OPTIONAL}
    there = {name for name in libraries if name in text and importlib.util.find_spec(name) is not None}
    return [(module, name) for module, name in _OPTIONAL if module.partition(".")[0] in there]


def _held() -> set[str]:
    """Return the files that this process holds open or mapped; none if other threads may open some, or off Linux."""
    if threading.active_count() > 1 or not Path("/proc/self/fd").is_dir():
        return set()
    found = set()
    for link in list(Path("/proc/self/fd").iterdir()):
        with contextlib.suppress(OSError):
            found.add(str(link.readlink()))
    for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
        path = line.partition("/")[2]
        if path and ".so" not in Path(path).suffixes and not f"/{path}".startswith(_MAPPED_BY_THE_SYSTEM):
            found.add(f"/{path}")
    return {path for path in found if path.startswith("/")}


def _refusal(spec: NetworkSpec, found: list[Path]) -> str:
    shown = ", ".join(map(str, found[:3])) + (", ..." if len(found) > 3 else "")
    here = [os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path) for path in found]
    imports = all(path.suffix in _CODE for path in found)
    return (
        f"{spec.architecture} {'imports' if imports else 'opens'} {shown}, which the network's id does not cover: name "
        f"what it depends on, `files: [{', '.join(here[:3])}]`"
        + (", or put that code into an installed package or into the network's own file" if imports else "")
    )


def _installed_or_system(path: Path, module_file: Path) -> bool:
    """Return whether a file belongs to an installed package or to the system, and not to the network."""
    if any(path.is_relative_to(each) for each in _libraries()):
        return True
    own = module_file.resolve().parent, Path.cwd()
    if any(path.is_relative_to(each) for each in own):
        return False
    # A package may be installed from a folder of its own, where its code and data then are.
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values()) if hasattr(module, "__path__")]
    packages = [_real(file).parent for file in files if isinstance(file, str)]
    return path.suffix in _CODE or any(path.is_relative_to(each) for each in packages)


def _libraries() -> set[Path]:
    paths: list[str | Path] = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages(), *_SYSTEM]
    root = Path(pipeline.__file__).parents[1]
    return {_real(path) for path in [*paths, root / "pipeline", root / "kernels"]}


def _real(path: str | Path) -> Path:
    """Return a path without links; compiled code stands for its source."""
    path = Path(path)
    if path.suffix == ".pyc":
        with contextlib.suppress(ValueError):
            path = Path(source_from_cache(str(path)))
    return path.resolve()


def _install() -> None:
    if _installed.acquire(blocking=False):  # for the life of the process: an audit hook cannot be removed
        sys.addaudithook(_audit)


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if not _watched.running or not (event == "open" or event in _EVENTS):
        return
    if not isinstance(args[0], (str, bytes, os.PathLike)):
        return
    if event in _EVENTS:
        _watched.read.append(str(Path(os.fsdecode(args[0])).absolute()))
        return
    mode, flags = args[1], args[2] if isinstance(args[2], int) else 0
    writes = any(sign in mode for sign in "wax") if mode else flags & os.O_ACCMODE == os.O_WRONLY
    # The builder may change the working directory afterwards.
    (_watched.written if writes else _watched.read).append(str(Path(os.fsdecode(args[0])).absolute()))


def _announced(module: str, name: str) -> Any:
    """Return a context in which a function of compiled code announces the file that it opens."""
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)

    def announced(file: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(file, (str, bytes, os.PathLike)):
            sys.audit("open", os.fspath(file), "r", 0)
        return function(file, *args, **kwargs)

    return patch.object(sys.modules[module], name, announced)
