"""The pictures of a generator with some units changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from pipeline.networks.forward import Model, network_of
from pipeline.networks.generators import rounded
from pipeline.stages.intervene.trials import INSERTED, NOTHING, PATCHED, WITHOUT, Trial
from pipeline.workers.devices import device
from pipeline.workers.tasks import computing

STEP, FIRST = 4, 2
"""Of the grid on which units are inserted: every fourth position, from the third on."""


@dataclass(frozen=True)
class Painter:
    """A generator of which one layer can be changed.

    Attributes
    ----------
    layer : a module whose output is (image, unit, y, x). output : what the generator gives for black and for white.
    """

    model: Model
    layer: str
    output: tuple[float, float]

    def pictures(
        self, latents: np.ndarray, change: Callable[[int, torch.Tensor], torch.Tensor] | None = None
    ) -> np.ndarray:
        """Return the pictures of latents (image, ...) as a data set holds them, uint8 (image, 3, y, x).

        `change(at, output)` returns what the layer gives instead, for the latents from `at` on. Latents run in
        micro-batches of the generator's size, the last one padded with zeros.
        """
        size, found = self.model.spec.numerics.micro_batch, []
        low, high = self.output
        with computing, torch.inference_mode():
            network = network_of(self.model)
            for at in range(0, len(latents), size):
                batch = latents[at : at + size]
                count = len(batch)
                padded = np.concatenate([batch, np.zeros((size - count, *batch.shape[1:]), batch.dtype)])

                def hook(_: object, __: object, output: torch.Tensor, at: int = at, count: int = count) -> torch.Tensor:
                    if change is None:
                        return output
                    return torch.cat([change(at, output[:count].clone()), output[count:]])

                handle = network.get_submodule(self.layer).register_forward_hook(hook)
                try:
                    made = network(torch.from_numpy(padded).to(device()))[:count]
                finally:
                    handle.remove()
                made = (made.float() - low) / (high - low)
                found.append(rounded(made.expand(-1, 3, -1, -1)))
        return np.concatenate(found)

    def outputs(self, latents: np.ndarray) -> torch.Tensor:
        """Return the layer's output for latents, (image, unit, y, x)."""
        kept: list[torch.Tensor] = []

        def keep(_: int, output: torch.Tensor) -> torch.Tensor:
            kept.append(output.clone())
            return output

        self.pictures(latents, keep)
        return torch.cat(kept)

    def tried(self, trial: Trial, latents: np.ndarray, others: np.ndarray | None) -> np.ndarray:
        """Return the pictures of a trial; `others` are the latents without the concept, where there are any."""
        if trial.what == NOTHING:
            return self.pictures(latents)
        if trial.what == WITHOUT:
            assert others is not None
            return self.pictures(others)
        units = torch.tensor(trial.units, device=device())
        if trial.what == PATCHED:
            assert others is not None
            there = self.outputs(others)
            return self.pictures(latents, lambda at, output: patched(output, units, there[at : at + len(output)]))
        values = torch.tensor(trial.values, dtype=torch.float32, device=device())
        grid = trial.what == INSERTED and trial.at == "grid"
        return self.pictures(latents, lambda _, output: replaced(output, units, values, grid))


def patched(output: torch.Tensor, units: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Give units the values that they have in another output, in place."""
    output[:, units] = other[:, units]
    return output


def replaced(output: torch.Tensor, units: torch.Tensor, values: torch.Tensor, grid: bool) -> torch.Tensor:
    """Give units one value each, in place: at all positions, or on the grid of places."""
    new = values.to(output.dtype)[None, :, None, None]
    if not grid:
        output[:, units] = new.expand(len(output), -1, *output.shape[2:])
        return output
    rows, columns = (slice(FIRST if side > FIRST else 0, None, STEP) for side in output.shape[2:])
    part = output[:, units]
    part[:, :, rows, columns] = new.expand(len(output), -1, 1, 1)
    output[:, units] = part
    return output
