"""Inspect `layers: auto` of many networks of torchvision and timm with random weights, and print a table.

    python tests/bench/inspect_many.py [--most 30e6] [--seconds 3600] [--only PATTERN]

Networks come in the order of their size. A row says accepted, refused with the reason, or wrong: an accepted layer of
which no change of the image shows at its place, found by other squares than those of the inspection.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.config.networks import NetworkSpec
from pipeline.errors import MicrotomeError
from pipeline.networks.build import build
from pipeline.networks.inspection import inspect
from pipeline.networks.layer import LayerInfo
from pipeline.networks.layers import Recorder, to_maps

LESS = 0.8  # of the largest change of any quarter


def families() -> list[NetworkSpec]:
    """Return one network of each family, and the image classifiers of torchvision."""
    import timm
    import torchvision

    found = [NetworkSpec(torchvision=name) for name in torchvision.models.list_models(torchvision.models)]
    seen = set()
    for name in timm.list_models():
        family = name.split("_")[0].rstrip("0123456789")
        if sum(each.startswith(family) for each in seen) < 2:
            seen.add(name)
            found.append(NetworkSpec(timm=name))
    return found


def size_of(spec: NetworkSpec) -> tuple[int, int, int]:
    if spec.timm is None:
        return (3, 299, 299) if spec.torchvision == "inception_v3" else (3, 224, 224)
    import timm

    config = timm.get_pretrained_cfg(spec.timm)
    return tuple(config.input_size) if config is not None else (3, 224, 224)  # type: ignore[return-value]


def elsewhere(spec: NetworkSpec, layers: list[LayerInfo], shape: tuple[int, int, int]) -> list[str]:
    """Return the layers in which a change of one quarter of the image shows less there than in another quarter.

    Behind global attention a change shows everywhere alike, so less means by more than a fifth.
    """
    _, height, width = shape
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(shape, generator=generator).repeat(3, 1, 1, 1)
    for image, (y, x) in zip(images[1:], ((0, 0), (height // 2, 0)), strict=True):
        corner = image[:, y : y + height // 2, x : x + width // 2]
        corner.copy_(4 * torch.randn(corner.shape, generator=generator))
    with Recorder(build(spec), [layer.name for layer in layers]) as record:
        outputs = record(images)[1]
    wrong = []
    for layer in layers:
        maps = to_maps(outputs[layer.name], layer)[0]
        change = (maps[1:] - maps[:1]).square().sum(1).sqrt()
        y, x = layer.shape[1] // 2, layer.shape[2] // 2
        if min(y, x) < 1:
            continue
        parts = ((slice(y), slice(x)), (slice(-y, None), slice(x)), (slice(y), slice(-x, None)))
        parts += ((slice(-y, None), slice(-x, None)),)
        quarters = torch.stack([change[(slice(None), *part)].mean((1, 2)) for part in parts])
        own = torch.stack([quarters[0, 0], quarters[1, 1]])
        if (own < LESS * quarters.amax(0)).any():
            wrong.append(layer.name)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=float, default=30e6)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--only", default="*")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    begun, sized = time.monotonic(), []
    for spec in families():
        if fnmatch(spec.architecture, asked.only):
            try:
                built = build(spec, "meta")
            except Exception:  # builders that place or read values themselves
                built = build(spec)
            count = sum(parameter.numel() for parameter in built.parameters())
            sized.append((count, spec.architecture, spec))
    tally: Counter[str] = Counter()
    for count, name, spec in sorted(sized, key=lambda each: each[:2]):
        if count > asked.most or time.monotonic() - begun > asked.seconds:
            continue
        shape = size_of(spec)
        try:
            layers = inspect(spec, shape).layers
            wrong = elsewhere(spec, layers, shape)
            outcome, said = ("wrong", ", ".join(wrong)) if wrong else ("accepted", f"{len(layers)} layers")
        except MicrotomeError as error:
            outcome, said = "refused", str(error)
        except Exception as error:
            outcome, said = "failed", f"{type(error).__name__}: {error}"
        tally[outcome] += 1
        print(f"{spec.library}:{name}\t{shape[1]}x{shape[2]}\t{outcome}\t{said}", flush=True)
    print(", ".join(f"{outcome} {number}" for outcome, number in tally.items()))


if __name__ == "__main__":
    main()
