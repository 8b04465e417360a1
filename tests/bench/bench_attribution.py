"""CPU time of attribution methods, one thread, against one forward and backward of the same batch.

    python -m tests.bench.bench_attribution [--images 8] [--rounds 5]

Networks have random weights. A plain forward with its backward to the input and each method take turns, batch by batch,
and the ratio is the median over the rounds, so that other work on the machine decides little. Where the package
grad-cam is installed, its Grad-CAM of the same batch is timed too. Black boxes are compared with bare forwards of as
many copies, and Kernel SHAP, where the package shap is installed, with its squared error at equal forwards.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torchvision
from torch import nn

from pipeline.networks.gradients import Logit
from pipeline.networks.graph.call_sites import frozen
from pipeline.networks.layers import survey
from pipeline.stages.attribute.methods.differences import deeplift
from pipeline.stages.attribute.methods.lrp import lrp
from pipeline.stages.attribute.methods.registry import FUNCTIONS
from pipeline.stages.attribute.options import METHODS, OPTIONS, DeepLift, Lrp
from pipeline.stages.attribute.subject import Known, Subject
from tests.bench.black_boxes import black_boxes, squared_errors
from tests.bench.timing import seconds

ALLOWED = {
    "saliency": 1.05,
    "grad_cam": 0.6,
    "guided_backprop": 1.3,
    "deconvnet": 1.3,
    "integrated_gradients": 33.0,
}
OF_DIFFERENCES = {"resnet18": {"deeplift": 1.6, "reveal_cancel": 6.0}, "vit_b_16": {"deeplift": 2.5}}
RULES = {
    "alpha 1": {"alpha": 1},
    "alpha 2": {"alpha": 2},
    "epsilon": {"rule": "epsilon"},
    "gamma": {"rule": "gamma"},
}
OF_RELEVANCE = {
    "resnet18": {"alpha 1": 3.5, "alpha 2": 3.5, "epsilon": 2.5, "gamma": 3.5},
    "vit_b_16": {"alpha 1": 4.0, "epsilon": 4.0, "gamma": 4.0},
}
SIZE = 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("network       method                 of a forward and backward   allowed")
    torch.manual_seed(0)
    measure("resnet18", torchvision.models.resnet18().eval(), given.images, given.rounds)
    small = {"image_size": SIZE, "patch_size": 16, "num_layers": 4, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    measure("a small ViT", torchvision.models.VisionTransformer(**small).eval(), given.images, given.rounds)
    for name, allowed in OF_RELEVANCE.items():
        measure_relevance(name, allowed, 2 if name == "vit_b_16" else given.images, given.rounds)
    for name, allowed in OF_DIFFERENCES.items():
        measure_differences(name, allowed, given.images, given.rounds)
    black_boxes(torchvision.models.resnet18().eval(), given.images, given.rounds)
    squared_errors()


def measure_differences(name: str, allowed: dict[str, float], images: int, rounds: int) -> None:
    """Time DeepLIFT with one baseline for all images, besides the pass that gives scores to all methods.

    RevealCancel has no rule for max pooling, so average pooling stands in.
    """
    for method, bound in allowed.items():
        network = torchvision.models.get_model(name).eval()
        if method == "reveal_cancel":
            network.maxpool = nn.AvgPool2d(3, 2, 1)
        ratios = [of_differences(network, method, images) for _ in range(rounds)]
        print(f"{name:13} {method:34} {statistics.median(ratios):12.3f}   {bound:.2f}", flush=True)


def of_differences(network: nn.Module, method: str, images: int) -> float:
    options = DeepLift(rule="reveal_cancel" if method == "reveal_cancel" else "rescale")
    inputs, target = torch.randn(images, 3, SIZE, SIZE), Logit(torch.arange(images))
    plain = seconds(lambda: forward_and_backward(network, inputs, target))
    subject = Subject(network, inputs, target, torch.zeros_like(inputs), images, of_inputs=False, one_baseline=True)
    assert subject.score.shape == (images,)
    return seconds(lambda: deeplift(subject, options, Known())) / plain


def measure(name: str, network: nn.Module, images: int, rounds: int) -> None:
    inputs = torch.randn(images, 3, SIZE, SIZE)
    layer = "layer4" if name == "resnet18" else "encoder.layers.encoder_layer_3.ln_1"
    (info,) = [each for each in survey(network, (3, SIZE, SIZE)).layers if each.name == layer]
    target = Logit(torch.arange(images))
    ratios: dict[str, list[float]] = {}
    rectified = {"deconvnet", "guided_backprop"}
    of_name = [each for each in ALLOWED if name == "resnet18" or not rectified & set(METHODS[each].needs)]
    for round in range(rounds):
        plain = seconds(lambda: forward_and_backward(network, inputs, target))
        for method in of_name:
            if method == "integrated_gradients" and round >= 2:
                continue
            ratios.setdefault(method, []).append(
                seconds(lambda method=method: explained(network, inputs, target, method, info)) / plain
            )
        if (package := of_package(network, inputs, target, layer)) is not None and name == "resnet18":
            ratios.setdefault("Grad-CAM of the package grad-cam", []).append(package / plain)
    for method, found in ratios.items():
        allowed = f"{ALLOWED[method]:.2f}" if method in ALLOWED and name == "resnet18" else ""
        print(f"{name:13} {method:34} {statistics.median(found):12.3f}   {allowed}", flush=True)


def forward_and_backward(network: nn.Module, inputs: torch.Tensor, target: Logit) -> None:
    with frozen(network):
        given = inputs.clone().requires_grad_()
        torch.autograd.grad(target(network(given)).sum(), given)


def explained(network: nn.Module, inputs: torch.Tensor, target: Logit, method: str, info: object) -> None:
    kind = METHODS[method]
    options = OPTIONS[method](**({"steps": 32, "max_steps": 32} if method == "integrated_gradients" else {}))
    needs_layer = "layer" in kind.needs
    subject = Subject(
        network,
        inputs,
        target,
        torch.zeros_like(inputs),
        batch=len(inputs),
        layers=[info.name] if needs_layer else [],  # type: ignore[attr-defined]
        of_inputs=kind.shares == "inputs",
    )
    FUNCTIONS[method](subject, options, Known(info) if needs_layer else Known())  # type: ignore[arg-type]


def measure_relevance(name: str, allowed: dict[str, float], images: int, rounds: int) -> None:
    """Time LRP besides the pass that gives scores to all methods; the network was studied before."""
    network = torchvision.models.get_model(name).eval()
    for rule, bound in allowed.items():
        options = Lrp(**RULES[rule])
        of_relevance(network, options, 2)
        ratios = [of_relevance(network, options, images) for _ in range(rounds)]
        print(f"{name:13} {'lrp, ' + rule:34} {statistics.median(ratios):12.3f}   {bound:.2f}", flush=True)


def of_relevance(network: nn.Module, options: Lrp, images: int) -> float:
    inputs, target = torch.randn(images, 3, SIZE, SIZE), Logit(torch.arange(images))
    plain = seconds(lambda: forward_and_backward(network, inputs, target))
    subject = Subject(network, inputs, target, batch=images, of_inputs=False)
    assert subject.score.shape == (images,)
    return seconds(lambda: lrp(subject, options, Known())) / plain


def of_package(network: nn.Module, inputs: torch.Tensor, target: Logit, layer: str) -> float | None:
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError:
        return None
    targets = [ClassifierOutputTarget(int(each)) for each in target.classes]
    with GradCAM(network, [network.get_submodule(layer)]) as package:
        return seconds(lambda: package(inputs, targets))


if __name__ == "__main__":
    main()
