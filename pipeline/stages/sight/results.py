"""What `sight` says of a network: its attributes, its manifest, and the columns of its tables."""

from __future__ import annotations

from pipeline.storage.manifest import Manifest
from pipeline.storage.record import Record

TABLES = {
    "sight-receptive-fields.csv": (
        "layer", "area", "radius", "radius_standard_error", "deviation_y", "deviation_x", "note",
    ),
    "sight-attention.csv": (
        "attention", "head", "distance", "distance_standard_error", "distance_renormalised",
        "distance_renormalised_standard_error",
    ),
    "sight-skips.csv": (
        "skip", "branch", "shortcut", "ratio_special", "ratio_special_standard_error", "ratio_spatial",
        "ratio_spatial_standard_error", "accuracy", "accuracy_loss", "accuracy_loss_standard_error",
        "predictions_changed", "last_layer_cka", "last_layer_cka_standard_error",
    ),
    "sight-localisation.csv": (
        "output", "y", "x", "own", "own_standard_error", "others", "best_y", "best_x", "note",
    ),
}  # fmt: skip

NO_POSITIONS = "it has one position only: every pixel is in its field"  # a note that nothing was lost by

Estimate = tuple[float | None, float | None]
"""A number and its standard error; None: not defined."""


class Attributes(Record):
    """The attributes of sight.zarr.

    Attributes
    ----------
    absent : of what was asked for and this network or these images do not have, why.
    receptive_field_images : whose gradients were taken.
    accuracy : of the whole network. skips_not_read : modules whose additions cannot be read. labelled : images.
    attention_not_read : why, of attention that is not measured.
    localised_* : the layer whose positions are compared with patches.
    localisation : CKA with the patch at a position's `own` place, with the `others`, and their `difference`.
    """

    images: int
    minibatches: int
    image_size: tuple[int, int]
    measures: list[str]
    absent: dict[str, str]
    receptive_field_images: int | None = None
    accuracy: float | None = None
    skips_not_read: list[str] | None = None
    attention_not_read: list[str] | None = None
    labelled: int | None = None
    localised_layer: str | None = None
    localised_grid: tuple[int, int] | None = None
    localised_special_tokens: int | None = None
    localisation: dict[str, Estimate] | None = None


class Looked(Record):
    """What the manifest of `sight` says; as in `Attributes`."""

    images: int
    minibatches: int
    measures: list[str]
    absent: dict[str, str]

    @classmethod
    def of(cls, manifest: Manifest) -> Looked:
        return cls.read(manifest.result)
