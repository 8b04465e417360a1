"""Segmentation networks as sources of concepts: the s_c(x, p) of Bau et al. (PNAS 2020).

A network gives one or several outputs (image, channel, y, x). A category takes one of them, or a range of its channels.
The label of a pixel is the class whose channel is highest there. It is nothing if that class is void or, in a class
list with several categories, belongs to another one.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import PIXELS, TRUTH
from pipeline.config.core import Core
from pipeline.config.datasets import AnyDataset
from pipeline.config.networks import Head, NetworkSpec, Segmenter
from pipeline.data import kinds as datasets
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import identity
from pipeline.networks.build import published_file
from pipeline.storage.identity import FileDigests, digest

if TYPE_CHECKING:
    import torch

    from pipeline.data.label_maps import ClassList

COLOUR = f"{PIXELS}/colour"  # the category computed from the pixels


DEFAULT_OUTPUTS = ("out", "logits")  # torchvision's and transformers' names of the main scores
MODEL = "model"  # in place of a class list: the names that come with the network
QUERIES = ("class_queries_logits", "masks_queries_logits")
# By transformers' model type: the size at which its masks become probabilities; None: as they are.
MASK_SIZES = {"mask2former": (384, 384), "maskformer": None}


def settings(spec: Segmenter, digests: FileDigests) -> dict[str, Any]:
    """Return what determines this source's label maps, besides the pixels; class lists count by their content."""
    return {
        "architecture": identity.architecture(spec, digests),
        "checkpoint": identity.weights_digest(spec, digests),
        "prefix": spec.prefix,
        **({} if spec.within is None else {"within": spec.within}),
        "preprocessing": spec.preprocessing.model_dump(),
        "resize": spec.resize,
        "numerics": spec.numerics.model_dump(),
        "categories": {
            name: head.model_dump()
            | {"classes": MODEL if head.classes == MODEL else class_list(name, head, spec).digest(digests)}
            for name, head in spec.categories.items()
        },
    }


@dataclass(frozen=True)
class Model:
    """A segmenter as tasks name it; `weights` is the id of those that the plan was made with."""

    name: str
    spec_json: str
    weights: str

    @property
    def spec(self) -> Segmenter:
        return Segmenter.model_validate_json(self.spec_json)


@dataclass(frozen=True)
class Channels:
    """A category in a network's output: channels `start` to `stop`.

    `concepts` are the names of its classes. `number` has, for each channel, the position of its class among them, from
    1, and 0 for nothing.
    """

    output: str
    start: int
    stop: int
    concepts: tuple[str, ...]
    number: tuple[int, ...]


def concepts(spec: Segmenter) -> dict[str, list[str]]:
    """Return concept names by category, without building the network."""
    return {name: list(class_list(name, head, spec).concepts().values()) for name, head in spec.categories.items()}


def class_list(category: str, head: Head, spec: Segmenter) -> ClassList:
    """Return the class list of a category, from its file or from the configuration that comes with the network."""
    from pipeline.data.label_maps import ClassList, read_class_list

    if head.classes != MODEL:
        return read_class_list(head.classes, head.void, category)
    if spec.transformers is None:
        raise MicrotomeError(
            f"category {category!r}: `classes: {MODEL}` is for models of transformers: give a class list"
        )
    path = published_file(spec) / "config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("id2label", {})
    classes = ClassList(path, {int(id): str(name).strip() for id, name in named.items()}, frozenset(head.void))
    twice = [name for name, count in Counter(classes.concepts().values()).items() if count > 1]
    if twice or not classes.concepts():
        what = f"two classes have the name {twice[0]!r}" if twice else "it names no classes (id2label)"
        raise MicrotomeError(f"category {category!r}: {path}: {what}: give a class list as `classes: file`")
    return classes


@functools.cache
def platform(gpus: bool) -> dict[str, str]:
    """Return what else determines the last bits of scores: device kind and torch's minor version.

    torch is not imported to find out.
    """
    return {
        "dtype": "float32",
        "device": "cuda" if gpus else "cpu",
        "torch": ".".join(version("torch").split(".")[:2]),
    }


def inspect(spec: Segmenter, size: tuple[int, int]) -> dict[str, Channels]:
    """Build the network on the meta device, check its checkpoint's names and shapes, and find every category.

    `size` is (height, width) of the images. If that fails on the meta device, the network is built on the CPU.

    Raises `MicrotomeError` for everything that would be refused later: architecture, checkpoint, image size, outputs,
    channels, class lists.
    """
    from pipeline.networks.build import load_weights

    built, outputs, _ = _built(spec, (3, *(spec.resize or size)))
    load_weights(built, NetworkSpec.of(spec), shapes_only=True)
    return {
        category: channels(category, head, outputs, class_list(category, head, spec))
        for category, head in spec.categories.items()
    }


