"""Published weights: which file a name stands for, where it is on this machine, and what images it expects.

Importing a library takes seconds, so it is queried in a separate process, and its answers are cached by its version.
Whether the file exists is checked each time, without torch. Nothing is fetched without `download: true`.

    python -m pipeline.networks.published request.json response.json

answers a list of requests in one process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from pipeline.config.core import Core
from pipeline.config.networks import Network, NetworkSpec, Preprocessing, Segmenter
from pipeline.errors import MicrotomeError
from pipeline.networks.build import library, missing
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import FileDigests
from pipeline.storage.redact import home
from pipeline.workers.processes import in_own_process

MEMORY = "published.json"
DESCRIBED = ("preprocessor_config.json", "processor_config.json")  # what images a model of transformers expects
_SAFE, _PICKLED = ("model.safetensors", "pytorch_model.bin")


class Published(BaseModel):
    """What a library says about a network and its published weights.

    Attributes
    ----------
    weights : the name, as the library writes it.
    file, hash_prefix : name of the file in torch's cache, and the beginning of its sha256.
    repository, repository_files : on the hub, and the file names to look for there, the safest first.
    arguments : those that the weights require of the builder.
    mean, std : of the preprocessing; None if the library does not state them.
    size, resize : (height, width) of the images, and the short side before the crop.
    """

    model_config = ConfigDict(extra="forbid")

    weights: str = ""
    file: str | None = None
    hash_prefix: str | None = None
    repository: str | None = None
    repository_files: list[str] = []
    arguments: dict[str, Any] = {}
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None
    resize: int | None = None


class Request(BaseModel):
    """A query to a library, or a download by it."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["describe", "fetch"]
    network: NetworkSpec


def resolve(config: Core, scratch: Path, digests: FileDigests) -> Core:
    """Return the configuration with every library network, and every segmenter that a data set names, made explicit.

    Published weights get the path of their file as `local`, and the arguments that they require of the builder. Means
    and deviations that are not given become those that the library states.

    Raises
    ------
    MicrotomeError
        All that is wrong: a library that is not installed, an unknown name, a file that is missing or differs.
    """
    sections: dict[str, Network | Segmenter] = {f"network {name!r}": one for name, one in config.networks.items()}
    named = {source for dataset in config.datasets.values() for source in dataset.concepts}
    sections |= {f"segmenter {name!r}": one for name, one in config.segmenters.items() if name in named}
    found, errors = look_up({name: NetworkSpec.of(one) for name, one in sections.items()}, scratch, digests)
    for name, (spec, published) in found.items():
        try:
            preprocessing = _preprocessing(name, sections[name], published)
        except MicrotomeError as error:
            errors[name] = str(error)
            continue
        sections[name] = sections[name].model_copy(update=spec.model_dump() | {"preprocessing": preprocessing})
    if errors:
        raise MicrotomeError("\n  ".join(f"{name}: {error}" for name, error in errors.items()))
    networks = {name: sections[f"network {name!r}"] for name in config.networks}
    segmenters = {name: sections.get(f"segmenter {name!r}", one) for name, one in config.segmenters.items()}
    return config.model_copy(update={"networks": networks, "segmenters": segmenters})


def look_up(
    specs: Mapping[str, NetworkSpec], scratch: Path, digests: FileDigests
) -> tuple[dict[str, tuple[NetworkSpec, Published]], dict[str, str]]:
    """Return each library network with `local` and `arguments` filled in, and what its library says; and the errors.

    Networks without anything to look up (modules, torchvision's with a checkpoint) are in neither.
    """
    wanted = {name: spec for name, spec in specs.items() if _has_more(spec)}
    described, errors = _describe({k: v for k, v in wanted.items() if v.transformers is None}, scratch)
    places: dict[str, Path | None] = {}
    for name in wanted:
        if name not in errors:
            try:
                places[name] = _place(wanted[name], described.get(name))
            except MicrotomeError as error:
                errors[name] = str(error)
    absent = {name: wanted[name] for name, place in places.items() if place is None and wanted[name].download}
    for name, answer in _ask({name: Request(action="fetch", network=spec) for name, spec in absent.items()}).items():
        if "error" in answer:
            errors[name] = answer["error"]
        else:
            places[name] = _place(wanted[name], described.get(name))
    found = {}
    for name, place in places.items():
        spec = wanted[name]
        try:
            if place is None and (spec.published or spec.transformers is not None):
                raise _absent(spec, described.get(name))
            found[name] = _explicit(spec, described.get(name), place, digests)
        except MicrotomeError as error:
            errors.setdefault(name, str(error))
    return found, errors


