"""The optimisation loop: images and labels in, a trained network out, the same however often it is interrupted.

Everything random about step k - which images, how they are moved, dropout - is a function of (seed, k). A run that is
killed and resumed from its checkpoint therefore ends with the same weights, bit for bit, as one left alone.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from kernels.images.grey import grey
from kernels.images.whiten import whiten
from pipeline.config.recipe import Recipe
from pipeline.errors import MicrotomeError
from pipeline.networks.training.repeatable import (
    Checkpoint,
    attention,
    check_classes,
    count_classes,
    fixed_arithmetic,
    groups,
    native_bfloat16,
    order,
    stream,
)
from pipeline.storage.identity import crc32c

CHECKPOINT = "checkpoint.pt"
CURVE_POINTS = 100  # of the training curve, at most
EVALUATION_BATCH = 250

AUGMENTATION, NETWORK = 2, 3  # purposes of random numbers, besides the order of the images


class Images(Protocol):
    """uint8 (image, channel, y, x): a numpy array, or anything like one that takes sorted indices."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index: Any) -> Any: ...


Labelled = tuple[Images, NDArray[np.integer]]
Progress = Callable[[int, int, float, float], None]


def fit(
    network: nn.Module,
    train: Labelled,
    validation: Labelled | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    recipe: Recipe,
    folder: Path | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    per_image: bool = False,
) -> dict[str, Any]:
    """Train `network` in place with AdamW and a warm-up-and-cosine schedule.

    Parameters
    ----------
    network : (batch, 3, y, x) float -> (batch, class) logits
    train, validation
        Images uint8 (image, 3, y, x) and labels (image,); images with label -1, which means none, are left out.
    mean, std
        Of the preprocessing (x / 255 - mean) / std; one number each for a network of grey images.
    folder
        Where the checkpoint is. If it holds one with the same recipe and data, training resumes from it;
        one of a finished run is only loaded.
    progress
        Called with (step, steps, loss, accuracy) at every point of the curve; loss and accuracy are means since the
        last.
    per_image
        Whiten each image by its own mean and deviation, in place of the preprocessing above.

    Returns
    -------
    dict
        accuracy, loss (of the validation images in float32; None without any), curve [{step, loss, accuracy}] (of the
        training batches), precision ("bfloat16" or "float32"), device, threads, train_images, validation_images.
    """
    images, labels, kept = _labelled(train, "training")
    if len(np.unique(labels[kept])) < 2:
        raise MicrotomeError(
            f"a classifier needs images of two classes or more, found {len(kept)} labelled training images "
            f"of {len(np.unique(labels[kept]))}; give labels, or load a checkpoint in place of `train`"
        )
    bfloat16 = native_bfloat16(device)
    with fixed_arithmetic(recipe.threads), attention(device):
        network.to(device)
        network.to(memory_format=torch.channels_last if bfloat16 else torch.contiguous_format)
        optimiser = torch.optim.AdamW(groups(network, recipe.weight_decay), lr=recipe.learning_rate, fused=True)
        run = _Run(network, optimiser, f"{recipe_key(recipe)} {images.shape} {crc32c(labels[kept].tobytes()):08x}")
        checkpoint = folder / CHECKPOINT if folder else None
        if checkpoint:
            run.load(checkpoint)
        scale = _Scale(mean, std, device, per_image)
        classes = count_classes(network, scale(torch.from_numpy(_take(images, kept[:2]))))
        check_classes(labels[kept], classes, "training")
        curve_every = max(1, math.ceil(recipe.steps / CURVE_POINTS))
        for step in range(run.step, recipe.steps):
            network.train()
            picked = kept[_batch(recipe, step, len(kept))]
            batch = scale(_augment(torch.from_numpy(_take(images, picked)), recipe, step))
            target = torch.from_numpy(labels[picked]).to(device)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(recipe, step)
            torch.manual_seed(int(stream(recipe.seed, NETWORK, step).integers(2**63)))
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bfloat16):
                logits = network(batch.contiguous(memory_format=torch.channels_last) if bfloat16 else batch)
            loss = cross_entropy(logits.float(), target, label_smoothing=recipe.label_smoothing)
            value = loss.item()
            if not math.isfinite(value):
                raise MicrotomeError(
                    f"the loss is {value} at step {step} of {recipe.steps}; lower `learning_rate` "
                    f"(now {recipe.learning_rate}) or raise `warmup` (now {recipe.warmup})"
                )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            run.count(value, int((logits.argmax(1) == target).sum()), len(target))
            if run.step % curve_every == 0 or run.step == recipe.steps:
                run.add_point()
                if progress:
                    progress(run.step, recipe.steps, run.curve[-1]["loss"], run.curve[-1]["accuracy"])
            if checkpoint and (run.step % recipe.checkpoint_every == 0 or run.step == recipe.steps):
                run.save(checkpoint)
        network.to(memory_format=torch.contiguous_format)
        network.eval()
        accuracy, loss_value, counted = evaluate(network, validation, mean, std, device, per_image)
    return {
        "accuracy": accuracy,
        "loss": loss_value,
        "curve": run.curve,
        "precision": "bfloat16" if bfloat16 else "float32",
        "device": torch.device(device).type,
        "threads": recipe.threads,
        "train_images": len(kept),
        "validation_images": counted,
    }


