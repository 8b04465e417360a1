"""The stage `sight`: how a network looks at images. How far its layers and its attention reach, what its skip
connections pass on, and whether its last layer still knows where things are.

Writes, for a network and data set,
    <network>/sight-minibatches.zarr  what was measured of each minibatch
    <network>/sight.zarr              receptive_field (layer, y, x) · attention_distance (attention, head) ·
                                      skip_ratio, accuracy_loss (skip) · cka_without_skip (skip, layer) ·
                                      localisation (output, input); all with standard errors
    <network>/sight-receptive-fields.csv, sight-attention.csv, sight-skips.csv, sight-localisation.csv
Questions of Raghu et al., "Do vision transformers see like convolutional neural networks?" (NeurIPS 2021). See
docs/sight.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.core import UNTRAINED, AnyDataset, Network, Sight
from pipeline.data.minibatches import Minibatch, minibatches
from pipeline.networks.forward import NonFiniteError, model_of, platform_numerics
from pipeline.plan import job as stage
from pipeline.stages.grams import stage as grams
from pipeline.storage.identity import digest
from pipeline.storage.manifest import write_file
from pipeline.workers.pool import check_memory, client, run_tasks

if TYPE_CHECKING:
    from pipeline.data.images import Images
    from pipeline.plan.step import Plan, Step

VERSION = 1
CODE = (
    *grams.CODE,
    "kernels/locality/attention.py",
    "kernels/locality/localisation.py",
    "kernels/locality/receptive_field.py",
    "kernels/locality/skips.py",
    "pipeline/networks/graph/operations.py",
    "pipeline/stages/sight/stage.py",
    "pipeline/stages/sight/results.py",
    "pipeline/stages/sight/tasks.py",
)
REMEDY = "lower `sight.minibatch` or `sight.gradients`"
# Each epoch of one: every image once, a smaller last minibatch with the others.
ONCE = {"epochs": 1, "replacement": False, "last": "weigh"}


def wanted(asked: Sight, network: str, dataset: str) -> bool:
    """Whether a network is looked into on a data set; an untrained control is where it is named."""
    named = not network.endswith(UNTRAINED) if asked.networks is None else network in asked.networks
    return named and (asked.datasets is None or dataset in asked.datasets)


def settings(name: str, spec: Network, dataset: AnyDataset, asked: Sight) -> dict[str, Any]:
    layers = asked.layers.get(name) or asked.layers.get(name.removesuffix(UNTRAINED)) or spec.layers
    return {
        "layers": layers,
        "measures": sorted(set(asked.measures)),
        "images": asked.images,
        "minibatch": asked.minibatch,
        "gradients": asked.gradients,
        "seed": asked.seed,
        "split": asked.split or dataset.dissect.split,
        "special_tokens": spec.special_tokens,
        "preprocessing": spec.preprocessing.model_dump(),
        "numerics": spec.numerics.model_dump(exclude={"micro_batch"}),
    }


def run(plan: Plan, step: Step) -> None:
    from pipeline.data.images import Images
    from pipeline.stages.sight import results as sight_results
    from pipeline.stages.sight import tasks as sight_tasks
    from pipeline.storage.store import Ledger, create, metadata_files, remove_partials, write_whole

    assert step.dataset is not None and step.network is not None
    began = stage.begin(plan, step)
    images, model, how = Images.of(plan, step), model_of(plan, step), step.settings
    batches = batches_of(images, step)
    folder = plan.results / step.dataset / step.network
    store = folder / "sight-minibatches.zarr"
    ledger = Ledger(store.with_suffix(".ledger"))
    with client(plan.config.cluster, plan.scratch) as workers:
        asked = (model, images.size, how["layers"], how["special_tokens"])
        (prepared,) = run_tasks(workers, sight_tasks.prepare, [asked], 1, f"{step.name}: layers")
        places = max(len(batch.images) for batch in batches)
        need = sight_tasks.memory_need(prepared, places, how["gradients"], images.size)
        check_memory(plan.config.cluster, need, step.name, REMEDY)
        pixels = grams.pixel_digests(workers, images, batches, step.name)
        work = sight_tasks.Work(
            model, images.store, images.size, prepared, tuple(how["measures"]), how["gradients"], store, places
        )
        create(store, sight_tasks.arrays(work, len(batches)), {})
        remove_partials(store)
        numerics = model.spec.numerics.model_dump(exclude={"micro_batch"}) | platform_numerics(VERSION)
        kept = [
            how["measures"],
            how["gradients"],
            how["special_tokens"],
            [layer.name for layer in prepared.layers],
            places,
        ]
        network = [model.sha256, model.architecture, how["preprocessing"], numerics, list(images.size)]
        ids = [digest([network, kept, [pixels[slot] for slot in batch.images], batch.images]) for batch in batches]
        tasks = [
            (work, grams.files_of(images, batch), index, batch)
            for index, batch in enumerate(batches)
            if not ledger.get(str(index), ids[index], store)
        ]
        try:
            for index, files in run_tasks(workers, sight_tasks.look, tasks, len(tasks), step.name, REMEDY):
                ledger.record(str(index), ids[index], files)
        except NonFiniteError as error:
            raise error.told(step, images.image_ids()) from None
    own = ledger.files(map(str, range(len(batches)))) | metadata_files(store)
    found = sight_results.put_together(work, batches, images, own)
    files = stage.within(store.name, own)
    made = write_whole(
        folder / "sight.zarr", found.arrays, {"dataset": step.dataset, "network": step.network} | found.attrs
    )
    files |= stage.within("sight.zarr", made)
    for name, table in found.tables.items():
        files |= write_file(folder, name, table)
    for name in set(sight_results.TABLES) - set(found.tables):  # of an earlier run that measured more
        (folder / name).unlink(missing_ok=True)
    stage.finish(plan, step, began, digest(files), files, found.facts, made=(len(tasks), len(batches)))


def pending(plan: Plan, step: Step) -> tuple[int, int]:
    """How many minibatches a run would put through the network at most, of how many."""
    from pipeline.data.images import Images

    count = len(batches_of(Images.of(plan, step), step))
    return count, count


def discard(plan: Plan, step: Step) -> list[Path]:
    """The files and folders that this step made."""
    assert step.dataset is not None and step.network is not None
    folder = plan.results / step.dataset / step.network
    names = ("sight.zarr", "sight-minibatches.zarr", "sight-minibatches.ledger")
    return [*(folder / name for name in names), *folder.glob("sight-*.csv")]


def batches_of(images: Images, step: Step) -> list[Minibatch]:
    slots, image_id = grams.candidates(images, step.settings["split"])
    return minibatches(slots, image_id, ONCE | dict(step.settings), step.name)
