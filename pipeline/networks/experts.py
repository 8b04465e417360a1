"""Experts: networks that know what likely images are, as priors of images that are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config.networks import Expert
from pipeline.networks import beside
from pipeline.storage.identity import FileDigests
from pipeline.workers.devices import device

if TYPE_CHECKING:
    import torch

ALIKE = 1e-3
"""By how much, relative to the largest number, an expert may judge an image differently beside another."""


@dataclass(frozen=True)
class Likelihood:
    """An expert as tasks name it: small, picklable, and equal only for equal networks and weights."""

    name: str
    json: str
    weights: str

    @staticmethod
    def of(name: str, expert: Expert, weights: str) -> Likelihood:
        return Likelihood(name, expert.model_dump_json(), weights)

    @property
    def expert(self) -> Expert:
        return Expert.model_validate_json(self.json)

    def __call__(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p(x) up to a constant, (image,), of pixels from 0 to 1 (image, channel, y, x), and its gradient.

        A denoiser r gives the gradient alone, (r(x) - x) / noise^2: that of the density of noisy images (Alain and
        Bengio, "What regularized auto-encoders learn from the data-generating distribution", JMLR 2014, theorem 1).
        Its first value is then -|r(x) - x|^2 / (2 noise^2), how far it would move the image.
        """
        import torch

        from pipeline.networks.graph.call_sites import frozen

        expert = self.expert
        network, (low, high) = beside.network(expert.spec, self.weights), expert.input
        if expert.kind == "denoiser":
            assert expert.noise is not None
            with torch.no_grad():
                moved = (network(low + (high - low) * pixels.detach()) - low) / (high - low) - pixels.detach()
            pull = moved / expert.noise**2
            return -0.5 * (moved * pull).flatten(1).sum(1), pull
        with frozen(network), torch.enable_grad():
            given = pixels.detach().requires_grad_()
            value = network(low + (high - low) * given).reshape(len(pixels))
            (pull,) = torch.autograd.grad(value.sum(), given)
        return value.detach(), pull


def settings_of(expert: Expert, digests: FileDigests) -> dict[str, Any]:
    """Return what ids hold of an expert: what builds it, its weights, and how it is used."""
    used = expert.model_dump(include={"kind", "weight", "input", "noise"}, mode="json")
    return beside.made_of(expert.spec, digests) | used


def why_not(likelihood: Likelihood, size: tuple[int, int], channels: int) -> str:
    """Return why an expert judges no images of this size; empty if it does."""
    import torch

    expert = likelihood.expert
    low, high = expert.input
    network = beside.network(expert.spec, likelihood.weights)
    drawn = torch.rand((2, channels, *size), generator=torch.Generator().manual_seed(0)).to(device())
    try:
        with torch.no_grad():
            made, twice = (network(low + (high - low) * each) for each in (drawn, drawn[[0, 0]]))
    except Exception as error:  # shapes that do not fit fail in many ways
        return f"it cannot take images of shape {[channels, *size]}: {type(error).__name__}: {error}"
    shape = tuple(made.shape) if isinstance(made, torch.Tensor) else None
    if expert.kind == "denoiser" and shape != tuple(drawn.shape):
        return f"as a denoiser it gives {shape} for images of shape {tuple(drawn.shape)}, expected the same shape"
    if expert.kind == "density" and shape not in ((2,), (2, 1)):
        return f"as a density it gives {shape} for 2 images, expected one number each, (2,)"
    assert made is not None
    if not bool(made.isfinite().all()):
        return "it gives numbers that are not finite on noise"
    if not torch.allclose(twice[0], made[0], rtol=ALIKE, atol=ALIKE * float(made.abs().max())):
        return "what it says of an image depends on the others of its batch, or on chance"
    try:
        likelihood(drawn)
    except RuntimeError as error:
        return f"its log p(x) has no gradient with respect to the image: {error}"
    return ""
