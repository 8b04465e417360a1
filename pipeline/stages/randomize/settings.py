"""The section `randomize` of the configuration, and what an experiment's id is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from pipeline.config.base import Name, Positive, Share, Strict
from pipeline.config.networks import FROM_RUN, Network, NetworkSpec
from pipeline.config.section import Section, Selection
from pipeline.errors import nearest
from pipeline.storage.record import Record

if TYPE_CHECKING:
    from pipeline.config.core import Core

Corruption = Literal["true_labels", "corrupted_labels", "random_labels", "shuffled_pixels", "random_pixels", "gaussian"]


class Fitting(Strict):
    """How a run is trained. A key that a run omits comes from its network, then the experiment, then the paper."""

    epochs: PositiveInt | None = Field(None, description="passes over the images; 100")
    until_fitted: bool | None = Field(
        None, description="end after the first epoch that predicts every training image correctly; false"
    )
    batch_size: PositiveInt | None = Field(None, description="images per step; 128")
    learning_rate: Positive | None = Field(None, description="in the first epoch; 0.01")
    decay: Share | None = Field(None, description="factor on the learning rate after each epoch; 0.95")
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="of SGD; 0.9")
    weight_decay: NonNegativeFloat | None = Field(None, description="of matrices and filters; 0")
    random_crop: bool | None = Field(
        None, description="crop each image at a random position instead of its centre; false"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="probability of the network's dropout modules; default: as built"
    )


class Hyperparameters(Record):
    """How a run is trained: every key of `Fitting` with the value that holds; the defaults are the paper's or ours."""

    epochs: int = 100
    until_fitted: bool = False
    batch_size: int = 128
    learning_rate: float = 0.01
    decay: float = 0.95
    momentum: float = 0.9
    weight_decay: float = 0.0
    random_crop: bool = False
    dropout: float | None = None


class How(Hyperparameters):
    """All that a training depends on beside its network and the data: `crop` is what networks see of an image."""

    corruption: Corruption = "true_labels"
    share: float | None = None
    seed: int
    crop: int


class RunSettings(Hyperparameters):
    """A run as the id of its experiment sees it. `network` is what `pipeline.networks.identity.architecture` says."""

    corruption: Corruption
    share: float | None
    seed: int
    network: dict[str, Any]

    def how(self, crop: int) -> How:
        """Return the same, as a training takes it."""
        return How(**{key: getattr(self, key) for key in How.model_fields if key != "crop"}, crop=crop)


class Settings(Record):
    """The images that runs are trained and tested on, what networks see of them, and the runs by name."""

    split: str
    test: str
    images: int | None
    test_images: int | None
    crop: int
    classes: int
    runs: dict[str, RunSettings]


class RunNetwork(NetworkSpec, Fitting):
    """A network that runs train from random weights, with the keys of `Fitting` that hold for all of its runs."""

    @model_validator(mode="after")
    def _from_random_weights(self) -> RunNetwork:
        for key in ("weights", "local", "download", "seed", "prefix", "within"):
            if getattr(self, key) != NetworkSpec.model_fields[key].default:
                raise ValueError(f"leave out `{key}`: runs begin with random weights, from the run's seed")
        return self


class NoiseRun(Fitting):
    """One training: a network, what it fits, and how."""

    network: Name = Field(description="one of the experiment's `networks`")
    corruption: Corruption = Field("true_labels", description="corruption of the training images or labels")
    share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="with `corrupted_labels`: the probability that a label is replaced by a random one"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the initial weights, the corruption and the order of the images"
    )

    @model_validator(mode="after")
    def _share_goes_with_corrupted_labels(self) -> NoiseRun:
        if (self.corruption == "corrupted_labels") != (self.share is not None):
            raise ValueError("`corruption: corrupted_labels` and `share` go together")
        return self


class Randomize(Fitting):
    """How easily networks fit noise: runs on true labels, on corrupted labels, and on meaningless images."""

    dataset: Name = Field(description="the data set")
    split: str = Field("train", description="its split to train on")
    test: str = Field("validation", description="its split to test on, whose labels stay true")
    images: PositiveInt | None = Field(None, description="use only the first N images of `split`; default: all")
    test_images: PositiveInt | None = Field(None, description="use only the first N images of `test`; default: all")
    crop: PositiveInt = Field(28, description="height and width of the crop that networks see")
    networks: Annotated[dict[Name, RunNetwork], Field(min_length=1)] = Field(description="by name")
    runs: Annotated[dict[Name, NoiseRun], Field(min_length=1)] = Field(description="by name")
    checkpoint_seconds: NonNegativeFloat = Field(15, description="seconds between two checkpoints of a run")
    together: PositiveInt = Field(4, description="runs in parallel on one GPU; a CPU core takes one")

    @model_validator(mode="after")
    def _known_networks(self) -> Randomize:
        for name, run in self.runs.items():
            if run.network not in self.networks:
                raise ValueError(f"runs.{name}: no network {run.network!r}{nearest(run.network, self.networks)}")
        if self.split == self.test:
            raise ValueError(f"split and test are both {self.split!r}: runs are to be tested on other images")
        return self

    def hyperparameters(self, name: str) -> Hyperparameters:
        """Return how a run is trained."""
        run = self.runs[name]
        levels = (run, self.networks[run.network], self)
        return Hyperparameters(
            **{
                key: next((value for level in levels if (value := getattr(level, key)) is not None), field.default)
                for key, field in Hyperparameters.model_fields.items()
            }
        )


Experiments = dict[Name, Randomize]


def check(core: Core, section: Experiments) -> None:
    """Raise `ValueError` where an experiment's data set, or the run whose weights a network takes, is not there."""
    for name, asked in section.items():
        if asked.dataset not in core.datasets:
            known = nearest(asked.dataset, core.datasets)
            raise ValueError(f"randomize.{name}: no data set {asked.dataset!r}{known}")
    for name, network in core.networks.items():
        if network.run is not None:
            _of_a_run(section, f"network {name!r}", network, *network.run)


def _of_a_run(section: Experiments, who: str, network: Network, experiment: str, run: str) -> None:
    """A network with the weights of a run is that run's network, and sees images as the run did."""
    if experiment not in section:
        raise ValueError(f"{who}: weights: `randomize` has no experiment {experiment!r}{nearest(experiment, section)}")
    asked = section[experiment]
    if run not in asked.runs:
        raise ValueError(f"{who}: weights: randomize.{experiment} has no run {run!r}{nearest(run, asked.runs)}")
    own = asked.networks[asked.runs[run].network]
    for key in ("torchvision", "timm", "transformers", "module", "arguments"):
        if getattr(network, key) != getattr(own, key):
            raise ValueError(
                f"{who}: {key} is {getattr(network, key)!r}, and that of {FROM_RUN}{experiment}/{run} is "
                f"{getattr(own, key)!r}: describe the run's network"
            )
    if not network.preprocessing.per_image:
        raise ValueError(f"{who}: runs whiten each image by itself: give `preprocessing: {{per_image: true}}`")


def narrowed(core: Core, section: Experiments, selection: Selection) -> Experiments:
    """Return the experiments on the data sets that stay, and those whose weights a network takes.

    Named networks need no others.
    """
    needed = {network.run[0] for network in selection.networks.values() if network.run is not None}
    return {
        name: asked
        for name, asked in section.items()
        if name in needed or (asked.dataset in selection.datasets and not selection.named)
    }


SECTION = Section(
    "randomize",
    Experiments,
    "how easily networks fit noise; experiments by name",
    default={},
    check=check,
    narrowed=narrowed,
)
