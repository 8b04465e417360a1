"""Training that repeats bit for bit: random numbers by purpose, fixed arithmetic, and checkpoints.

All training of this project shares it, whatever the schedule: networks of the configuration
(`pipeline.networks.training.loop`) and runs on corrupted data (`pipeline.stages.randomize.training`).
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kernels.calibration.reliability import sum_to
from pipeline.errors import MicrotomeError
from pipeline.storage.atomic import write_atomically

ORDER = 1  # purpose of random numbers: the order of the images


class Checkpoint:
    """A file from which training resumes: network, optimiser, and other facts at that point.

    `key` identifies its recipe and data; a checkpoint with another key is refused.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key

    def save(self, network: nn.Module, optimiser: torch.optim.Optimizer, facts: Mapping[str, Any]) -> None:
        """Write the checkpoint atomically; `facts` are plain values."""
        content = {
            "key": self.key,
            **facts,
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(content, buffer)
        write_atomically(self.path, buffer.getvalue())

    def load(self, network: nn.Module, optimiser: torch.optim.Optimizer, facts: Sequence[str]) -> dict[str, Any] | None:
        """Restore network and optimiser and return the facts with these names; None without a file.

        Raises
        ------
        MicrotomeError
            The file cannot be read, or belongs to another recipe or other data.
        """
        for leftover in self.path.parent.glob(f".{self.path.name}.*.partial"):  # of a run killed while it saved
            leftover.unlink()
        if not self.path.exists():
            return None
        found: dict[str, Any] = {}
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            key = content["key"]
            if key == self.key:
                network.load_state_dict(content["network"], strict=True)
                optimiser.load_state_dict(content["optimiser"])
                found = {name: content[name] for name in facts}
        except Exception as error:  # whatever is wrong with the bytes, the remedy is the same
            raise MicrotomeError(
                f"training checkpoint {self.path} cannot be read ({type(error).__name__}); "
                f"delete it to train from scratch"
            ) from error
        if key != self.key:
            raise MicrotomeError(
                f"training checkpoint {self.path} is of another recipe or data set; delete it to train from scratch"
            )
        return found


def native_bfloat16(device: str) -> bool:
    """Return whether the device multiplies bfloat16 in hardware; if it is emulated, float32 is faster."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def stream(seed: int, purpose: int, number: int) -> np.random.Generator:
    """Return a random generator that depends on these arguments alone, for a step, an epoch or a corruption."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, purpose, number])))


def order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """Return the order of one pass, recomputed at each step: 0.2 ms for 10,000 images, and no state to store."""
    return stream(seed, ORDER, epoch).permutation(count)


def count_classes(network: nn.Module, images: Tensor) -> int:
    """Return how many logits the network gives."""
    network.eval()
    with torch.inference_mode():
        logits = network(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise MicrotomeError(f"the network must give logits of shape (batch, class), found {found}")
    if logits.shape[1] > 1 and sum_to(logits.double().cpu().numpy()):
        raise MicrotomeError(
            "the network gives probabilities (rows are at least 0 and sum to 1), and its loss takes logits: leave out "
            "its last softmax"
        )
    return logits.shape[1]


def check_classes(labels: NDArray[np.int64], classes: int, what: str) -> None:
    """Refuse labels without a logit of the network."""
    if len(labels) and labels.max() >= classes:
        raise MicrotomeError(
            f"the network has {classes} classes but the {what} labels go up to {labels.max()}; "
            f"build it with {labels.max() + 1} or more"
        )


def groups(network: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return parameters with weight decay (matrices and filters) and without (biases, norms)."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def attention(device: str) -> AbstractContextManager[None]:
    """Compute attention as plain matrix products on a CPU.

    The fused backward pass would take half of a small transformer's step.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


@contextmanager
def fixed_arithmetic(threads: int) -> Iterator[None]:
    """Fix the number of threads and use deterministic algorithms; restore torch's own random state afterwards."""
    before = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    benchmark = torch.backends.cudnn.benchmark
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.backends.cudnn.benchmark = False
    try:
        with torch.random.fork_rng():
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.benchmark = benchmark
