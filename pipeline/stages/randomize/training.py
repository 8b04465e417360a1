"""The training of runs on corrupted data, as Zhang et al. (ICLR 2017) do it: SGD, a rate that falls with each epoch.

The data set lies on the device as bytes; windows, whitening and steps are computed there, and nothing is asked of the
device before an epoch is over. On a GPU a step is one replay of a CUDA graph, in bfloat16 and channels_last, and
several runs go side by side, each on a stream of its own: none sees whether others run. Everything random in an epoch
is a function of (seed, epoch), so a run taken up from its checkpoint ends with the same weights and the same curve.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, nll_loss

from kernels.calibration.reliability import BINS
from kernels.images.whiten import statistics, whitened
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
from pipeline.stages.randomize.settings import How

WINDOWS, NETWORK = 2, 3  # purposes of random numbers, beside the order of the images
TESTED_AT_ONCE = {"cpu": 250, "cuda": 2000}
WARM_UP = 3  # steps before a graph is captured; they are undone
FINISHED, DIVERGED = "finished", "diverged"


@dataclass(frozen=True)
class Sets:
    """What a run is trained and tested on: images uint8 (image, 3, y, x) and labels int64 (image)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]


@dataclass
class Curve:
    """By epoch. Loss and accuracy are those of the minibatches as they were trained on; `loss` NaN: it diverged.

    Of the test images, after the epoch: accuracy, loss (the NLL of the calibration), and ECE in bins of equal width.
    """

    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    test_ece: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.loss)

    @property
    def diverged(self) -> bool:
        return bool(self.loss) and not math.isfinite(self.loss[-1])

    @property
    def fitted(self) -> int | None:
        """The first epoch, from 1, in which every training image was predicted right; None: there is none."""
        return self.reaches(1.0)

    def reaches(self, share: float) -> int | None:
        """The first epoch, from 1, in which this share of the training images was predicted right."""
        return next((at for at, value in enumerate(self.accuracy, 1) if value >= share), None)


