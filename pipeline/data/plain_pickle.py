"""Reader of pickles of plain data and byte arrays, such as the batches of CIFAR-10, that executes nothing.

A pickle is a program: `pickle.load` calls whatever it names. Here, it can only name stand-ins, defined in this module,
for the few names with which numpy writes an array. They keep what they are given, and no numpy code sees it before it
is checked. Anything else is refused before a single object is made.
"""

import io
import math
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import MicrotomeError

MOST_BYTES = 1 << 28  # a batch of CIFAR-10 has 31 MB
UINT8 = ("u1", "|u1", "B")
ARRAY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
BUFFER_MODULES = ("numpy.core.numeric", "numpy._core.numeric")
# Operations that write plain data and the calls below; none sets attributes of a class or imports by number.
OPERATIONS = frozenset(
    [
        "PROTO",
        "FRAME",
        "STOP",
        "MARK",
        "POP",
        "POP_MARK",
        "DUP",
        "NONE",
        "NEWTRUE",
        "NEWFALSE",
        "INT",
        "LONG",
        "LONG1",
        "LONG4",
        "BININT",
        "BININT1",
        "BININT2",
        "FLOAT",
        "BINFLOAT",
        "STRING",
        "BINSTRING",
        "SHORT_BINSTRING",
        "UNICODE",
        "BINUNICODE",
        "SHORT_BINUNICODE",
        "BINUNICODE8",
        "BINBYTES",
        "SHORT_BINBYTES",
        "BINBYTES8",
        "BYTEARRAY8",
        "EMPTY_LIST",
        "LIST",
        "APPEND",
        "APPENDS",
        "EMPTY_TUPLE",
        "TUPLE",
        "TUPLE1",
        "TUPLE2",
        "TUPLE3",
        "EMPTY_DICT",
        "DICT",
        "SETITEM",
        "SETITEMS",
        "PUT",
        "BINPUT",
        "LONG_BINPUT",
        "MEMOIZE",
        "GET",
        "BINGET",
        "LONG_BINGET",
        "GLOBAL",
        "STACK_GLOBAL",
        "REDUCE",
        "BUILD",
    ]
)
PUTS = ("PUT", "BINPUT", "LONG_BINPUT")


class NotPlainError(MicrotomeError):
    """A pickle with something in it that is neither plain data nor an array of uint8."""


def read_dict(path: Path) -> dict[str, Any]:
    """Return the dict that a pickle holds, by text: plain data, and arrays of uint8 (numpy, read-only).

    Text that Python 2 wrote is read as latin-1. Lists are returned as they are: the caller checks their contents.

    Raises `NotPlainError`: the file is damaged, larger than `MOST_BYTES`, not a dict, or has anything else in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise MicrotomeError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > MOST_BYTES:
        raise NotPlainError(f"{path} has more than {MOST_BYTES:,} bytes; not read")
    try:
        _check(data)
        found = _Reader(io.BytesIO(data), encoding="latin1").load()
    except NotPlainError as error:
        raise NotPlainError(f"{path}: {error}") from None
    except Exception as error:  # with damaged files, pickle raises nearly every type of error
        raise NotPlainError(f"{path} is not a pickle of plain data: {error or type(error).__name__}") from error
    if type(found) is not dict or not all(type(key) is str for key in found):
        raise NotPlainError(f"{path} holds a {type(found).__name__}; expected a dict by text")
    return {key: value.values if type(value) is _Array else value for key, value in found.items()}


def _check(data: bytes) -> None:
    """Go through the operations without executing them; refuse unknown ones, and numbers that would allocate memory."""
    for operation, argument, at in pickletools.genops(data):
        if operation.name not in OPERATIONS:
            raise NotPlainError(
                f"the operation {operation.name} at byte {at} is not that of plain data; nothing was run"
            )
        if operation.name in PUTS and int(argument or 0) > len(data):
            raise NotPlainError(f"the memo number {argument} at byte {at} is larger than the file")


class _Reader(pickle.Unpickler):
    """An unpickler that knows only the names with which numpy writes an array."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ARRAY_MODULES and name == "_reconstruct":
            return _Name(_Array)
        if module in BUFFER_MODULES and name == "_frombuffer":
            return _Name(_from_buffer)
        if (module, name) == ("numpy", "dtype"):
            return _Name(_Dtype)
        if (module, name) == ("numpy", "ndarray"):
            return _Name(None)
        if (module, name) == ("_codecs", "encode"):  # bytes, as Python 3 writes them for Python 2
            return _Name(_encoded)
        raise NotPlainError(f"it names {module}.{name}, which is neither plain data nor an array; nothing was run")

    def persistent_load(self, pid: Any) -> Any:
        raise NotPlainError(f"it refers to an object {pid!r} outside of the file")


class _Fixed:
    """An object that takes no state unless it defines how; otherwise, a pickle could set any attribute."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise NotPlainError(f"it sets the state of a {type(self).__name__.strip('_')}")


class _Name(_Fixed):
    """A name that may be called, with what the call does."""

    __slots__ = ("_made",)

    def __init__(self, made: Any) -> None:
        self._made = made

    def __call__(self, *arguments: Any) -> Any:
        if self._made is None:
            raise NotPlainError("it calls numpy.ndarray")
        return self._made(*arguments)


class _Dtype(_Fixed):
    __slots__ = ("code",)

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and fields, which uint8 does not have."""
        if self.code not in UINT8:
            raise NotPlainError(f"it holds an array of {self.code!r}; expected uint8")


class _Array(_Fixed):
    """An array as numpy writes it up to protocol 4: created empty, then given its state."""

    __slots__ = ("values",)

    def __init__(self, *_: Any) -> None:
        self.values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.values = _values(raw, shape, dtype, bool(fortran))


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> _Array:
    array = _Array()
    array.values = _values(raw, shape, dtype, order == "F")
    return array


def _encoded(text: Any, encoding: Any) -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise NotPlainError(f"it encodes as {encoding!r}; expected bytes as latin1")
    return text.encode("latin1")


def _values(raw: Any, shape: Any, dtype: Any, fortran: bool) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or dtype.code not in UINT8:
        raise NotPlainError(f"it holds an array of {getattr(dtype, 'code', dtype)!r}; expected uint8")
    if isinstance(raw, str):
        raw = raw.encode("latin1")
    sizes = shape if isinstance(shape, tuple) else (shape,)
    good = all(type(size) is int and 0 <= size <= MOST_BYTES for size in sizes)
    if not good or not isinstance(raw, bytes | bytearray):
        raise NotPlainError(f"it holds an array of shape {shape!r} made from {type(raw).__name__}")
    if math.prod(sizes) != len(raw):
        raise NotPlainError(f"it holds an array of shape {shape!r} with {len(raw):,} values")
    return np.frombuffer(bytes(raw), np.uint8).reshape(sizes, order="F" if fortran else "C")
