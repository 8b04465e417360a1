"""Networks of timm, and its published weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath
from urllib.parse import urlsplit

import timm
import torch

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import checkpoint
from pipeline.networks.build import published_file
from pipeline.networks.published import Published

# Arguments that read or fetch weights; a network's weights come from `weights` and nowhere else.
_FETCHING = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")


def builder(spec: NetworkSpec) -> Callable[..., torch.nn.Module]:
    name = _known(spec)
    return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)


def state(spec: NetworkSpec, device: str) -> dict[str, torch.Tensor]:
    """Return the weights as timm loads them: it translates the keys of files that others published.

    timm leaves a head random if the wanted number of classes differs from the file's. Here, the file's own head is
    loaded, or left out with `num_classes: 0`.
    """
    path = published_file(spec)
    read = checkpoint.shapes if device == "meta" else checkpoint.read
    wanted = dict(spec.arguments)
    headless = wanted.get("num_classes") == 0
    if headless:
        del wanted["num_classes"]
    published = timm.get_pretrained_cfg(_known(spec)).num_classes
    if wanted.get("num_classes", published) != published:
        raise MicrotomeError(
            f"{spec.architecture}: num_classes is {wanted['num_classes']}, its published weights have {published} "
            f"classes: leave it out, or give 0 for the network without its head"
        )
    overlay = {"state_dict": dict(read(path))}
    network = timm.create_model(_known(spec), pretrained=True, pretrained_cfg_overlay=overlay, **wanted)
    if headless:
        network.reset_classifier(0)
    return network.state_dict()


def describe(spec: NetworkSpec) -> Published:
    published = timm.get_pretrained_cfg(_known(spec))
    if spec.published and not published.has_weights:
        tagged = timm.list_pretrained(f"{spec.architecture.partition('.')[0]}*")
        raise MicrotomeError(f"timm publishes no weights for {spec.architecture!r}{nearest(spec.architecture, tagged)}")
    names = []
    if published.hf_hub_id:
        name = published.hf_hub_filename or "pytorch_model.bin"
        safe = name.replace("pytorch_model", "model") if not published.hf_hub_filename else name
        names = list(dict.fromkeys([str(PurePosixPath(safe).with_suffix(".safetensors")), name]))
    return Published(
        weights=spec.weights,
        repository=published.hf_hub_id,
        repository_files=names,
        file=urlsplit(published.url).path.rpartition("/")[2] if published.url and not names else None,
        mean=published.mean,
        std=published.std,
        size=published.input_size[1:],
    )


def fetch(spec: NetworkSpec) -> None:
    published = timm.get_pretrained_cfg(_known(spec))
    if not published.hf_hub_id:
        torch.hub.load_state_dict_from_url(published.url, map_location="meta", weights_only=True)
        return
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    *safe, last = describe(spec).repository_files
    for name in safe:
        try:
            hf_hub_download(published.hf_hub_id, name)
        except EntryNotFoundError:
            continue
        return
    hf_hub_download(published.hf_hub_id, last)


def _known(spec: NetworkSpec) -> str:
    assert spec.timm is not None
    refused = [name for name in _FETCHING if name in spec.arguments]
    if refused:
        raise MicrotomeError(
            f"argument {refused[0]!r} of {spec.architecture} would read weights: "
            f"give a checkpoint or `pretrained` as `weights` and leave it out of `arguments`"
        )
    name, _, tag = spec.timm.partition(".")
    known = timm.list_models()
    if name not in known:
        raise MicrotomeError(f"network {name!r} is not in timm {timm.__version__}{nearest(name, known)}")
    tags = timm.list_pretrained(f"{name}.*") if tag else []
    if tag and spec.timm not in tags:
        raise MicrotomeError(
            f"network {name!r} of timm {timm.__version__} has no tag {tag!r}{nearest(spec.timm, tags)}; "
            f"it has {', '.join(each.partition('.')[2] for each in tags) or 'none'}"
        )
    return spec.timm
