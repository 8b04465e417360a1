"""The section `calibrate`, and what the id of a calibration is made of."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pipeline.config.base import UNTRAINED, Many, Name, _named_once
from pipeline.config.section import Chosen
from pipeline.storage.record import Record

Calibration = Literal[
    "histogram", "histogram_mass", "histogram_top", "histogram_mass_top", "isotonic", "isotonic_top", "bbq", "bbq_top",
    "temperature", "vector", "matrix", "matrix_odir",
]  # fmt: skip


class Calibrate(Chosen):
    """Whether networks know when they are wrong: fit methods on some images of the dissected split, judge on others."""

    controls: ClassVar[bool] = False

    networks: list[Name] | None = Field(None, description="only these networks; default: all")
    datasets: list[Name] | None = Field(None, description="only on these data sets; default: all with classes")
    methods: list[Calibration] | None = Field(
        None, description="methods to fit; default: all, but no matrices with more than 100 classes"
    )
    splits: Many = Field(20, description="random splits of the images: a single split is noisy")
    share: Annotated[float, Field(gt=0, lt=1)] = Field(0.5, description="share of the images to fit on")
    bins: Many = Field(15, description="of reliability diagrams, calibration errors and histogram binning")
    penalty: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="of `matrix_odir`, on off-diagonal entries and the bias; default: chosen on a fifth of the "
        "fitting images",
    )

    @model_validator(mode="after")
    def _distinct(self) -> "Calibrate":
        _named_once({key: getattr(self, key) for key in ("networks", "datasets", "methods")})
        return self

    def applies(self, network: str, dataset: str) -> bool:
        """Return whether a network is calibrated on a data set; an untrained control never is."""
        return not network.endswith(UNTRAINED) and super().applies(network, dataset)


class Fitting(Record):
    """How methods are fitted and judged.

    Attributes
    ----------
    methods : in their order. splits : random ones of the images. share : of the images, to fit on.
    bins : of reliability diagrams, errors and histograms. penalty : of `matrix_odir`; None: it is chosen.
    """

    methods: list[Calibration]
    splits: int
    share: float
    bins: int
    penalty: float | None


class Settings(Record):
    """How methods are fitted, and how many classes the images are labelled with."""

    calibrate: Fitting
    classes: int


SECTION = Calibrate.section("calibrate", "how networks are calibrated; default: no calibration")
