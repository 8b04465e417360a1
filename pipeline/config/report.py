"""The sections `report` and `figures`: the pages at the end of a run."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from pipeline.config.base import Strict


class Report(Strict):
    """The pages at the end of a run."""

    title: str | None = Field(None, description="default: the experiment's name")
    top_images: PositiveInt = Field(5, description="images per unit")
    cards: NonNegativeInt = Field(1000, description="units per network that are shown on images, highest IoU first")


class Figures(Strict):
    """The figures of the report, as files for a paper. Each also exists as SVG, which the page shows, and as CSV."""

    width: Literal["one", "two"] | Annotated[float, Field(ge=2, le=20)] = Field(
        "two", description="one or two columns of a journal, 3.5 or 7.1 inches; or a number of inches"
    )
    formats: list[Literal["pdf", "png"]] = Field(["pdf", "png"], description="formats besides SVG")
    dpi: Annotated[int, Field(ge=50, le=1200)] = Field(300, description="dots per inch of PNG files")

    @property
    def inches(self) -> float:
        return {"one": 3.5, "two": 7.1}.get(self.width, 0) if isinstance(self.width, str) else self.width
