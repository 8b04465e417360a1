"""Read and write checkpoints: tensors by name, and nothing else.

A file is refused, with its name, if it is missing, empty or truncated, holds pickled objects, or does not fit the
network. Nothing in it is ever executed, and no key is ever ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MicrotomeError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

SUFFIXES = (".pt", ".pth", ".safetensors", ".bin")
# Keys under which training scripts store the state dict in a larger checkpoint.
_ENTRIES = ("state_dict", "model_state_dict", "model")
_SHOWN = 4


def load_state(network: nn.Module, state: dict[str, torch.Tensor], path: str | Path) -> None:
    """Load `state` (tensors by key, from `read` or, on the meta device, from `shapes`) into `network`, in place.

    Every key must fit in name, shape and kind of number. Floating-point values are cast to the parameter's dtype.
    BatchNorm's `num_batches_tracked` may be missing, as in checkpoints from before PyTorch 0.4.1; torch then keeps the
    network's own. `path` only names the file in messages. On a meta network, no value is copied: names and shapes are
    checked.
    """
    own = network.state_dict()
    _check_kinds(state, own, path)
    # Explicit, although torch does the same: on the meta device, it warns that its own counters have values.
    counters = {key: tensor for key, tensor in own.items() if key.endswith("num_batches_tracked")}
    try:
        network.load_state_dict(counters | state, strict=True)
    except RuntimeError as error:
        raise MicrotomeError(f"checkpoint {path} does not fit the network: {_misfit(state, own) or error}") from error


def read(path: str | Path, prefix: str | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, on the CPU.

    It is the file's content, or its only entry called `state_dict`, `model_state_dict` or `model`.

    Parameters
    ----------
    prefix : stripped from every key; an error if a key does not start with it.

    Raises
    ------
    MicrotomeError
        The file cannot be read as tensors by name, or a tensor is complex, quantised, sparse, or not finite.
    """
    import torch

    path = Path(path)
    state = _strip(_tensors(path, device="cpu"), prefix, path)
    for key, tensor in state.items():
        if tensor.is_floating_point():
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            if wrong:
                raise MicrotomeError(
                    f"checkpoint {path}: {wrong} of {tensor.numel()} values of {key!r} are NaN or infinite: "
                    f"take a checkpoint from before training diverged"
                )
    return state


