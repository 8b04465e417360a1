"""What all images of an experiment have in common when they are explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pipeline.networks.fitness import Explainable
from pipeline.networks.forward import Model
from pipeline.networks.layer import LayerInfo
from pipeline.stages.attribute.options import Options, Segments
from pipeline.stages.attribute.results import Layout, SegmentLayout, method_of
from pipeline.stages.attribute.settings import Targets
from pipeline.stages.attribute.subject import Known
from pipeline.storage.store import Array


@dataclass(frozen=True)
class Work:
    """What all shards of a step have in common.

    Attributes
    ----------
    baseline : its kind, or the image itself as pixels.
    methods : by name, a method's options. parted : by the name of their store, settings of segments.
    stores : of both. layouts, segment_layouts : of each.
    categories : by name, the place of a category of label maps on the store's axis.
    background : by name, what a method compares images with, see `inputs.background_of`.
    """

    model: Model
    explainable: Explainable
    targets: Targets
    baseline: str | np.ndarray
    methods: Mapping[str, Options]
    stores: Mapping[str, Path]
    layouts: Mapping[str, Layout]
    parted: Mapping[str, Segments] = field(default_factory=dict)
    segment_layouts: Mapping[str, SegmentLayout] = field(default_factory=dict)
    categories: Mapping[str, int] = field(default_factory=dict)
    background: Mapping[str, np.ndarray] = field(default_factory=dict)

    def layer_of(self, name: str) -> LayerInfo | None:
        """Return the layer of a method that has one."""
        layer = self.methods[name].layer_name()
        return None if layer is None else self.explainable.layers[layer]

    def layout(self, name: str) -> Layout | SegmentLayout:
        """Return the layout of the store of a method, or of segments."""
        return self.layouts[name] if name in self.layouts else self.segment_layouts[name]

    def layers_of(self, store: str) -> list[str]:
        """Return the layers of a store of the relevance of units."""
        return self.methods[method_of(store)].unit_layers()

    def relevance_of(self, store: str, layer: str) -> Array:
        """Return the layout of the relevance of a layer's units."""
        return self.layouts[method_of(store)].relevance(self.explainable.units[layer].shape[0])

    def known(self, name: str) -> Known:
        """Return what was found of the network for a method."""
        found, layer = self.explainable, self.layer_of(name)
        if layer is None:
            units = tuple(found.units[each] for each in self.methods[name].unit_layers())
            return Known(homogeneous=found.homogeneous, attention=found.attention, units=units)
        return Known(layer, found.heads.get(layer.name), layer.name in found.linear)
