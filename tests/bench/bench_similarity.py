"""CPU time and memory of CKA of all pairs of layers, one thread, against the bare forward passes of both networks.

    python -m tests.bench.bench_similarity [--images 512]

Weights and images are random, 64 x 64 pixels, in minibatches of 64. What is timed is what the stages compute: forwards
with a Gram matrix of every layer, HSIC1 of all pairs within and between the networks, and CKA with its jackknife. Bare
forwards and ours take turns, minibatch by minibatch, and the ratio is the median over the minibatches, so that other
work on the machine decides little. Memory is the highest resident size of a process of its own, less that of one which
only does the forwards; the median of three such pairs.

The package pytorch-cka is timed too where it is installed (`--group bench`), and its values and ours are compared with
those in float64 of the same outputs.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torchvision
from torch import nn

from kernels.similarity.cka import cka, hsic, pack
from pipeline.networks.features import Entry, grams_of
from pipeline.networks.layers import Recorder, candidates, one_attention_path
from tests.bench.timing import seconds

SIZE, MINIBATCH = 64, 64
ALLOWED_MIB = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--memory", choices=["plain", "grams"], help="used by the bench itself: one process's memory")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(memory(given.memory == "grams"))
        return
    print("networks                                 layers    pairs   forward, s   ours, s   ratio   allowed")
    blocks(given.images)
    modules(given.images)


def blocks(images: int) -> None:
    resnet, vit = networks("resnet50")
    chosen = named(resnet, lambda name: name.count(".") == 1 and name.startswith("layer"))
    of_vit = named(vit, lambda name: name.startswith("encoder.layers.") and name.count(".") == 2)
    found = compare("resnet50 blocks, ViT blocks", resnet, vit, chosen, of_vit, images, 1.1)
    change("one of two changed: resnet50 alone", resnet, vit, chosen, of_vit, images, 1.15)
    against_package(resnet, vit, chosen, of_vit, images, found)


def modules(images: int) -> None:
    resnet, vit = networks("resnet18")
    chosen = named(resnet, lambda name: isinstance(resnet.get_submodule(name), CONVOLUTIONS) or in_layer(name))
    of_vit = named(vit, lambda name: name.startswith("encoder.layers.") and not name.endswith(DROPPED))
    compare("resnet18 modules, ViT modules", resnet, vit, chosen, of_vit, images, 1.5)
    more = [highest("grams") - highest("plain") for _ in range(3)]
    print(f"  memory beyond that of the forwards: {np.median(more) / 2**20:.1f} MiB (allowed {ALLOWED_MIB})")


def highest(what: str) -> int:
    """Highest resident bytes of a process of its own."""
    return int(subprocess.run([sys.executable, __file__, "--memory", what], check=True, capture_output=True).stdout)


CONVOLUTIONS = (nn.Conv2d, nn.BatchNorm2d)
DROPPED = ("dropout", "mlp.2", "mlp.4", "mlp")  # another module's output, in a network that is not trained


def in_layer(name: str) -> bool:
    return name.startswith("layer") and name.count(".") == 1


def networks(name: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    vit = torchvision.models.VisionTransformer(SIZE, 8, 12, 3, 192, 768)
    return torchvision.models.get_model(name, weights=None).eval(), vit.eval()


def named(network: nn.Module, wanted: Callable[[str], bool]) -> list[Entry]:
    return [Entry(info, "whole") for info in candidates(network, (3, SIZE, SIZE)) if wanted(info.name)]


def minibatches(images: int) -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(images // MINIBATCH):
        yield torch.randn(MINIBATCH, 3, SIZE, SIZE, generator=generator)


@torch.no_grad()
def forward(network: nn.Module, batch: torch.Tensor) -> None:
    with one_attention_path():
        network(batch)


def compare(
    title: str, a: nn.Module, b: nn.Module, of_a: list[Entry], of_b: list[Entry], images: int, allowed: float
) -> np.ndarray:
    """Time both networks; return CKA of the first's layers with the second's."""
    values = []

    def plain(batch: torch.Tensor) -> None:
        forward(a, batch)
        forward(b, batch)

    def ours(batch: torch.Tensor) -> None:
        values.append(hsic(np.concatenate([grams_of(a, batch, of_a), grams_of(b, batch, of_b)]), "unbiased"))

    warm(a, b, of_a, of_b)
    spent = [(seconds(lambda: plain(batch)), seconds(lambda: ours(batch))) for batch in minibatches(images)]  # noqa: B023
    found = []
    after = seconds(lambda: found.append(cka(np.stack(values), np.ones(len(values)))))
    line(title, len(of_a), len(of_b), spent, after, allowed)
    return found[0].cka[: len(of_a), len(of_a) :]


def change(
    title: str, a: nn.Module, b: nn.Module, of_a: list[Entry], of_b: list[Entry], images: int, allowed: float
) -> None:
    """The second network's Gram matrices are there; the first one changed."""
    kept = [grams_of(b, batch, of_b) for batch in minibatches(images)]
    values = []

    def ours(batch: torch.Tensor, known: np.ndarray) -> None:
        values.append(hsic(np.concatenate([grams_of(a, batch, of_a), known]), "unbiased"))

    spent = [
        (seconds(lambda: forward(a, batch)), seconds(lambda: ours(batch, known)))  # noqa: B023
        for batch, known in zip(minibatches(images), kept, strict=True)
    ]
    after = seconds(lambda: cka(np.stack(values), np.ones(len(values))))
    line(title, len(of_a), len(of_b), spent, after, allowed)


