"""The streamed layers of an extraction: counted without being stored."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.networks.prepare import Prepared, forward_need
from pipeline.stages.extract import streaming as stream
from pipeline.stages.extract.layers import LayerStore
from pipeline.stages.extract.pictures import sample_of
from pipeline.stages.extract.streaming import Streamed
from pipeline.stages.extract.tasks import REMEDY, Block
from pipeline.storage import manifest
from pipeline.storage.manifest import Files
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.plan.job import Job
    from pipeline.stages.extract.settings import Settings
    from pipeline.storage.store import Ledger


class Counting:
    """The streamed layers of an extraction, and which blocks of shards are counted.

    Without a streamed layer there is nothing to count, and every shard is a block of its own.

    Attributes
    ----------
    layers : by layer id, with their brackets.
    blocks : shards by block.
    parts, shown : by shard: the rows that count, and those whose lowest values pictures need.
    """

    def __init__(self, job: Job[Settings], images: Images, shards: list[int]) -> None:
        self.job, self.images = job, images
        self.layers: dict[str, Streamed] = {}
        self.ledgers: dict[str, Ledger] = {}
        self.settings = job.settings.tails
        self.blocks = {shard: [shard] for shard in shards}
        counts = np.zeros(images.count, bool)
        if self.settings is not None:
            self.settings = self.settings.model_copy(update={"size": self.settings.size or images.size})
            self.blocks = stream.blocks(shards, len(images.contents))
            counts = images.counted(job.settings.split)
        self.parts = stream.parts(images, shards, counts)
        sampled = np.isin(np.arange(images.count), sample_of(counts))
        self.shown = {shard: part.rows for shard, part in stream.parts(images, shards, sampled).items()}

    def streamed(self, layer: LayerStore) -> Streamed:
        assert self.settings is not None
        return stream.streamed(layer.store.parent, layer.id, layer.info, layer.scale, self.settings)

    def known(self, layer: LayerStore) -> bool:
        """Return whether the layer's tails have a bracket on disk; if so, `layers` holds it."""
        from pipeline.storage.store import Ledger

        one = self.streamed(layer)
        self.ledgers[layer.id] = Ledger(one.store.with_suffix(".ledger"))
        self.layers[layer.id] = stream.with_bracket(one, self.ledgers[layer.id])
        return self.layers[layer.id].bracket is not None

    def _discard_outgrown(self, layer: LayerStore) -> None:
        """Remove the layer's tails that were counted at a scale that is too small."""
        from pipeline.storage.store import remove

        if layer.id in self.layers and self.layers[layer.id].store != self.streamed(layer).store:
            remove(self.layers[layer.id].store)
            self.ledgers[layer.id].clear()

    def open(self, workers: Any, prepared: Prepared, layers: Iterable[LayerStore]) -> dict[str, float]:
        """Find the brackets, from a sample where there is none yet, and open the stores.

        Returns the largest value of every layer that exceeds float16 in the sample: the caller raises its scale and
        calls this again.
        """
        model = self.job.model
        wanted = [one for one in layers if one.streamed]
        for one in wanted:
            self._discard_outgrown(one)
        unknown = [self.layers[one.id] for one in wanted if not self.known(one)]
        overflow: dict[str, float] = {}
        if unknown:
            some = [part for part in self.parts.values() if len(part.rows)][: stream.SAMPLE_SHARDS]
            need = forward_need(prepared, model.spec, self.images.size)
            units = sum(layer.info.shape[0] for layer in unknown)
            need += 4 * 512 * units * stream.SAMPLE_SHARDS * stream.SAMPLE_IMAGES
            self.job.check_memory(need, REMEDY, f"{model.name}: sample")
            task = model, self.images.store, some, unknown
            ((brackets, overflow),) = run_tasks(workers, stream.sample, [task], 1, f"extract {model.name}: sample")
            for id, bracket in brackets.items():
                self.layers[id] = replace(self.layers[id], bracket=bracket)
        for id, layer in self.layers.items():
            if layer.bracket is not None:
                stream.open_store(layer, max(self.blocks) + 1, self.ledgers[id])
        return overflow

    def id(self, layer: Streamed, block: int) -> str:
        return stream.block_id(layer, self.images, [self.parts[shard] for shard in self.blocks[block]], self.shown)

    def missing(self, block: int) -> list[Streamed]:
        """Return the layers whose tails of a block are not counted yet."""
        return [
            layer
            for id, layer in self.layers.items()
            if self.ledgers[id].get(str(block), self.id(layer, block), layer.store) is None
        ]

    def record(self, done: Block) -> None:
        for id, files in done.tails.items():
            self.ledgers[id].record(str(done.block), self.id(self.layers[id], done.block), files)

    def files(self, layer: Streamed) -> Files:
        """Return the files of a layer's tails, relative to the layer's folder."""
        from pipeline.storage.store import metadata_files

        files = self.ledgers[layer.id].files(["bracket", *map(str, self.blocks)])
        return manifest.within(layer.store.name, files | metadata_files(layer.store))
