"""What a test sees: a network, images of one shard, and the map that one method, or a control, has of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from kernels.attribution.agreement import resized
from pipeline.config.networks import Network
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.forward import Model, network_of, normalise
from pipeline.networks.gradients import Logit, in_chunks, padded, refuse_training
from pipeline.networks.layers import head_of, one_attention_path
from pipeline.stages.attribute.explaining import baseline_pixels, explain_inputs
from pipeline.stages.attribute.options import METHODS, Labels, Method, Options, Segmented
from pipeline.stages.attribute.segments import part
from pipeline.stages.attribute.subject import Attribution
from pipeline.stages.attribute.work import Work
from pipeline.stages.concepts.results import Category

T = TypeVar("T")


def _no_labels(place: int) -> np.ndarray:
    raise MicrotomeError("no label maps: the test does not ask for the stage `concepts`")


@dataclass(frozen=True)
class Shared:
    """What all tests and methods see alike of the audited images of a shard.

    Attributes
    ----------
    work : of the explanations: the network, its methods, their baseline and references.
    pixels : uint8 (image, 3, y, x). labels, slots : int64 (image,). ids, seeds : of each image.
    target : what is explained of each image.
    classes : that is a class of, int64 (image,).
    dataset : the configuration of the data set, as JSON. class_names : of its classes.
    models : the networks of the audit on this data set, by name.
    twin : the untrained control; None if there is none, or no test runs it.
    categories : of the label maps, by name; none where no test reads them. read_labels : reads those of one category.
    given : what `Test.prepare` made, by test.
    """

    work: Work
    pixels: torch.Tensor
    labels: np.ndarray
    slots: np.ndarray
    ids: Sequence[str]
    seeds: Sequence[int]
    target: Logit
    dataset: Mapping[str, Any]
    split: str
    class_names: Sequence[str]
    models: Mapping[str, Model] = field(default_factory=dict)
    twin: Model | None = None
    categories: Mapping[str, Category] = field(default_factory=dict)
    read_labels: Callable[[int], np.ndarray] = _no_labels
    given: Mapping[str, Any] = field(default_factory=dict)
    kept: dict[Any, Any] = field(default_factory=dict)
    of_network: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """The images of a shard for one test and one method or control.

    Attributes
    ----------
    method : its name in the experiment, or that of the control. control : that name where it is a control, else empty.
    maps : (image, y, x) float32, raw and signed as stored, of the method's own size; None for a control that a test
        makes itself.
    stored : further numbers of each image that the method's store holds, (image, ...), such as `residual`.
    reasons : why the method refuses a part of the test, by the part's name: the test writes them.
    """

    shared: Shared
    method: str
    control: str = ""
    maps: np.ndarray | None = None
    stored: Mapping[str, np.ndarray] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def kind(self) -> Method | None:
        """What is known of the method; None for a control."""
        return None if self.control else METHODS[self.options_of_method.kind]

    @property
    def options_of_method(self) -> Options:
        """The options of the method of attribution."""
        return self.shared.work.methods[self.method]

    @property
    def model(self) -> Model:
        return self.shared.work.model

    @property
    def spec(self) -> Network:
        return self.model.spec

    @cached_property
    def network(self) -> nn.Module:
        """The network, in eval mode, on the worker's device."""
        return network_of(self.model)

    @property
    def pixels(self) -> torch.Tensor:
        """The images, uint8 (image, 3, y, x)."""
        return self.shared.pixels

    @property
    def size(self) -> tuple[int, int]:
        """(y, x) of the images."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @cached_property
    def inputs(self) -> torch.Tensor:
        """The images as the network takes them, (image, channel, y, x)."""
        return self.memo("inputs", lambda: self.normalise(self.pixels))

    @property
    def target(self) -> Logit:
        return self.shared.target

    @property
    def classes(self) -> np.ndarray:
        """The class that is explained, int64 (image,)."""
        return self.target.classes.cpu().numpy()

    @property
    def labels(self) -> np.ndarray:
        return self.shared.labels

    @property
    def slots(self) -> np.ndarray:
        return self.shared.slots

    @property
    def ids(self) -> Sequence[str]:
        return self.shared.ids

    @property
    def seeds(self) -> Sequence[int]:
        """Of what is drawn for each image."""
        return self.shared.seeds

    @property
    def class_names(self) -> Sequence[str]:
        return self.shared.class_names

    @property
    def dataset(self) -> Mapping[str, Any]:
        """The configuration of the data set."""
        return self.shared.dataset

    @property
    def split(self) -> str:
        return self.shared.split

    def given(self, test: str) -> Any:
        """Return what the main process made for a test."""
        return self.shared.given[test]

    def memo(self, key: Any, make: Callable[[], T]) -> T:
        """Return what is kept under a key, made once for all methods and tests of these images."""
        if key not in self.shared.kept:
            self.shared.kept[key] = make()
        return self.shared.kept[key]

    def memo_of_network(self, key: Any, make: Callable[[], T]) -> T:
        """Return what is kept under a key, made once for all images of a task."""
        if key not in self.shared.of_network:
            self.shared.of_network[key] = make()
        return self.shared.of_network[key]

    def picked(self, rows: np.ndarray) -> Batch:
        """Return some of the images as a batch of their own, which may repeat."""

        def make() -> Shared:
            own = self.shared
            at = torch.from_numpy(rows)
            return replace(
                own,
                pixels=own.pixels[at],
                labels=own.labels[rows],
                slots=own.slots[rows],
                ids=[own.ids[row] for row in rows],
                seeds=[own.seeds[row] for row in rows],
                target=own.target.at(at),
                read_labels=lambda place: own.read_labels(place)[rows],
                kept={},
            )

        shared = self.memo(("picked", *rows.tolist()), make)
        maps = None if self.maps is None else self.maps[rows]
        return replace(self, shared=shared, maps=maps, stored={name: own[rows] for name, own in self.stored.items()})

    # Scores -----------------------------------------------------------------------------------------------------------

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 images as the network takes them."""
        return normalise(pixels, self.spec)

    def logits_at(self, inputs: torch.Tensor, network: nn.Module | None = None) -> torch.Tensor:
        """Return the logits of any inputs, (point, class), in micro-batches of the network's size."""
        network, size = network or self.network, self.spec.numerics.micro_batch
        refuse_training(network)
        found = []
        with torch.no_grad(), one_attention_path():
            for start, stop in in_chunks(len(inputs), size):
                head = head_of(network(padded(inputs[start:stop], size).clone()))
                if head is None or head.ndim != 2:
                    raise MicrotomeError(f"network {self.model.name!r} gives no logits (image, class)")
                found.append(head[: stop - start])
        return torch.cat(found)

    def scores_at(
        self, inputs: torch.Tensor, rows: Sequence[int] | np.ndarray | None = None, network: nn.Module | None = None
    ) -> torch.Tensor:
        """Return the score of any inputs, (point,), each for the target of the image `rows[point]`.

        Without `rows`, the points are the images, in order.
        """
        at = torch.arange(len(inputs)) if rows is None else torch.as_tensor(np.asarray(rows))
        return self.target.at(at.to(self.target.classes.device))(self.logits_at(inputs, network))

    def scores(self, pixels: torch.Tensor, rows: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """Return the score of any uint8 images, float64 (point,)."""
        return self.scores_at(self.normalise(pixels), rows).double().cpu().numpy()

    @cached_property
    def logits(self) -> torch.Tensor:
        """The logits of the images, (image, class)."""
        return self.memo("logits", lambda: self.logits_at(self.inputs))

    @cached_property
    def score(self) -> np.ndarray:
        """The score of the images, float64 (image,)."""
        return self.target(self.logits).double().cpu().numpy()

    # Maps -------------------------------------------------------------------------------------------------------------

    def at_image(self, maps: np.ndarray | None = None) -> np.ndarray:
        """Return maps of the images' size, float32 (image, y, x): those of a layer are enlarged bilinearly."""
        own = self.maps if maps is None else maps
        assert own is not None
        return own if own.shape[1:] == self.size else resized(own, self.size)

    @cached_property
    def baseline(self) -> torch.Tensor:
        """The baseline of each image as the network takes it, (image, channel, y, x)."""
        work = self.shared.work
        return self.memo(
            "baseline", lambda: self.normalise(baseline_pixels(work.baseline, self.pixels, self.ids).contiguous())
        )

    def segments(self, options: Segmented) -> torch.Tensor:
        """Return the segments of the images that a black box parts them into, int64 (image, y, x)."""
        setting = options.segments

        def make() -> torch.Tensor:
            maps = self.label_maps(setting.category) if isinstance(setting, Labels) else None
            patches = self.shared.work.explainable.patches
            return torch.from_numpy(part(setting, self.pixels.numpy() / 255.0, maps, patches)[0])

        return self.memo(("segments", setting.key), make)

    def explain(
        self,
        network: nn.Module | None = None,
        inputs: torch.Tensor | None = None,
        target: Logit | None = None,
        baseline: torch.Tensor | None = None,
        rows: Sequence[int] | np.ndarray | None = None,
        options: Options | None = None,
    ) -> np.ndarray:
        """Return the method's maps of a changed network or of changed images, float32 (point, y, x), of its own size.

        The method's own function is called as the stage `attribute` calls it, in padded micro-batches.

        Parameters
        ----------
        network : default: the audit's. inputs : (point, channel, y, x), as it takes them; default: the images.
        target : of each point; default: that of the image `rows[point]`. baseline : default: the image's own.
        rows : the image that each point stands for; default: the points are the images, in order.
        options : those of another method, which needs neither layer nor references.

        Raises
        ------
        MicrotomeError
            The method refuses the network, or the map is not finite.
        """
        inputs = self.inputs if inputs is None else inputs
        at = np.arange(len(inputs)) if rows is None else np.asarray(rows)
        wanted = self.target.at(torch.as_tensor(at)) if target is None else target
        size, found = self.spec.numerics.micro_batch, []
        for start, stop in in_chunks(len(inputs), size):
            made = self.attribution(
                network or self.network,
                inputs[start:stop],
                wanted.at(torch.arange(start, stop)),
                at[start:stop],
                None if baseline is None else baseline[start:stop],
                pad=size,
                options=options,
            )
            if made.map is None:
                raise MicrotomeError(f"method {self.method!r} has no map of such inputs")
            found.append(made.map[: stop - start].detach().float().cpu().numpy())
        maps = np.concatenate(found)
        if not np.isfinite(maps).all():
            raise MicrotomeError(f"network {self.model.name!r}, method {self.method!r}: a map is not finite")
        return maps

    def attribution(
        self,
        network: nn.Module,
        inputs: torch.Tensor,
        target: Logit,
        rows: np.ndarray,
        baseline: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        pad: int = 0,
        options: Options | None = None,
    ) -> Attribution:
        """Return the explanation of inputs that go through the network together, each in place of `rows[point]`."""
        chosen = self.options_of_method if options is None else options
        kind, count = METHODS[chosen.kind], len(inputs)
        if kind.baseline and baseline is None:
            baseline = self.baseline[torch.as_tensor(rows)].to(inputs.dtype)
        if isinstance(chosen, Segmented) and segments is None:
            segments = self.segments(chosen)[torch.as_tensor(rows)]
        seeds = [self.seeds[int(row)] for row in rows]
        seeds += seeds[-1:] * (pad - count)
        return explain_inputs(
            self.shared.work,
            self.method,
            network,
            padded(inputs, pad),
            target.at(padded(torch.arange(count), pad)),
            seeds=seeds,
            baseline=padded(baseline, pad) if kind.baseline and baseline is not None else None,
            segments=padded(segments, pad) if segments is not None else None,
            count=count,
            options=options,
        )

    # What else there is -----------------------------------------------------------------------------------------------

    @property
    def categories(self) -> list[str]:
        """The categories of the label maps."""
        return list(self.shared.categories)

    def concepts(self, category: str) -> dict[str, int]:
        """Return the number in label maps of each concept of a category."""
        found = self._category(category)
        return dict(zip(found.concepts, found.numbers, strict=True))

    def label_maps(self, category: str) -> np.ndarray:
        """Return the label maps of a category, uint16 (image, y, x), at their own size."""
        place = self._category(category).place
        return self.memo(("labels", category), lambda: self.shared.read_labels(place))

    def _category(self, name: str) -> Category:
        known = self.shared.categories
        if name not in known:
            raise MicrotomeError(f"no label maps of {name!r}{nearest(name, known)}")
        return known[name]

    @cached_property
    def untrained(self) -> nn.Module | None:
        """The untrained control of the network; None where the network is itself random."""
        twin = self.shared.twin
        return None if twin is None else network_of(twin)

    def network_of(self, name: str) -> nn.Module:
        """Return another network of the audit on this data set."""
        if name not in self.shared.models:
            raise MicrotomeError(f"no network {name!r} in this audit: name it in its `networks`")
        return network_of(self.shared.models[name])

    def of(self, method: str, control: str, maps: np.ndarray | None, stored: Mapping[str, np.ndarray]) -> Batch:
        """Return the same images for another method or control."""
        return replace(self, method=method, control=control, maps=maps, stored=stored)
