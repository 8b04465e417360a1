"""Train a generator of scenes: a decoder from compositions to the pictures of the embedded scenes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from pipeline.data.scenes import draw_scene
from pipeline.data.scenes.composed import EACH, composition

RATE, WARM_UP, DECAY = 4e-3, 30, 1e-4
OBJECT = 2.0
"""Weight of an object's pixels, beside 1 of the others."""


@dataclass(frozen=True)
class Examples:
    """Scenes to learn from: pictures uint8 (scene, 3, y, x), compositions, and whether a pixel shows an object."""

    image: np.ndarray
    composition: np.ndarray
    object: np.ndarray


def examples(count: int, size: int, seed: int = 0) -> Examples:
    """Draw the first scenes of the split `train`."""
    scenes = [draw_scene(seed, "train", at, size) for at in range(count)]
    return Examples(
        np.stack([scene.image for scene in scenes]),
        np.stack([composition(scene).astype(np.float16) for scene in scenes]),
        np.stack([scene.instance_map > 0 for scene in scenes]),
    )


def fit(
    network: nn.Module,
    given: Examples,
    steps: int,
    batch: int = 48,
    seed: int = 0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> float:
    """Train a decoder in place, by the mean absolute difference of its pictures; return the last steps' mean of it.

    Scenes are mirrored at random. AdamW; the rate rises for 30 steps and falls as half a cosine.
    """
    random = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=DECAY, betas=(0.9, 0.98))

    def rate(step: int) -> float:
        return min((step + 1) / WARM_UP, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.01)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    network.to(memory_format=torch.channels_last).train()
    losses = []
    for step in range(steps):
        chosen = np.sort(random.integers(0, len(given.image), batch))
        inputs = torch.from_numpy(given.composition[chosen].astype(np.float32))
        target = torch.from_numpy(given.image[chosen]).float() / 255
        weight = 1 + (OBJECT - 1) * torch.from_numpy(given.object[chosen]).float()[:, None]
        if random.random() < 0.5:
            inputs, target, weight = inputs.flip(3), target.flip(3), weight.flip(3)
            inputs[:, 1:-3:EACH] *= -1
        made = network(inputs.contiguous(memory_format=torch.channels_last))
        error = (made - target).abs()
        loss = (weight * error).mean() / weight.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(error.detach().mean()))
        progress(step + 1, losses[-1])
    network.to(memory_format=torch.contiguous_format).eval()
    return float(np.mean(losses[-20:]))
