"""Read and write checkpoints: tensors by name, and nothing else.

A file is read by its content, whatever its name ends in. It is refused, with its name, if it is missing, empty or
truncated, holds pickled objects, or does not fit the network. Nothing in it is ever executed, and no key is ignored but
those that a `prefix` leaves out, which `notices` names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import MicrotomeError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

# Entries that are taken before others: where training scripts keep the weights that they train.
_ENTRIES = ("state_dict", "model_state_dict", "model")
_DEPTH = 2  # of entries in a file: `ema/state_dict`
_SHOWN = 4
# How files begin that are no checkpoints, what they are, and what to do.
_OTHERS = (
    (b"\x1f\x8b", "a gzip archive", "unpack it and name the file in it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "run `git lfs pull`"),
    (b"\x89HDF", "an HDF5 file", "save the tensors by name with torch or safetensors"),
    (b"\x93NUMPY", "a NumPy array", "save the tensors by name with torch or safetensors"),
    (b"<", "a web page, or other text with tags", "download the file itself"),
    (b"{", "text", "name the file with the tensors"),
)
_TAR = 257, b"ustar"  # where a tar archive says that it is one
_LONGEST_HEADER = 100_000_000  # bytes, of safetensors


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


def read(path: str | Path, prefix: str | None = None, within: str | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, on the CPU.

    It is the file's content; or its only entry called `state_dict`, `model_state_dict` or `model`; or, if it has none
    of these, its only entry with tensors by name.

    Parameters
    ----------
    prefix : only the keys that start with it are taken, without it; an error if none does.
    within : the entry to read, `ema` or `ema/state_dict`, in place of the file's content.

    Raises
    ------
    MicrotomeError
        The file cannot be read as tensors by name, or a tensor is complex, quantised, sparse, or not finite.
    """
    import torch

    path = Path(path)
    state = _strip(_tensors(path, "cpu", within), prefix, path)
    for key, tensor in state.items():
        if tensor.is_floating_point():
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            if wrong:
                raise MicrotomeError(
                    f"checkpoint {path}: {wrong} of {tensor.numel()} values of {key!r} are NaN or infinite: "
                    f"take a checkpoint from before training diverged"
                )
    return state


def shapes(path: str | Path, prefix: str | None = None, within: str | None = None) -> dict[str, torch.Tensor]:
    """Return the state dict as tensors on the meta device: names, shapes and dtypes without reading the values."""
    path = Path(path)
    return _strip(_tensors(path, "meta", within), prefix, path)


def notices(path: str | Path, prefix: str | None = None, within: str | None = None) -> Iterator[str]:
    """Yield what a checkpoint holds beside what is taken of it: other weights of the network, and keys left out."""
    path = Path(path)
    content = _content(path, "meta")
    taken, state = _chosen(content, within, path)
    own = {key.removeprefix(prefix or "") for key in state}
    others = [at for at, entry in _entries(content) if at != taken and _same_network(entry, own)]
    if others:
        named = f"`{taken}`" if taken else "what is at the top of the file"
        yield (
            f"checkpoint {path} also holds weights of the same network under {_listed(others)}; {named} is taken: "
            f"for averaged (EMA) or other weights, set `within: {others[0]}`"
        )
    left = [key for key in state if prefix and not key.startswith(prefix)]
    if left:
        yield (
            f"checkpoint {path}: {len(left)} of {len(state)} keys lack the prefix {prefix!r} and are left out "
            f"({_some(left)})"
        )


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


def _tensors(path: Path, device: str, within: str | None) -> dict[str, torch.Tensor]:
    """Return the checked state dict in a file; `device="meta"` leaves the values unread."""
    import torch

    _, state = _chosen(_content(path, device), within, path)
    allowed = set(_dtypes().values())
    for key, tensor in state.items():
        if tensor.dtype not in allowed or tensor.layout is not torch.strided:
            kind = tensor.dtype if tensor.layout is torch.strided else tensor.layout
            raise MicrotomeError(
                f"checkpoint {path}: {key!r} is {kind}; complex, quantised and sparse weights are not supported: "
                f"save it as dense floating-point tensors"
            )
    return state


def _content(path: Path, device: str) -> object:
    """Return what a file holds, by how it begins: safetensors, or torch's zip or pickle."""
    _check_file(path)
    with path.open("rb") as file:
        start = file.read(512)
    # Safetensors first: the length of its header may begin like a pickle, with the byte 128.
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_HEADER:
        return _read_safetensors(path, device)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        # Only the zip format can be mapped; files from before PyTorch 1.6 are a plain pickle.
        return _read_torch(path, device, mapped=start[:1] == b"P")
    at, tar = _TAR
    others = ((b"", "a tar archive", "unpack it and name the file in it"),) if start[at : at + len(tar)] == tar else ()
    for begins, what, advice in (*others, *_OTHERS):
        if start.lstrip().startswith(begins):
            raise MicrotomeError(
                f"checkpoint {path} ({path.stat().st_size} bytes) cannot be read: it is {what}: {advice}"
            )
    raise _unreadable(path, ValueError("neither safetensors nor a zip archive or pickle of torch"))


