"""A batch of images for tests of explanations, with any network and any maps: no store, no run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.networks import Network
from pipeline.networks.gradients import Logit, gradients
from pipeline.stages.audit.batch import Batch, Shared
from pipeline.stages.audit.cell import Audited
from pipeline.stages.audit.results import Name

PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}


class Toy(Batch):
    """A batch whose network and label maps are given, and whose method is gradient x input."""

    def explain(self, network: nn.Module | None = None, inputs: Any = None, target: Any = None, **_: Any) -> np.ndarray:
        network, inputs = network or self.network, self.inputs if inputs is None else inputs
        made = gradients(network, inputs, self.target if target is None else target).inputs
        assert made is not None
        return (made * inputs).sum(1).float().numpy()

    def concepts(self, category: str) -> dict[str, int]:
        return self.shared.kept["numbers"]

    def label_maps(self, category: str) -> np.ndarray:
        return self.shared.kept["label maps"]


class Linear(nn.Module):
    """Logits that are linear in the pixels, in float64."""

    def __init__(self, size: tuple[int, int], classes: int, seed: int = 0) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(classes, 3 * size[0] * size[1], generator=drawn, dtype=torch.float64))
        self.bias = nn.Parameter(torch.randn(classes, generator=drawn, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().flatten(1) @ self.weight.T + self.bias


def toy(
    network: nn.Module,
    pixels: np.ndarray,
    maps: np.ndarray | Callable[[Toy], np.ndarray] | None = None,
    classes: Sequence[int] | None = None,
    labels: Sequence[int] | None = None,
    control: str = "",
    given: Mapping[str, Any] | None = None,
    untrained: nn.Module | None = None,
    batch: int = 4,
    **kept: Any,
) -> Toy:
    """Return a batch of uint8 images (image, 3, y, x); the class that is explained is by default the predicted one."""
    spec = Network.model_validate(
        {"module": "m.py:f", "weights": "random", "preprocessing": PLAIN, "numerics": {"micro_batch": batch}}
    )
    images = torch.from_numpy(pixels)
    network = network.eval()
    with torch.no_grad():
        order = network(images.float() / 255).argmax(1) if classes is None else torch.tensor(list(classes))
    work = SimpleNamespace(model=SimpleNamespace(name="toy", spec=spec), methods={}, baseline="black")
    shared = Shared(
        work,  # type: ignore[arg-type]
        images,
        order.numpy() if labels is None else np.array(labels, np.int64),
        np.arange(len(images)),
        [f"image {at}" for at in range(len(images))],
        list(range(100, 100 + len(images))),
        Logit(order),
        {},
        "validation",
        ["a", "b", "c"],
        given=given or {},
        kept=dict(kept),
    )
    made = Toy(shared, "toy", control)
    made.__dict__ |= {"network": network, "untrained": untrained}
    made.__dict__["maps"] = maps(made) if callable(maps) else maps
    return made


def audited(test: str, measures: Mapping[str, Any], arrays: Mapping[str, np.ndarray], ids: Sequence[str]) -> Audited:
    """Return the numbers of one method in a test, of images without labels."""
    unknown = np.full(len(ids), -1)
    return Audited("data", "net", test, Name("m"), None, measures, arrays, unknown, unknown, ids, ["a"])
