"""CPU time of removing every unit of a layer, one thread, against the plain way: a whole forward for each unit.

    python tests/bench/bench_ablation.py [--images 64] [--plain-units 2]

The plain way is timed on a few units and multiplied. Weights are random. Both give class and rank of the label for
every pair of a unit and an image. The floor is what has to be computed for a pair: the multiplications that remain, at
the speed of a large matrix product here, and looking at its logits (argmax, comparison with the label's) once. CPU time
is that of the process, so other work on the machine disturbs little.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision
from torch import nn

from pipeline.networks.graph.tail import cut, unit_dim
from pipeline.networks.graph.trace import forward_with
from pipeline.networks.layers import Recorder, resolve
from pipeline.stages.ablate.tasks import BATCH_BYTES, BATCH_PAIRS, judged
from tests.bench.timing import seconds

SIZE = 224
MICRO_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--plain-units", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rate = matrix_rate()
    print(f"{given.images} images of {SIZE} x {SIZE}; a large matrix product runs at {rate / 1e9:.0f} GFLOP/s\n")
    print("network    layer         units   plain, s   ours, s   ratio   pairs that differ   MFLOP a pair   x floor")
    for name, layer in (("vgg16", "features.28"), ("resnet18", "layer4.1")):
        bench(name, layer, given.images, given.plain_units, rate)


def matrix_rate() -> float:
    """FLOP/s of a product of 2048 x 2048."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    return 2 * 2048**3 / min(seconds(lambda: a @ b) for _ in range(3))


@torch.no_grad()
def bench(name: str, layer: str, count: int, plain_units: int, rate: float) -> None:
    network = torchvision.models.get_model(name, weights=None).eval().to(memory_format=torch.channels_last)
    images = torch.randn(count, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    label = torch.randint(0, 1000, (count,))
    (info,) = resolve(network, [layer], (3, SIZE, SIZE))
    output = recorded(network, layer, images)
    tail = cut(network, info, images[:3])
    cost = tail.cost()
    pairs = min(BATCH_PAIRS, BATCH_BYTES // cost.pair_bytes)
    found: dict[int, torch.Tensor] = {}
    differ = 0

    def ours() -> None:
        nonlocal differ
        state = tail.begin(output, torch.zeros_like(output))
        base, _ = judged(tail.logits(state, pairs), label)
        found.update({unit: base.clone() for unit in range(tail.units)})
        for unit, image, logits in tail.without_units(state, range(tail.units), pairs):
            prediction, _ = judged(logits, label[image])
            for one in unit.unique().tolist():
                found[one][image[unit == one]] = prediction[unit == one]
            differ += len(unit)

    spent = seconds(ours)
    units = torch.linspace(0, tail.units - 1, plain_units).long().tolist()
    truth: dict[int, torch.Tensor] = {}
    plain = seconds(lambda: truth.update({unit: without(network, layer, info, unit, images) for unit in units}))
    plain *= tail.units / len(units)
    agree = torch.stack([(truth[unit] == found[unit]).float().mean() for unit in units]).mean()
    some = torch.randn(4096, 1000)
    look = min(seconds(lambda: judged(some, label[:1].expand(4096))) for _ in range(3)) / 4096
    floor = differ * (cost.pair_flops / rate + look)
    print(
        f"{name:10} {layer:12} {tail.units:6} {plain:10.0f} {spent:9.2f} {plain / spent:7.0f} "
        f"{differ / (tail.units * count):18.1%} {cost.pair_flops / 1e6:14.3f} {spent / floor:9.1f}"
        f"      same predictions: {float(agree):.1%}"
    )


def recorded(network: nn.Module, layer: str, images: torch.Tensor) -> torch.Tensor:
    outputs = []
    with Recorder(network, [layer], stop_early=True) as record:
        for part in images.split(MICRO_BATCH):
            outputs.append(record(part)[1][layer])
    return torch.cat(outputs)


def without(network: nn.Module, layer: str, info: object, unit: int, images: torch.Tensor) -> torch.Tensor:
    """Predictions of whole forwards without a unit."""
    dim = unit_dim(info)  # type: ignore[arg-type]
    index = torch.tensor([unit])
    parts = images.split(MICRO_BATCH)
    return torch.cat(
        [forward_with(network, layer, x, lambda out: out.index_fill(dim, index, 0)).argmax(1) for x in parts]
    )


if __name__ == "__main__":
    main()