def _check_file(path: Path) -> None:
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise MicrotomeError(f"checkpoint {path} does not exist{nearest(path.name, beside)}")
    if not path.is_file():
        raise MicrotomeError(f"checkpoint {path} is not a file: name the file itself")
    if not os.access(path, os.R_OK):
        raise MicrotomeError(f"checkpoint {path} cannot be read: permission denied")
    if path.stat().st_size == 0:
        raise MicrotomeError(f"checkpoint {path} is empty (0 bytes): copy or download it again")


def _read_torch(path: Path, device: str, mapped: bool) -> object:
    import torch

    if mapped and _is_program(path):
        raise MicrotomeError(
            f"checkpoint {path} is refused: it is a TorchScript program, not only tensors; nothing was executed. "
            f"Save its `state_dict()` and name that"
        )
    try:
        # Training scripts keep their options beside the weights: a Namespace holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            if path.suffix != ".safetensors":
                return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
            with path.open("rb") as file:  # by its name, torch would take the file for one of safetensors
                return torch.load(file, map_location=device, weights_only=True)
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


def _is_program(path: Path) -> bool:
    """Return whether a zip archive has what only a TorchScript program has, as torch tells them apart."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "constants.pkl" for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


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


def _chosen(content: object, within: str | None, path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """Return which entry of a file's content is taken, "" for all of it, and its tensors by name."""
    at = ""
    for part in (within or "").split("/") if within else ():
        if not isinstance(content, Mapping) or part not in content:
            known = [str(key) for key in content] if isinstance(content, Mapping) else []
            where = f" under {at!r}" if at else ""
            raise MicrotomeError(
                f"checkpoint {path} has no entry {part!r}{where} (it has {_some(known) or 'none'}): correct `within`"
                f"{nearest(part, known)}"
            )
        content, at = content[part], f"{at}/{part}" if at else part
    if _is_state_dict(content):
        return at, dict(content)  # type: ignore[call-overload]
    held = dict(_entries(content))
    usual = [entry for entry in _ENTRIES if isinstance(content, Mapping) and _is_state_dict(content.get(entry))]
    names = usual or list(held)
    if len(names) == 1:
        return f"{at}/{names[0]}" if at else names[0], dict(held.get(names[0]) or content[names[0]])  # type: ignore[index]
    inside = f"{at}/" if at else ""
    if names:
        raise MicrotomeError(
            f"checkpoint {path} holds several networks ({', '.join(names)}): name the one meant, for example "
            f"`within: {inside}{names[0]}`"
        )
    if isinstance(content, Mapping):
        what = f"a mapping with the entries {', '.join(repr(str(key)) for key in list(content)[:_SHOWN])}"
        what = what if content else "an empty mapping"
    else:
        what = f"a {type(content).__name__}"
    raise MicrotomeError(
        f"checkpoint {path} holds {what}{f' under {at!r}' if at else ''}; expected tensors by name, or those under "
        f"{' or '.join(repr(entry) for entry in _ENTRIES)}: save `network.state_dict()`"
    )


def _entries(content: object, depth: int = _DEPTH) -> Iterator[tuple[str, Mapping[str, torch.Tensor]]]:
    """Yield the entries of a mapping, by their place, that are tensors by name and not only single numbers."""
    if not isinstance(content, Mapping):
        return
    for name, value in content.items():
        if isinstance(name, str) and _is_state_dict(value):
            if any(tensor.ndim for tensor in value.values()):
                yield name, value
        elif isinstance(name, str) and depth > 1:
            yield from ((f"{name}/{at}", entry) for at, entry in _entries(value, depth - 1))


def _same_network(entry: Mapping[str, torch.Tensor], own: Set[str]) -> bool:
    """Return whether an entry has half or more of a network's keys, perhaps behind a prefix such as `module.`."""
    return 2 * sum(key in own or key.partition(".")[2] in own for key in entry) >= len(own)


def _listed(names: list[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


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
    taken = {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}
    if not taken:
        raise MicrotomeError(
            f"checkpoint {path}: {len(state)} of {len(state)} keys do not start with the prefix {prefix!r} "
            f"({_some(list(state))}): give the prefix of the network's keys, or none"
        )
    return taken


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
    prefixes = _prefixes(missing, extra)
    return "; ".join(parts) + (f": set `prefix: {' or '.join(map(repr, prefixes))}`" if prefixes else "")


def _prefixes(missing: list[str], extra: list[str]) -> list[str]:
    """Return the prefixes, such as `module.`, behind which the missing keys are among the extra ones."""
    if not extra or not missing:
        return []
    known, first = set(extra), missing[0]
    found = [key[: -len(first)] for key in extra if key.endswith(f".{first}")]
    found = [prefix for prefix in found if all(prefix + key in known for key in missing)]
    if found or not extra[0].endswith(tuple(missing)):
        return found
    wanted = max((key for key in missing if extra[0].endswith(key)), key=len)
    prefix = extra[0][: len(extra[0]) - len(wanted)]
    return [prefix] if prefix and all(key.startswith(prefix) for key in extra) else []


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