def against_package(
    a: nn.Module, b: nn.Module, of_a: list[Entry], of_b: list[Entry], images: int, ours: np.ndarray
) -> None:
    try:
        from cka import compute_cka
    except ImportError:
        print("  pytorch-cka is not installed: not compared")
        return
    batches = [(batch,) for batch in minibatches(images)]
    layers = [[entry.info.name for entry in entries] for entries in (of_a, of_b)]
    found = []
    plain = seconds(lambda: [(forward(a, batch), forward(b, batch)) for (batch,) in batches])
    spent = seconds(
        lambda: found.append(
            compute_cka(a, b, batches, layers=layers[0], model2_layers=layers[1], device="cpu", progress=False)
        )
    )
    theirs = np.asarray(found[0][0] if isinstance(found[0], list) else found[0])
    truth = in_float64(a, b, of_a, of_b, images)
    print(f"  pytorch-cka: {spent / plain:.2f} of the forwards")
    print(
        f"  differences from float64: ours at most {np.abs(ours - truth).max():.1e}; pytorch-cka, which gives nothing "
        f"below 0, at most {np.abs(theirs - np.clip(truth, 0, 1)).max():.1e}"
    )


def in_float64(a: nn.Module, b: nn.Module, of_a: list[Entry], of_b: list[Entry], images: int) -> np.ndarray:
    """CKA of the same outputs with everything after them in float64."""
    sums = np.zeros((len(of_a) + len(of_b),) * 2)
    for batch in minibatches(images):
        grams: list[np.ndarray] = []

        def take(_: str, output: torch.Tensor, grams: list[np.ndarray] = grams) -> None:
            grams.append(exact(output))

        for network, entries in ((a, of_a), (b, of_b)):
            with Recorder(network, [entry.info.name for entry in entries], take=take) as record:
                record(batch)
        sums += hsic(np.stack(grams), "unbiased")
    return cka(sums[None], np.ones(1)).cka[: len(of_a), len(of_a) :]


def exact(output: torch.Tensor) -> np.ndarray:
    rows = output.double().flatten(1)
    rows -= rows.mean(0)
    return pack((rows @ rows.T).numpy())


def line(title: str, a: int, b: int, spent: list[tuple[float, float]], after: float, allowed: float) -> None:
    """`spent`: seconds of the forwards and of ours, a pair for each minibatch; `after`: seconds at the end of all."""
    plain, ours = np.array(spent).T
    ratio = np.median(ours / plain) + after / plain.sum()
    print(
        f"{title:38} {a:4} {b:4} {a * b:8} {plain.sum():12.2f} {ours.sum() + after:9.2f} {ratio:7.3f} {allowed:9.2f}",
        flush=True,
    )


def warm(a: nn.Module, b: nn.Module, of_a: list[Entry], of_b: list[Entry]) -> None:
    batch = next(minibatches(MINIBATCH))
    for network, entries in ((a, of_a), (b, of_b)):
        forward(network, batch)
        grams_of(network, batch, entries)


def memory(with_grams: bool) -> int:
    """Highest resident bytes of this process, after four minibatches through both networks."""
    resnet, vit = networks("resnet18")
    chosen = named(resnet, lambda name: isinstance(resnet.get_submodule(name), CONVOLUTIONS) or in_layer(name))
    of_vit = named(vit, lambda name: name.startswith("encoder.layers.") and not name.endswith(DROPPED))
    for batch in minibatches(4 * MINIBATCH):
        if with_grams:
            hsic(np.concatenate([grams_of(resnet, batch, chosen), grams_of(vit, batch, of_vit)]), "unbiased")
        else:
            forward(resnet, batch)
            forward(vit, batch)
    # Not getrusage: what that says begins with the size of the parent.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


if __name__ == "__main__":
    main()
