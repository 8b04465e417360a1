"""Training recipes: the part of a configuration that, together with the data, determines the weights."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt


class Recipe(BaseModel):
    """Settings of one training run, budgeted in steps: the same recipe gives the same weights on a slow machine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: PositiveInt = Field(1000, description="optimiser steps")
    batch_size: Annotated[int, Field(ge=2)] = Field(64, description="images of a step")
    learning_rate: PositiveFloat = Field(3e-3, description="of AdamW, at its highest")
    weight_decay: NonNegativeFloat = Field(0.05, description="of AdamW; biases and norms are left out")
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="share of the steps in which the learning rate rises; after it a cosine takes it to zero"
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="share of the target that goes to all classes"
    )
    flip: bool = Field(True, description="mirror half of the images")
    shift: NonNegativeInt = Field(0, description="move images by up to so many pixels; the border is repeated")
    seed: NonNegativeInt = Field(0, description="of the order of the images and their augmentation")
    threads: PositiveInt = Field(2, description="of torch; sums are rounded differently with another number")
    checkpoint_every: PositiveInt = Field(100, description="steps between two checkpoints")
