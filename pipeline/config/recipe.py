"""Training recipes: the part of a configuration that, together with the data, determines the weights."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Recipe(BaseModel):
    """Settings of one training run, in steps: the same recipe gives the same weights on a slow machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: PositiveInt = Field(1000, description="optimiser steps")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="images per step")
    learning_rate: PositiveFloat = Field(3e-3, description="peak learning rate of AdamW")
    weight_decay: NonNegativeFloat = Field(0.05, description="of AdamW, without biases and norms")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the steps in which the learning rate rises; then a cosine decays it to zero"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the target that goes to all classes"
    )
    flip: bool = Field(True, description="mirror half of the images")
    shift: NonNegativeInt = Field(0, description="shift images by up to this many pixels; the border is repeated")
    seed: NonNegativeInt = Field(0, description="of the order of the images and their augmentation")
    threads: PositiveInt = Field(2, description="of torch; another number rounds sums differently")
    checkpoint_every: PositiveInt = Field(100, description="steps between two checkpoints")
