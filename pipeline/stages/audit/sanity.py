"""Sanity checks: does a map change when the network forgets what it learnt?

Adebayo et al., "Sanity checks for saliency maps" (NeurIPS 2018).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from pipeline.config.base import UNTRAINED
from pipeline.errors import nearest
from pipeline.plan import inspected
from pipeline.stages.audit.declared import Asked, Measure, Test, TestOptions

if TYPE_CHECKING:
    from pipeline.plan.job import Job

Order = Literal["cascading", "independent"]
ALIKE = {
    "rank": "Rank correlation",
    "magnitude_rank": "Rank correlation of magnitudes",
    "ssim": "Structural similarity of magnitudes",
}
"""How alike two maps are: ways, and their titles."""


class LayerRandomisation(TestOptions):
    """Give layers the weights of the untrained network, from the output to the input, and compare the maps."""

    orders: Annotated[list[Order], Field(min_length=1, max_length=2)] = Field(
        ["cascading", "independent"],
        description="`cascading`: a layer and all behind it; `independent`: a layer alone",
    )
    groups: Annotated[int, Field(ge=1, le=100)] = Field(
        6,
        description="so many groups of consecutive layers with weights stand for the layers, where `layers` names none",
    )
    layers: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="modules in place of groups, from the output to the input; each with all inside it"
    )

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps, from the output to the input."""
        if self.layers is not None:
            return tuple(self.layers)
        return tuple(f"{step + 1}/{self.groups}" for step in range(self.groups))


class LabelRandomisation(TestOptions):
    """Compare the maps with those of a network of the same architecture that was trained on random labels."""

    network: str = Field(description="the network that was trained on random labels, one of the audit's")

    def applies(self, network: str) -> bool:
        """Return whether a network is compared: the one that was trained on random labels is not, with itself."""
        return super().applies(network) and network != self.network


def _layers(options: LayerRandomisation) -> Mapping[str, Measure]:
    labels = {"layer": options.steps}
    return {
        f"{order}_{way}": Measure(f"{title}, {order}", ("layer",), labels, "lower")
        for order in options.orders
        for way, title in ALIKE.items()
    }


def _labels(options: LabelRandomisation) -> Mapping[str, Measure]:
    return {way: Measure(title, better="lower") for way, title in ALIKE.items()}


def _check_layers(options: LayerRandomisation, asked: Asked) -> Iterator[str]:
    if asked.draft.networks[asked.network].weights == "random" and not asked.network.endswith(UNTRAINED):
        yield f": network {asked.network!r} is not trained, so that there is nothing to forget"


def _check_labels(options: LabelRandomisation, asked: Asked) -> Iterator[str]:
    if options.network not in asked.networks:
        yield (
            f".network: no network {options.network!r} of the audit on {asked.dataset!r}"
            f"{nearest(options.network, asked.networks)}"
        )


def _suits(options: LabelRandomisation, job: Job[Any], beside: Mapping[str, Job[Any]]) -> Iterator[str]:
    """Yield which network is of another architecture; the same number of weights is compared by name when it runs."""
    other = beside.get(options.network)
    if other is None:
        return
    own, theirs = (inspected.found(each).parameters for each in (job, other))
    if own != theirs:
        yield (
            f".network: {options.network!r} has {theirs:,} weights and {job.network!r} {own:,}, and the check compares "
            f"networks of one architecture: name the networks to compare in the test's `networks`"
        )


TESTS: dict[str, Test] = {
    "layer_randomisation": Test(
        "Randomisation of layers",
        "Layers forget what they learnt, from the output to the input: a map that stays the same does not explain it.",
        LayerRandomisation,
        _layers,
        lambda options, own, size: own * len(options.orders) * len(options.steps),
        forgets=True,
        check=_check_layers,
    ),
    "label_randomisation": Test(
        "Randomisation of labels",
        "The same maps of a network that was trained on random labels: they should differ.",
        LabelRandomisation,
        _labels,
        lambda options, own, size: own,
        compares=True,
        check=_check_labels,
        suits=_suits,
    ),
}