class Training:
    """One run: `begin_epoch`, `step` for each of `steps`, `test`, `end_epoch`, until `done`.

    With `folder` a checkpoint is kept there, at least `checkpoint_seconds` apart; where there is one, the run goes on
    from it.
    """

    def __init__(
        self,
        network: nn.Module,
        sets: Sets,
        how: How,
        key: str = "",
        folder: Path | None = None,
        device: str = "cpu",
        checkpoint_seconds: float = 0,
    ) -> None:
        self.how, self.device, self.curve = how, torch.device(device), Curve()
        self.bfloat16 = native_bfloat16(device)
        convolves = any(isinstance(module, nn.Conv2d) for module in network.modules())
        self.format = torch.channels_last if self.bfloat16 and convolves else torch.contiguous_format
        self.network = network.to(self.device).to(memory_format=self.format)
        if how.dropout is not None:
            set_dropout(network, how.dropout)
        self.labels, self.test_labels = self.placed(sets.labels), self.placed(sets.test_labels)
        self.images, self.test_images = Centred(sets.images, self), Centred(sets.test_images, self)
        self.whole = self._every_window(sets.images) if how.random_crop else None
        self.size = min(how.batch_size, len(sets.labels))
        # A last minibatch of one image is left out: BatchNorm has no variance of it. It is another one in each epoch.
        self.used = len(sets.labels) - (len(sets.labels) % self.size == 1 and self.size > 1)
        self.steps = math.ceil(self.used / self.size)
        classes = count_classes(network, self.images[:2])
        check_classes(sets.labels, classes, "training")
        check_classes(sets.test_labels, classes, "test")
        self.rate: Any = torch.zeros((), device=self.device) if self.device.type == "cuda" else 0.0
        self.optimiser = torch.optim.SGD(
            groups(network, how.weight_decay), lr=how.learning_rate, momentum=how.momentum, fused=True
        )
        for parameter in network.parameters():  # the first step then is as all others, and a graph finds them
            if parameter.requires_grad and how.momentum:
                self.optimiser.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self.checkpoint = Checkpoint(folder / "checkpoint.pt", key) if folder else None
        self.between, self.saved = checkpoint_seconds, time.monotonic()
        if self.checkpoint is not None:
            known = self.checkpoint.load(network, self.optimiser, ("curve",))
            if known is not None:
                self.curve = Curve(**known["curve"])
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.graph = self._captured() if self.stream is not None else None

    @property
    def done(self) -> bool:
        fitted = self.how.until_fitted and self.curve.fitted is not None
        return len(self.curve) >= self.how.epochs or self.curve.diverged or fitted

    def begin_epoch(self) -> None:
        """Draw all that is random in the epoch, and bring it to the device."""
        self.began = time.monotonic()
        epoch, seed = len(self.curve), self.how.seed
        rate = self.how.learning_rate * self.how.decay**epoch
        with self._stream():
            self.rows = self.placed(order(seed, epoch, len(self.labels))[: self.used])
            self.windows = None
            if self.whole is not None:
                room = self.whole.shape[1:3]
                self.windows = self.placed(stream(seed, WINDOWS, epoch).integers(0, room, (self.used, 2)))
            self.seeds = stream(seed, NETWORK, epoch).integers(2**63, size=self.steps).tolist()
            self.totals.zero_()
            if self.graph is not None:
                self.rate.fill_(rate)
            else:
                for group in self.optimiser.param_groups:
                    group["lr"] = rate
        self.network.train()

    def step(self, number: int) -> None:
        """One minibatch: forward, backward, update. Nothing waits for the device."""
        at = slice(number * self.size, (number + 1) * self.size)
        rows, windows = self.rows[at], None if self.windows is None else self.windows[at]
        with self._stream():
            if self.graph is None or len(rows) < self.size:
                torch.manual_seed(self.seeds[number])
                self._learn(rows, windows)
                return
            self.static_rows.copy_(rows)
            if windows is not None:
                self.static_windows.copy_(windows)
            torch.cuda.default_generators[self.rows.device.index].manual_seed(self.seeds[number])
            self.graph.replay()

    def test(self) -> None:
        """Judge the network on the test images, in evaluation mode."""
        with self._stream():
            self.tested = self._judged(self.test_images, self.test_labels)

    def end_epoch(self) -> None:
        """Wait for the device, once, and note what the epoch came to."""
        with self._stream():
            loss, right, test_loss, test_right, *gaps = torch.cat([self.totals, self.tested]).tolist()
        count = len(self.test_labels)
        self.curve.loss.append(loss / self.used)
        self.curve.accuracy.append(right / self.used)
        self.curve.test_accuracy.append(test_right / count)
        self.curve.test_loss.append(test_loss / count)
        self.curve.test_ece.append(sum(map(abs, gaps)) / count)
        self.curve.seconds.append(time.monotonic() - self.began)
        due = self.done or time.monotonic() - self.saved >= self.between
        if self.checkpoint is not None and due:
            self.checkpoint.save(self.network, self.optimiser, {"curve": self.curve.__dict__})
            self.saved = time.monotonic()

    def train_accuracy(self) -> float:
        """Of the network as it is now, in evaluation mode, on the centre of each training image."""
        with self._stream():
            _, right, *_ = self._judged(self.images, self.labels).tolist()
        return right / len(self.labels)

    def _learn(self, rows: Tensor, windows: Tensor | None) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        logits = self._logits(self.images[rows] if windows is None else self._windows(rows, windows))
        target = self.labels.index_select(0, rows)
        loss = cross_entropy(logits, target)
        loss.backward()
        self.optimiser.step()
        with torch.no_grad():
            self.totals[0] += loss.detach().double() * len(rows)
            self.totals[1] += (logits.argmax(1) == target).sum()

    def _logits(self, images: Tensor) -> Tensor:
        # The cache of casts would be kept by a graph beyond the weights that it was made of.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16, cache_enabled=False):
            return self.network(images).float()

    def _judged(self, images: Centred, labels: Tensor) -> Tensor:
        """Sums over the images, in evaluation mode: loss, right, and confidence less accuracy in each bin of it."""
        self.network.eval()
        sums = torch.zeros(2 + BINS, dtype=torch.float64, device=self.device)
        bins = torch.arange(BINS + 1, device=self.device)
        edges = bins.double() / BINS
        count = TESTED_AT_ONCE[self.device.type]
        with torch.inference_mode():
            for at in range(0, len(labels), count):
                chances, own = self._logits(images[at : at + count]).double().log_softmax(1), labels[at : at + count]
                confidence, predicted = chances.exp().max(1)
                right = (predicted == own).double()
                within = (torch.searchsorted(edges, confidence) - 1).clamp(0, BINS - 1)[:, None] == bins[:BINS]
                gaps = (confidence - right) @ within.double()  # a product: sums of scattered values have no order
                loss = nll_loss(chances, own, reduction="sum")
                sums += torch.cat([torch.stack([loss, right.sum()]), gaps])
        return sums

    def _windows(self, rows: Tensor, windows: Tensor) -> Tensor:
        """The windows of these rows whose upper left corners are `windows` (image, 2), whitened."""
        assert self.whole is not None
        found = self.whole[rows, windows[:, 0], windows[:, 1]].float()
        found = whitened(found, *statistics(found))
        return found.permute(0, 3, 1, 2) if self.format == torch.channels_last else found

    def _every_window(self, images: NDArray[np.uint8]) -> Tensor:
        """A view of all windows of all images: (image, y, x) of the corner, then a window in the network's order."""
        crop, last = self.how.crop, self.format == torch.channels_last
        placed = self.placed(images.transpose(0, 2, 3, 1) if last else images)
        at = 1 if last else 2
        views = placed.unfold(at, crop, 1).unfold(at + 1, crop, 1)
        return views.permute(0, 1, 2, 4, 5, 3) if last else views.permute(0, 2, 3, 1, 4, 5)

    def placed(self, values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)

    def _stream(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """A step of a whole minibatch as a graph; the steps that warm up for it leave no trace."""
        assert self.stream is not None
        self.static_rows = torch.arange(self.size, device=self.device)
        self.static_windows = torch.zeros((self.size, 2), dtype=torch.int64, device=self.device)
        windows = self.static_windows if self.how.random_crop else None
        buffers = [state["momentum_buffer"] for state in self.optimiser.state.values()]
        kept = [*self.network.parameters(), *self.network.buffers(), *buffers]
        self.network.train()
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream), torch.no_grad():
            before = [tensor.clone() for tensor in kept]
            with torch.enable_grad():
                for _ in range(WARM_UP):
                    self._learn(self.static_rows, windows)
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
        self.optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process, Dask's, may use the device meanwhile.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            self._learn(self.static_rows, windows)
        return graph


