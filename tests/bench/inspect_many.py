"""Inspect `layers: auto` of many networks of torchvision and timm with random weights, and print a table.

    python tests/bench/inspect_many.py [--most 30e6] [--seconds 3600] [--only PATTERN] [--table FILE] [--docs PAGE]

Networks come in the order of their size. `--table` keeps the rows: a later call goes on with the networks that it
lacks, and `--docs` writes the page of all. A row says accepted, refused with the reason, or wrong: an accepted layer of
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
from pipeline.networks.layers import Recorder, survey, to_maps

LESS = 0.8  # of the largest change of any quarter
MOST_BYTES = 4 << 30
# Sizes at which a shape fits two layouts.
ALSO: list[tuple[NetworkSpec, tuple[int, int, int]]] = [
    (NetworkSpec(torchvision="convnext_tiny"), (3, 384, 384)),
    (NetworkSpec(timm="mambaout_femto"), (3, 192, 192)),
    (NetworkSpec(torchvision="swin_t"), (3, 384, 384)),
    (NetworkSpec(torchvision="resnet18"), (3, 512, 512)),
    (NetworkSpec(torchvision="resnet18"), (3, 224, 320)),
]
HEAD = """# Networks that were inspected

`layers: auto` of the image classifiers of torchvision and of families of timm, with random weights. *Wrong* would be an
accepted layer in which a change of a quarter of the image shows less there than in another quarter, found by other
changes than those of the inspection. Made by `python tests/bench/inspect_many.py --table FILE --docs PAGE`.
"""


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


def memory_need(spec: NetworkSpec, shape: tuple[int, int, int]) -> int:
    """Return about how many bytes an inspection takes: two copies of the weights, and some outputs for ten images."""
    try:
        network = build(spec, "meta")
        largest = survey(network, shape).largest
    except Exception:  # builders and forwards that read values
        return 0
    return 4 * (2 * sum(each.numel() for each in network.parameters()) + 40 * largest)


def row_of(spec: NetworkSpec, shape: tuple[int, int, int]) -> tuple[str, str]:
    """Return the outcome of one inspection, and what is to be said of it."""
    if memory_need(spec, shape) > MOST_BYTES:
        return "skipped", "needs more than 4 GiB"
    try:
        layers = inspect(spec, shape).layers
        wrong = elsewhere(spec, layers, shape)
    except MicrotomeError as error:
        return "refused", " ".join(str(error).split())
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    return ("wrong", ", ".join(wrong)) if wrong else ("accepted", f"{len(layers)} layers")


def page(rows: list[list[str]]) -> str:
    """Return the page of the docs: the tally, what is refused, and all networks that are accepted."""
    tally = Counter(row[2] for row in rows)
    told = ", ".join(f"{outcome} {tally[outcome]}" for outcome in ("accepted", "refused", "wrong"))
    lines = [
        HEAD,
        f"**{told}**, of {len(rows)} networks.",
        "",
        "| network | image | outcome | why |",
        "|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(each.replace('|', chr(92) + '|') for each in row[:4])} |" for row in rows]
    return "\n".join([*lines, ""])


def ordered(only: str, most: float) -> list[tuple[NetworkSpec, tuple[int, int, int]]]:
    """Return the networks with the sizes of their images, the smallest networks first."""
    sized = []
    for spec in families():
        if fnmatch(spec.architecture, only):
            try:
                built = build(spec, "meta")
            except Exception:  # builders that place or read values themselves
                built = build(spec)
            count = sum(parameter.numel() for parameter in built.parameters())
            if count <= most:
                sized.append((count, spec.architecture, spec))
    found = [(spec, size_of(spec)) for _, _, spec in sorted(sized, key=lambda each: each[:2])]
    return [each for each in ALSO if fnmatch(each[0].architecture, only)] + found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--most", type=float, default=30e6)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--only", default="*")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--docs", type=Path)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    begun = time.monotonic()
    rows: dict[tuple[str, str], list[str]] = {}
    if asked.table is not None and asked.table.exists():
        known = (line.split("\t") for line in asked.table.read_text().splitlines())
        rows = {(row[0], row[1]): row for row in known}
    for spec, shape in ordered(asked.only, asked.most):
        name, size = f"{spec.library}:{spec.architecture}", f"{shape[1]}x{shape[2]}"
        if (name, size) in rows:
            continue
        if time.monotonic() - begun > asked.seconds:
            break
        since = time.monotonic()
        row = rows[name, size] = [name, size, *row_of(spec, shape), f"{time.monotonic() - since:.1f}"]
        print("\t".join(row), flush=True)
        if asked.table is not None:
            with asked.table.open("a") as file:
                file.write("\t".join(row) + "\n")
    print(", ".join(f"{outcome} {number}" for outcome, number in Counter(row[2] for row in rows.values()).items()))
    if asked.docs is not None:
        asked.docs.write_text(page(sorted(rows.values())))


if __name__ == "__main__":
    main()