def memory_need(spec: Segmenter, size: tuple[int, int]) -> int:
    """Return the bytes that a worker needs to label images of a size, (height, width), besides images and label maps.

    They cover the weights as loaded and as used, and a forward pass of a micro-batch: without gradients, it holds an
    operation's input, output and workspace.
    """
    height, width = spec.resize or size
    built, outputs, largest = _built(spec, (3, height, width))
    parameters = sum(parameter.numel() for parameter in built.parameters())
    forward = 3 * height * width + 4 * largest + sum(output.numel() for output in outputs.values())
    return 4 * (3 * parameters + spec.numerics.micro_batch * forward)


def _built(spec: Segmenter, shape: tuple[int, int, int]) -> tuple[torch.nn.Module, dict[str, torch.Tensor], int]:
    """Return the network on the meta device, its scores for one image, and the size of its largest module output.

    The size is in values. The network runs on the CPU if values are needed.
    """
    import torch

    from pipeline.networks.build import build

    largest = 0

    def note(module: torch.nn.Module, given: Any, output: Any) -> None:
        nonlocal largest
        if isinstance(output, torch.Tensor):
            largest = max(largest, output.numel())

    def run(network: torch.nn.Module, device: str) -> dict[str, torch.Tensor]:
        hooks = [module.register_forward_hook(note) for module in network.modules()]
        try:
            with torch.inference_mode():
                return scores(network(torch.zeros((1, *shape), device=device)), network)
        finally:
            for hook in hooks:
                hook.remove()

    try:
        network = build(spec, device="meta")
        outputs = run(network, "meta")
        return network, outputs, largest
    # Networks that need values to be built or run fail on the meta device, each in its own way.
    except Exception:
        network = build(spec)
    try:
        outputs = run(network, "cpu")
    except MicrotomeError:
        raise
    except Exception as error:
        raise MicrotomeError(
            f"{spec.architecture} cannot take images of shape {shape}: {type(error).__name__}: {error}"
        ) from error
    return network.to("meta"), outputs, largest