class Centred:
    """The centres of images on the device, as bytes in the network's order, with what whitens each; rows come whitened.

    In blocks, so that no more than one of them is ever held as floats.
    """

    def __init__(self, images: NDArray[np.uint8], training: Training) -> None:
        crop = training.how.crop
        top, left = ((length - crop) // 2 for length in images.shape[-2:])
        centre = images[..., top : top + crop, left : left + crop]
        self.last = training.format == torch.channels_last
        self.pixels = training.placed(centre.transpose(0, 2, 3, 1) if self.last else centre)
        blocks = [statistics(block.float()) for block in self.pixels.split(4096)]
        self.factor, self.offset = (torch.cat(each) for each in zip(*blocks, strict=True))

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """(row, 3, y, x) float32."""
        of = (lambda values: values[rows]) if isinstance(rows, slice) else (lambda values: values.index_select(0, rows))
        found = whitened(of(self.pixels).float(), of(self.factor), of(self.offset))
        return found.permute(0, 3, 1, 2) if self.last else found


def train(trainings: Sequence[Training]) -> None:
    """Train runs side by side, a step of each in turn, to the end of each."""
    going = [one for one in trainings if not one.done]
    while going:
        for one in going:
            one.begin_epoch()
        for number in range(max(one.steps for one in going)):
            for one in going:
                if number < one.steps:
                    one.step(number)
        for one in going:
            one.test()
        for one in going:
            one.end_epoch()
        going = [one for one in going if not one.done]


@contextmanager
def repeatable(device: str) -> Iterator[None]:
    """The arithmetic in which runs repeat bit for bit, on one thread: workers are the parallelism."""
    with fixed_arithmetic(1), attention(device):
        yield


def set_dropout(network: nn.Module, share: float) -> None:
    """Have every module of dropout drop this share."""
    found = [module for module in network.modules() if isinstance(module, nn.modules.dropout._DropoutNd)]
    if share and not found:
        raise MicrotomeError("`dropout` is set, but the network has no dropout module")
    for module in found:
        module.p = share
