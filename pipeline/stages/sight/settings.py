"""The section `sight` of the configuration, and what the id of a look at a network is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from pipeline.config.base import Name, _named_once
from pipeline.config.networks import Preprocessing, SpecialTokens
from pipeline.config.section import Chosen, Selection
from pipeline.data.minibatches import Batching
from pipeline.networks.features import Arithmetic
from pipeline.storage.record import Record

Measure = Literal["receptive_field", "attention", "skips", "localisation"]


class Sight(Chosen):
    """How networks see images: reach of layers and attention, use of skip connections, localisation."""

    networks: list[str] | None = Field(
        None,
        description="only these networks; the suffix `-untrained` names their controls; default: all except controls",
    )
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all of the network's")
    measures: Annotated[list[Measure], Field(min_length=1)] = Field(
        list(get_args(Measure)), description="measurements to make; default: all"
    )
    images: Annotated[int, Field(ge=4)] = Field(
        256, description="images that each network sees, once as it is and once without each skip connection"
    )
    minibatch: Annotated[int, Field(ge=4)] = Field(64, description="images per minibatch")
    gradients: PositiveInt = Field(8, description="images per minibatch whose gradients give receptive fields")
    seed: NonNegativeInt = Field(0, description="another seed gives other minibatches")
    split: str | None = Field(None, description="split of the images; default: the dissected one")
    layers: dict[str, Literal["all", "auto"] | Annotated[list[str], Field(min_length=1)]] = Field(
        {},
        description="by network: names or patterns of layers, `auto`, or `all` modules; default: the network's "
        "`layers`",
    )

    @model_validator(mode="after")
    def _distinct(self) -> Sight:
        _named_once({key: getattr(self, key) for key in ("networks", "datasets", "measures")})
        return self

    def names(self) -> list[str]:
        return [*super().names(), *self.layers]

    def narrowed(self, selection: Selection) -> dict[str, Any]:
        layers = {name: self.layers[name] for name in selection.kept(self.layers)}
        return super().narrowed(selection) | {"layers": layers}


class Settings(Record):
    """What is measured of which layers of a network, how it is computed, and over which minibatches of a split."""

    layers: Literal["all", "auto"] | list[str]
    measures: list[Measure]
    images: int
    minibatch: int
    gradients: int
    seed: int
    split: str
    special_tokens: int | SpecialTokens | None
    preprocessing: Preprocessing
    numerics: Arithmetic
    grid: tuple[int, int] | None = None
    layout: dict[str, str] | None = None

    @property
    def batching(self) -> Batching:
        """Every image goes through the network once, in a smaller last minibatch too."""
        return Batching(
            images=self.images, minibatch=self.minibatch, seed=self.seed, epochs=1, replacement=False, last="weigh"
        )


SECTION = Sight.section("sight", "how networks see images; default: not measured")