def scores(output: Any, net: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the scores (image, channel, y, x) in a segmentation network's output, by name; a bare tensor is "".

    Other entries of a mapping are left out. Masks with classes of their own, as in Mask2Former, become `logits`.
    """
    import torch

    from kernels.images.segmentation import merged_masks

    if isinstance(output, torch.Tensor):
        output = {"": output}
    if not isinstance(output, Mapping):
        raise MicrotomeError(f"a segmentation network returned {type(output).__name__}, expected a tensor or a mapping")
    if {*QUERIES} <= {*output}:
        kind = getattr(getattr(net, "config", None), "model_type", None)
        if kind not in MASK_SIZES:
            raise MicrotomeError(
                f"how masks of {kind or type(net).__name__} become classes is not known here, only for "
                f"{', '.join(MASK_SIZES)}: return scores from a function of yours, `module: path.py:function`"
            )
        pairs = zip(*(output[key].float() for key in QUERIES), strict=True)
        return {"logits": torch.stack([merged_masks(own, masks, MASK_SIZES[kind]) for own, masks in pairs])}
    found = {key: value for key, value in output.items() if isinstance(value, torch.Tensor) and value.ndim == 4}
    if not found:
        held = ", ".join(f"{key} {tuple(value.shape)}" for key, value in output.items() if hasattr(value, "shape"))
        raise MicrotomeError(f"a segmentation network returned no scores (image, channel, y, x), but {held or 'none'}")
    return found


def channels(category: str, head: Head, outputs: Mapping[str, torch.Tensor], classes: ClassList) -> Channels:
    """Find a category in the outputs of a network."""
    key = _output(category, head, outputs)
    count = outputs[key].shape[1]
    start, last = head.channels or (0, count - 1)
    if last >= count:
        raise MicrotomeError(
            f"category {category!r}: channels {start} to {last} of output {key!r}, which has {count} (0 to {count - 1})"
        )
    concepts = classes.concepts()
    wanted = range(head.first, head.first + last + 1 - start)
    lacking = [id for id in wanted if id not in classes.names and id not in head.void]
    beyond = sorted({*concepts, *head.void} - {*wanted})
    if lacking or beyond:
        raise MicrotomeError(
            f"category {category!r}: the {len(wanted)} channels of output {key!r} are the ids {wanted[0]} to "
            f"{wanted[-1]} of {classes.path}, which has {min(classes.names)} to {max(classes.names)}"
            + (f"; no name for {_some(lacking)}" if lacking else "")
            + (f"; no channel for {_some(beyond)}" if beyond else "")
            + _advice(wanted, lacking, beyond)
        )
    place = {id: at + 1 for at, id in enumerate(concepts)}
    return Channels(key, start, last + 1, tuple(concepts.values()), tuple(place.get(id, 0) for id in wanted))


def _output(category: str, head: Head, outputs: Mapping[str, torch.Tensor]) -> str:
    """Return the name of the output that a category uses."""
    if head.output is None:
        if len(outputs) == 1:
            return next(iter(outputs))
        for key in DEFAULT_OUTPUTS:
            if key in outputs:
                return key
        raise MicrotomeError(f"category {category!r}: name its `output`, one of {', '.join(outputs)}")
    if head.output not in outputs:
        known = ", ".join(outputs) if "" not in outputs else "one without a name: leave `output` out"
        raise MicrotomeError(
            f"category {category!r}: no output {head.output!r} (there are: {known}){nearest(head.output, outputs)}"
        )
    return head.output


def _advice(wanted: range, lacking: list[int], beyond: list[int]) -> str:
    """Return what to set if channels and class list agree except for their beginning."""
    if lacking == [wanted[0]] and beyond == [wanted[-1] + 1]:
        return f": if the first channel is {wanted[0] + 1}, set `first: {wanted[0] + 1}`"
    if lacking == [wanted[0]] and not beyond:
        return f": if the first channel is background, set `void: [{wanted[0]}]`"
    return ""


def _some(ids: list[int]) -> str:
    return ", ".join(map(str, ids[:4])) + (", ..." if len(ids) > 4 else "")


def label_maps(model: Model, pixels: np.ndarray, categories: Iterable[str]) -> dict[str, np.ndarray]:
    """Return label maps uint16 (image, y, x) by category, of images uint8 (image, channel, y, x). Runs on a worker.

    Concepts are numbered from 1, in the order of the category. Images run in micro-batches of a fixed size, the last
    one padded, so that a map depends on its shard alone. Raises `NonFiniteScoresError` with the place of the image
    whose scores hold a NaN or an infinity.
    """
    import torch

    from kernels.images.segmentation import best_class
    from pipeline.networks.forward import normalise

    size = pixels.shape[2], pixels.shape[3]
    spec = model.spec
    net, found = _network(model, size)
    number = {name: torch.tensor(found[name].number, dtype=torch.int32) for name in categories}
    maps = {name: np.zeros((len(pixels), *size), np.uint16) for name in number}
    step = spec.numerics.micro_batch
    for at in range(0, len(pixels), step):
        batch = torch.from_numpy(pixels[at : at + step])
        count = len(batch)
        batch = torch.cat([batch, batch.new_zeros((step - count, *batch.shape[1:]))])
        with torch.inference_mode():
            outputs = scores(net(resized(normalise(batch, spec), spec)), net)
            for name, own in number.items():
                head = found[name]
                for i in range(count):
                    part = outputs[head.output][i, head.start : head.stop].float()
                    if not bool(part.isfinite().all()):
                        raise NonFiniteScoresError(at + i)
                    maps[name][at + i] = own[best_class(part, size).cpu()].numpy()
    return maps


class NonFiniteScoresError(Exception):
    """A score is NaN or infinite; args: place of the image."""


def resized(x: torch.Tensor, spec: Segmenter) -> torch.Tensor:
    """Resize float images (image, channel, y, x) to the network's size: bilinear, antialiased if it shrinks them."""
    import torch

    if spec.resize is None:
        return x
    x = torch.nn.functional.interpolate(x, spec.resize, mode="bilinear", align_corners=False, antialias=True)
    return x.contiguous(memory_format=torch.channels_last) if spec.numerics.channels_last else x


@functools.lru_cache(maxsize=2)
def _network(model: Model, size: tuple[int, int]) -> tuple[torch.nn.Module, dict[str, Channels]]:
    """Return this worker's copy of a segmenter, loaded once, and where its categories are."""
    from pipeline.networks.build import load
    from pipeline.networks.checkpoint import sha256
    from pipeline.networks.forward import placed

    spec = model.spec
    if digest(identity.weights_digest(spec, sha256)) != model.weights:
        raise MicrotomeError(f"segmenter {model.name!r}: its weights were changed during the run: run again")
    return placed(load(spec), spec), inspect(spec, size)


def wanted_categories(dataset: AnyDataset, wanted: Core) -> dict[str, Sequence[str]]:
    """Return concept names by category, of the sources that the configuration names, in its order."""
    from kernels.images.colour_names import COLOURS

    found: dict[str, Sequence[str]] = {}
    for source in dataset.concepts:
        if source == PIXELS:
            found[COLOUR] = list(COLOURS)
        else:
            truth = source == TRUTH
            own = datasets.truth_categories(dataset) if truth else concepts(wanted.segmenters[source])
            found |= {f"{source}/{name}": list(names) for name, names in own.items()}
    return found