def shapes(path: str | Path, prefix: str | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict as tensors on the meta device: names, shapes and dtypes without reading the values."""
    path = Path(path)
    return _strip(_tensors(path, device="meta"), prefix, path)


def sha256(path: str | Path) -> str:
    """Return the hex digest of the file's bytes, read in pieces."""
    _check_file(Path(path))
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_safetensors(
    path: str | Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write `state` and json-able `metadata` atomically to a safetensors file.

    The same content gives the same bytes. safetensors writes several metadata entries in random order, so a single
    entry `microtome` holds all of it as JSON.
    """
    from safetensors.torch import save_file

    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # Clones: safetensors refuses tensors that share memory (tied weights) or are not contiguous (channels_last).
    own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    entry = {"microtome": json.dumps(dict(metadata), sort_keys=True, allow_nan=False)} if metadata else None
    try:
        save_file(own, partial, entry)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _tensors(path: Path, device: str) -> dict[str, torch.Tensor]:
    """Return the checked state dict in a file; `device="meta"` leaves the values unread."""
    import torch

    _check_file(path)
    content = _read_safetensors(path, device) if path.suffix == ".safetensors" else _read_torch(path, device)
    state = _state_dict(content, path)
    allowed = set(_dtypes().values())
    for key, tensor in state.items():
        if tensor.dtype not in allowed or tensor.layout is not torch.strided:
            kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
            raise MicrotomeError(
                f"checkpoint {path}: {key!r} is {kind}; complex, quantised and sparse weights are not supported: "
                f"save it as dense floating-point tensors"
            )
    return state


def _check_file(path: Path) -> None:
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MicrotomeError(f"checkpoint {path} does not exist{nearest(path.name, beside)}")
    if not path.is_file():
        raise MicrotomeError(f"checkpoint {path} is not a file: name the {', '.join(SUFFIXES)} file itself")
    if not os.access(path, os.R_OK):
        raise MicrotomeError(f"checkpoint {path} cannot be read: permission denied")
    if path.suffix not in SUFFIXES:
        raise MicrotomeError(f"checkpoint {path}: expected a file ending in {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise MicrotomeError(f"checkpoint {path} is empty (0 bytes): copy or download it again")


def _read_torch(path: Path, device: str) -> object:
    import torch

    with path.open("rb") as file:
        # Only the zip format can be mapped; files from before PyTorch 1.6 are a plain pickle.
        start = file.read(4)
    mapped = start == b"PK\x03\x04"
    if not mapped and start[:1] != b"\x80":
        raise _unreadable(path, ValueError("neither a zip archive nor a pickle"))
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None and "Weights only" not in str(error):
            raise _unreadable(path, error) from error
        what = f" ({named.group(1)})" if named else ""
        raise MicrotomeError(
            f"checkpoint {path} is refused: it holds pickled objects{what}, not only tensors; nothing was executed. "
            f"Save `network.state_dict()`, or a .safetensors file, and name that"
        ) from error
    # A damaged file fails anywhere inside the zip or pickle reader, with various exceptions.
    except Exception as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> MicrotomeError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
    return MicrotomeError(
        f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: truncated, or not a checkpoint ({reason}): "
        f"copy or download it again"
    )


def _read_safetensors(path: Path, device: str) -> dict[str, torch.Tensor]:
    import torch
    from safetensors import SafetensorError, safe_open

    dtypes = _dtypes()
    try:
        with safe_open(path, framework="pt") as file:
            state = {}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(key)
                if part.get_dtype() not in dtypes:
                    raise MicrotomeError(
                        f"checkpoint {path}: {key!r} is {part.get_dtype()}; complex and quantised weights are not "
                        f"supported: save it as floating-point tensors"
                    )
                if device == "meta":
                    state[key] = torch.empty(part.get_shape(), dtype=dtypes[part.get_dtype()], device="meta")
                else:
                    state[key] = file.get_tensor(key)
            return state
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _dtypes() -> dict[str, torch.dtype]:
    """Return the dtypes of weights, by safetensors' names."""
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }


def _state_dict(content: object, path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors by name in a file's content: the content itself, or its only entry that holds them."""
    if _is_state_dict(content):
        return dict(content)  # type: ignore[call-overload]
    if isinstance(content, Mapping):
        entries = [entry for entry in _ENTRIES if _is_state_dict(content.get(entry))]
        if len(entries) == 1:
            return dict(content[entries[0]])
        if entries:
            raise MicrotomeError(
                f"checkpoint {path} holds several networks ({', '.join(entries)}): save the state dict of the one meant"
            )
        held = f"a mapping with the entries {', '.join(repr(str(key)) for key in list(content)[:_SHOWN])}"
        held = held if content else "an empty mapping"
    else:
        held = f"a {type(content).__name__}"
    raise MicrotomeError(
        f"checkpoint {path} holds {held}; expected tensors by name, or those under "
        f"{' or '.join(repr(entry) for entry in _ENTRIES)}: save `network.state_dict()`"
    )


def _is_state_dict(content: object) -> bool:
    import torch

    return (
        isinstance(content, Mapping)
        and len(content) > 0
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _strip(state: dict[str, torch.Tensor], prefix: str | None, path: Path) -> dict[str, torch.Tensor]:
    if not prefix:
        return state
    without = [key for key in state if not key.startswith(prefix)]
    if without:
        raise MicrotomeError(
            f"checkpoint {path}: {len(without)} of {len(state)} keys do not start with the prefix {prefix!r} "
            f"({_some(without)}): give the prefix that all keys have, or none"
        )
    return {key[len(prefix) :]: tensor for key, tensor in state.items()}


def _check_kinds(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Refuse integers for floating-point parameters, and the reverse: torch would convert them silently."""
    for key, tensor in state.items():
        if key in own and tensor.is_floating_point() != own[key].is_floating_point():
            raise MicrotomeError(
                f"checkpoint {path}: {key!r} is {tensor.dtype}, the network expects {own[key].dtype}: "
                f"save it without quantisation"
            )


def _misfit(state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """Return what is missing, extra or of another shape, each with a count, the first few and the nearest names."""
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    reshaped = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    parts = []
    if missing:
        parts.append(f"{len(missing)} keys missing ({_some(missing)})")
    if extra:
        parts.append(f"{len(extra)} keys too many ({_some(extra)}){nearest(extra[0], missing or own)}")
    if reshaped:
        parts.append(f"{len(reshaped)} of another shape ({_some(reshaped)})")
    common = _common_prefix(missing, extra)
    return "; ".join(parts) + (f": set `prefix: {common!r}`" if common else "")


def _common_prefix(missing: list[str], extra: list[str]) -> str | None:
    """Return `module.` if every extra key is a missing one with that prefix."""
    if not extra or not missing or not extra[0].endswith(tuple(missing)):
        return None
    wanted = max((key for key in missing if extra[0].endswith(key)), key=len)
    prefix = extra[0][: len(extra[0]) - len(wanted)]
    return prefix if prefix and all(key.startswith(prefix) for key in extra) else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