def advice(network: Network, size: tuple[int, int], scratch: Path) -> str | None:
    """Return a warning if a data set's images do not have the size for which the weights were published."""
    spec = NetworkSpec.of(network)
    if not spec.published:
        return None
    published = _of_folder(Path(spec.local or "")) if spec.transformers else _remembered(spec, scratch)
    if published is None or published.size is None or tuple(published.size) == tuple(size):
        return None
    height, width = published.size
    first = f", after a resize of the short side to {published.resize}" if published.resize else ""
    return (
        f"images are {size[0]}x{size[1]}, the weights {spec.weights} of {spec.architecture} were published for "
        f"{height}x{width}{first}"
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights of a transformers model: safetensors if there are any, in parts or in one."""
    for name in (_SAFE, _PICKLED):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            parts = sorted(set(_json(index).get("weight_map", {}).values()))
            # The index is data: it may only name files of its own folder.
            wrong = [part for part in parts if not isinstance(part, str) or Path(part).name != part]
            if wrong or not parts:
                raise MicrotomeError(
                    f"{index} names {wrong[0]!r} as a file of weights" if wrong else f"{index} is empty"
                )
            return [folder / part for part in parts]
    beside = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "nothing"
    raise MicrotomeError(f"{folder} holds no {_SAFE} or {_PICKLED}, whole or in parts (it holds {beside})")


def answer(requests: list[Any]) -> list[dict[str, Any]]:
    """Return each request with its `result` or the `error` to show."""
    answers: list[dict[str, Any]] = []
    for each in requests:
        request = Request.model_validate(each)
        spec = request.network
        try:
            if request.action == "describe":
                answers.append({"result": library(spec).describe(spec).model_dump()})
            else:
                _fetch(spec)
                answers.append({"result": None})
        except MicrotomeError as error:
            answers.append({"error": str(error)})
    return answers


def main(request_path: str, response_path: str) -> None:
    """Read a JSON list of requests; write the JSON list of answers, in the same order."""
    requests = json.loads(Path(request_path).read_text())
    Path(response_path).write_text(json.dumps(answer(requests)))


def _fetch(spec: NetworkSpec) -> None:
    print(f"fetching {spec.weights} of {spec.architecture}", file=sys.stderr)
    try:
        library(spec).fetch(spec)
    except MicrotomeError:
        raise
    # Each library raises its own errors: no connection, no such repository, a digest that differs, a full disk.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise MicrotomeError(
            f"{spec.weights} of {spec.architecture} cannot be fetched ({type(error).__name__}: {reason}): "
            f"give a copy as `local`"
        ) from error


def _has_more(spec: NetworkSpec) -> bool:
    return spec.published or spec.timm is not None or spec.transformers is not None


def _describe(specs: Mapping[str, NetworkSpec], scratch: Path) -> tuple[dict[str, Published], dict[str, str]]:
    """Return what the libraries say about networks, from the cache or a new query; and their errors."""
    described: dict[str, Published] = {}
    errors: dict[str, str] = {}
    unknown = {}
    for name, spec in specs.items():
        try:
            kept = _remembered(spec, scratch)
        except MicrotomeError as error:
            errors[name] = str(error)
            continue
        if kept is None:
            unknown[name] = spec
        else:
            described[name] = kept
    memory = _memory(scratch)
    for name, told in _ask({n: Request(action="describe", network=s) for n, s in unknown.items()}).items():
        if "error" in told:
            errors[name] = told["error"]
        else:
            described[name] = Published.model_validate(told["result"])
            memory[_key(specs[name])] = told["result"]
    if unknown:
        write_atomically(scratch / MEMORY, json.dumps(memory, indent=1))
    return described, errors


def _ask(requests: Mapping[str, Request]) -> dict[str, dict[str, Any]]:
    """Return the answers of a process that imports the libraries; without requests, none is started."""
    if not requests:
        return {}
    asked = [request.model_dump() for request in requests.values()]
    return dict(
        zip(
            requests,
            in_own_process("pipeline.networks.published", asked, "the look-up of published networks"),
            strict=True,
        )
    )


def _memory(scratch: Path) -> dict[str, Any]:
    try:
        kept = json.loads((scratch / MEMORY).read_bytes())
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _remembered(spec: NetworkSpec, scratch: Path) -> Published | None:
    kept = _memory(scratch).get(_key(spec))
    return None if kept is None else Published.model_validate(kept)


def _key(spec: NetworkSpec) -> str:
    """Return what an answer depends on: the library's version, the network, and the arguments, which may be refused."""
    assert spec.library is not None
    weights = spec.weights if spec.published else ""
    return json.dumps([spec.library, installed(spec.library), spec.architecture, weights, sorted(spec.arguments)])


def installed(name: str) -> str:
    """Return the version of a library."""
    try:
        return version(name)
    except PackageNotFoundError as error:
        raise missing(name) from error


def _place(spec: NetworkSpec, published: Published | None) -> Path | None:
    """Return where the published file (transformers: folder) is on this machine, or None."""
    if spec.local is not None:
        place = Path(spec.local)
        if not place.exists():
            raise MicrotomeError(f"`local: {spec.local}` does not exist")
        return place
    if spec.transformers is not None:
        return _folder(spec)
    assert published is not None
    if not spec.published:
        return None
    for name in published.repository_files:
        if (path := _in_hub(published.repository or "", name)) is not None:
            return path
    if published.file is not None and (path := torch_cache() / published.file).is_file():
        return path
    return None


def _folder(spec: NetworkSpec) -> Path | None:
    assert spec.transformers is not None
    folder = Path(spec.transformers)
    if folder.is_dir():
        return folder
    installed("transformers")
    described = _in_hub(spec.transformers, "config.json")
    if described is None:
        return None
    if spec.published:
        try:
            whole = all(path.is_file() for path in weight_files(described.parent))
        except MicrotomeError:
            return None
        return described.parent if whole else None
    return described.parent


def _in_hub(repository: str, name: str) -> Path | None:
    """Return a file in the hub's cache, or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, name)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def torch_cache() -> Path:
    """Return where torch keeps the files that it fetched, as `torch.hub.get_dir` does."""
    caches = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    found = Path(os.environ.get("TORCH_HOME", os.path.join(caches, "torch")), "hub", "checkpoints")  # noqa: PTH118
    return found.expanduser() if home() is not None else found


def _absent(spec: NetworkSpec, published: Published | None) -> MicrotomeError:
    if spec.transformers is not None:
        where = f"{spec.transformers!r} is neither a folder nor, as a whole, in the cache of the hub"
        return MicrotomeError(f"{where}: set `download: true`, or give its folder as `local`")
    assert published is not None
    if published.repository:
        where = f"{' or '.join(published.repository_files)} of {published.repository} is not in the cache of the hub"
    else:
        where = f"{torch_cache() / (published.file or '')} does not exist"
    return MicrotomeError(
        f"weights {published.weights} of {spec.architecture}: {where}: put the file there, give its path as `local`, "
        f"or set `download: true`"
    )


def _explicit(
    spec: NetworkSpec, published: Published | None, place: Path | None, digests: FileDigests
) -> tuple[NetworkSpec, Published]:
    if spec.transformers is not None:
        assert place is not None
        if not (place / "config.json").is_file():
            raise MicrotomeError(f"{place} has no config.json: name the folder that `save_pretrained` wrote")
        if spec.published:
            weight_files(place)
        return spec.model_copy(update={"local": str(place)}), _of_folder(place)
    assert published is not None
    if not spec.published:
        return spec, published
    assert place is not None
    if published.hash_prefix is not None and not (found := digests(place)).startswith(published.hash_prefix):
        raise MicrotomeError(
            f"{place} is not the file published as {published.weights}: its sha256 is {found[:16]}..., expected "
            f"{published.hash_prefix}...: remove it and fetch it again, or name it as `weights: path`"
        )
    changes = {"weights": published.weights, "local": str(place), "arguments": published.arguments | spec.arguments}
    return spec.model_copy(update=changes), published


def _of_folder(folder: Path) -> Published:
    """Return what the files beside a transformers model say about images."""
    said: dict[str, Any] = {}
    for name in DESCRIBED:
        if (folder / name).is_file():
            said = _json(folder / name)
            said = said.get("image_processor", said)
            break
    if not said:
        return Published()
    if said.get("do_flip_channel_order"):
        raise MicrotomeError(
            f"{folder} expects blue, green, red, and images here are red, green, blue: "
            f"wrap it as `module: path.py:function`"
        )
    mean, std = said.get("image_mean"), said.get("image_std")
    if said.get("do_normalize") is False:
        mean, std = [0.0] * 3, [1.0] * 3
    factor = 255 * float(said.get("rescale_factor", 1 / 255)) if said.get("do_rescale", True) else 255.0
    if abs(factor - 1) > 1e-3 and mean and std:
        mean, std = [value / factor for value in mean], [value / factor for value in std]
    crop, size = said.get("crop_size") or {}, said.get("size") or {}
    size, crop = ({"height": each, "width": each} if isinstance(each, int) else each for each in (size, crop))
    exact = crop if {"height", "width"} <= set(crop) else size
    return Published(
        weights="pretrained",
        mean=mean,
        std=std,
        size=(exact["height"], exact["width"]) if {"height", "width"} <= set(exact) else None,
        resize=size.get("shortest_edge"),
    )


def _preprocessing(name: str, network: Network | Segmenter, published: Published) -> Preprocessing:
    """Complete the given preprocessing with what the library states; report a difference between the two."""
    own = network.preprocessing
    given = own.model_fields_set if "preprocessing" in network.model_fields_set else set()
    stated = {key: value for key in ("mean", "std") if (value := getattr(published, key)) is not None}
    channels = network.arguments.get("in_chans", network.arguments.get("num_channels", 3))
    if channels == 1 and {"mean", "std"} - given:
        raise MicrotomeError("takes grey images: give one number each as `preprocessing: {mean: [..], std: [..]}`")
    for key in given & set(stated):
        if tuple(getattr(own, key)) != stated[key] and channels == 3:
            print(
                f"{name}: preprocessing.{key} is {list(getattr(own, key))}, "
                f"{network.library} states {list(stated[key])} for {network.architecture}",
                file=sys.stderr,
            )
    return Preprocessing(**(own.model_dump() | stated | {key: getattr(own, key) for key in given}))


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MicrotomeError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise MicrotomeError(f"{path} holds a {type(value).__name__}, expected a mapping")
    return value


if __name__ == "__main__":
    main(*sys.argv[1:])