def evaluate(
    network: nn.Module,
    data: Labelled | None,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: str = "cpu",
    per_image: bool = False,
) -> tuple[float | None, float | None, int]:
    """Return accuracy, mean cross-entropy and number of the labelled images, in float32 and evaluation mode."""
    if data is None:
        return None, None, 0
    images, labels, kept = _labelled(data, "validation")
    scale = _Scale(mean, std, device, per_image)
    network.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for start in range(0, len(kept), EVALUATION_BATCH):
            picked = kept[start : start + EVALUATION_BATCH]
            logits = network(scale(torch.from_numpy(_take(images, picked)))).float()
            check_classes(labels[picked], logits.shape[1], "validation")
            target = torch.from_numpy(labels[picked]).to(device)
            right += int((logits.argmax(1) == target).sum())
            loss += float(cross_entropy(logits.double(), target, reduction="sum"))
    if not len(kept):
        return None, None, 0
    return right / len(kept), loss / len(kept), len(kept)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate at a step: a linear warm-up, then half a cosine down to (nearly) zero at the last step."""
    warm = int(recipe.warmup * recipe.steps)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm + 0.5) / (recipe.steps - warm)))


def recipe_key(recipe: Recipe) -> str:
    """Return the part of a recipe that determines the weights."""
    return recipe.model_dump_json(exclude={"checkpoint_every"})


class _Run:
    """The content of a checkpoint: network, optimiser, step, and the training curve with its open interval."""

    def __init__(self, network: nn.Module, optimiser: torch.optim.Optimizer, key: str):
        self.network, self.optimiser, self.key = network, optimiser, key
        self.step = 0
        self.curve: list[dict[str, float]] = []
        self.loss, self.right, self.seen, self.batches = 0.0, 0, 0, 0

    def count(self, loss: float, right: int, seen: int) -> None:
        self.step += 1
        self.loss, self.right, self.seen, self.batches = (
            self.loss + loss, self.right + right, self.seen + seen, self.batches + 1
        )  # fmt: skip

    def add_point(self) -> None:
        self.curve.append({"step": self.step, "loss": self.loss / self.batches, "accuracy": self.right / self.seen})
        self.loss, self.right, self.seen, self.batches = 0.0, 0, 0, 0

    def save(self, path: Path) -> None:
        facts = {"step": self.step, "curve": self.curve, "open": [self.loss, self.right, self.seen, self.batches]}
        Checkpoint(path, self.key).save(self.network, self.optimiser, facts)

    def load(self, path: Path) -> None:
        facts = Checkpoint(path, self.key).load(self.network, self.optimiser, ("step", "curve", "open"))
        if facts is not None:
            self.step, self.curve = facts["step"], facts["curve"]
            self.loss, self.right, self.seen, self.batches = facts["open"]


class _Scale:
    """uint8 -> (x / 255 - mean) / std, as one multiplication and one addition per pixel; grey with a single mean.

    With `per_image`, each image is whitened by itself instead.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: str, per_image: bool):
        self.device, self.per_image = device, per_image
        self.factor = torch.tensor([1 / (255 * s) for s in std], device=device).view(1, -1, 1, 1)
        self.offset = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=device).view(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        images = images.to(self.device)
        if self.factor.shape[1] == 1:
            images = grey(images)
        if self.per_image:
            return whiten(images.float())
        return torch.addcmul(self.offset, images.float(), self.factor)


def _batch(recipe: Recipe, step: int, count: int) -> NDArray[np.int64]:
    """Return the sorted indices of a step's images: a window on successive shuffled passes."""
    position = step * recipe.batch_size + np.arange(recipe.batch_size)
    picked = np.empty(recipe.batch_size, np.int64)
    for epoch in range(position[0] // count, position[-1] // count + 1):
        here = position // count == epoch
        picked[here] = order(recipe.seed, int(epoch), count)[position[here] % count]
    return np.sort(picked)


def _augment(images: Tensor, recipe: Recipe, step: int) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels; (batch, 3, y, x) in and out."""
    draw = stream(recipe.seed, AUGMENTATION, step)
    height, width = images.shape[-2:]
    mirrored = torch.from_numpy(draw.random(len(images)) < 0.5)
    if recipe.flip:
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if recipe.shift:
        offsets = draw.integers(0, 2 * recipe.shift + 1, (len(images), 2))
        # `replicate` needs a float type; half holds 0 to 255 exactly.
        padded = pad(images.half(), [recipe.shift] * 4, mode="replicate")
        images = torch.stack(
            [one[:, y : y + height, x : x + width] for one, (y, x) in zip(padded, offsets.tolist(), strict=True)]
        )
    return images


def _take(images: Images, index: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return images at sorted indices, in one request if the array is on disk."""
    if isinstance(images, np.ndarray):
        return images[index]
    unique, back = np.unique(index, return_inverse=True)
    return np.asarray(images[unique])[back]


def _labelled(data: Labelled, what: str) -> tuple[Images, NDArray[np.int64], NDArray[np.int64]]:
    """Return images, their labels, and the indices of those that have one."""
    images, labels = data[0], np.asarray(data[1]).astype(np.int64)
    if len(images.shape) != 4 or images.shape[1] != 3 or labels.shape != images.shape[:1]:
        raise MicrotomeError(
            f"{what} images must be (image, 3, y, x) with one label each, found {images.shape} and {labels.shape}"
        )
    return images, labels, np.flatnonzero(labels >= 0)
