"""Vision models of transformers, from a folder: config.json is data, and only the library's own code runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils import logging

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks import checkpoint
from pipeline.networks.build import published_file
from pipeline.networks.published import weight_files

_SHOWN = 4
# An error here reports what is not loaded; a table on the terminal is not needed.
logging.set_verbosity_error()
logging.disable_progress_bar()


def builder(spec: NetworkSpec) -> Callable[..., torch.nn.Module]:
    def make(**arguments: Any) -> torch.nn.Module:
        kind, config, own = _model(spec, arguments)
        return kind(config, **own)

    return make


def state(spec: NetworkSpec, device: str) -> dict[str, torch.Tensor]:
    """Return the weights as transformers loads them: it translates the keys of older checkpoints.

    The keys have to match exactly. With `arguments: {architectures: [...]}`, only a part of the checkpoint is wanted,
    and the rest is ignored.
    """
    if device == "meta":
        raise NotImplementedError("transformers loads values only")
    folder = published_file(spec)
    kind, config, own = _model(spec, spec.arguments)
    tensors: dict[str, torch.Tensor] = {}
    for path in weight_files(folder):
        tensors |= checkpoint.read(path)
    network, told = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True, **own,
    )  # fmt: skip
    wrong = [f"{key} {tuple(found)}, expected {tuple(expected)}" for key, found, expected in told["mismatched_keys"]]
    left = [] if "architectures" in spec.arguments else sorted(told["unexpected_keys"])
    missing = sorted(told["missing_keys"])
    parts = [
        f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for names, what in ((missing, "keys missing"), (left, "keys too many"), (wrong, "of another shape"))
        if names
    ]
    if parts or told["error_msgs"]:
        pooler = missing and all("pooler." in key for key in missing)
        advice = ": set `arguments: {add_pooling_layer: false}`" if pooler else ""
        raise MicrotomeError(
            f"checkpoint in {folder} does not fit {kind.__name__}: {'; '.join(parts + told['error_msgs'])}{advice}"
        )
    return network.state_dict()


def fetch(spec: NetworkSpec) -> None:
    from huggingface_hub import snapshot_download

    assert spec.transformers is not None
    described = ["config.json", "preprocessor_config.json", "processor_config.json"]
    folder = Path(snapshot_download(spec.transformers, allow_patterns=[*described, "model*.safetensors*"]))
    if spec.published and not any(folder.glob("model*.safetensors")):
        snapshot_download(spec.transformers, allow_patterns=[*described, "pytorch_model*.bin*"])


def _model(spec: NetworkSpec, arguments: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """Return the class that config.json names, its configuration, and the arguments that belong to the class."""
    folder = published_file(spec)
    arguments = dict(arguments)
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise MicrotomeError(
            f"{folder / 'config.json'} is not a configuration that transformers {transformers.__version__} knows: "
            f"{reason}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise MicrotomeError(
            f"{folder}: quantised weights are not supported: take the checkpoint in float16 or float32"
        )
    kind = _class(folder, arguments.pop("architectures", None) or config.architectures)
    if kind.config_class is not None and not isinstance(config, kind.config_class):
        config = kind.config_class.from_pretrained(folder, local_files_only=True)
    taken = list(inspect.signature(kind.__init__).parameters)[2:]
    own = {key: arguments.pop(key) for key in list(arguments) if key in taken}
    for key, value in arguments.items():
        if not hasattr(config, key):
            raise MicrotomeError(
                f"argument {key!r} is no entry of the configuration of {kind.__name__}"
                f"{nearest(key, [*config.to_dict(), *taken])}"
            )
        setattr(config, key, value)
    # Neither a kernel named in a configuration, which would be fetched and run, nor half precision.
    config._attn_implementation = None
    for each in (config, *(getattr(config, name) for name in config.sub_configs)):
        if each is not None:
            each.dtype = torch.float32
    return kind, config, own


def _class(folder: Path, names: Any) -> Any:
    if not (isinstance(names, (list, tuple)) and len(names) == 1 and isinstance(names[0], str)):
        raise MicrotomeError(
            f"{folder / 'config.json'} names no single model (architectures: {names!r}): "
            f"give it as `arguments: {{architectures: [ViTForImageClassification]}}`"
        )
    (name,) = names
    kind: Any = getattr(transformers, name, None)
    known = inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel)
    if not known:
        raise MicrotomeError(
            f"{name!r} is no model of transformers {transformers.__version__}{nearest(name, dir(transformers))}; "
            f"code that comes with a checkpoint is never run"
        )
    model: Any = kind
    if model.main_input_name != "pixel_values":
        raise MicrotomeError(
            f"{name} takes {model.main_input_name}, expected a model of images alone: of one with several inputs name "
            f"the part for images, `arguments: {{architectures: [CLIPVisionModel]}}` say"
        )
    return model
