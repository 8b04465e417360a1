"""The stage `attack`: small changes of images that change what a network says, and the units that they move.

Writes, for an experiment on a network and a data set, into <network>/attacks/<experiment>/
    <attack>.zarr/<pair>        the attacked images, judged in 8 bits, and what the network says of them
    <attack>-units.zarr/<pair>  peaks of the units of the layer that `ablate` ranks, before and after, and controls
    attacks.csv, attack-checks.csv, attack-units.csv, attack-moved.csv, attack-predicted.csv
A pair is `<source>-<target>` by index, or `untargeted`. See docs/attacks.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError, nearest
from pipeline.networks.fitness import Explainable
from pipeline.networks.forward import Model, platform_numerics
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job, model_of
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.ablate.results import Ablated
from pipeline.stages.ablate.results import group_of as ablated_group
from pipeline.stages.attack import results, tables
from pipeline.stages.attack.chosen import Shard, of_pair, shards_of
from pipeline.stages.attack.results import Layout, Reached, UnitLayout
from pipeline.stages.attack.settings import SECTION, Attack, Attacks, Pair, Settings, attacks_of, pairs_of
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, below, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.workers.resumable import Parts
from pipeline.workers.tasks import run_tasks

if TYPE_CHECKING:
    from pipeline.stages.attack.tasks import Given, Seen

VERSION = 1
FOLDER = "attacks"
CODE = (
    "kernels/attacks",
    "kernels/audit/intervals.py",
    "kernels/images/grey.py",
    "kernels/images/whiten.py",
    "pipeline/networks/build.py",
    "pipeline/networks/checkpoint.py",
    "pipeline/networks/forward.py",
    "pipeline/networks/gradients.py",
    "pipeline/networks/graph/call_sites.py",
    "pipeline/networks/layers.py",
    "pipeline/networks/libraries",
    "pipeline/networks/pixels.py",
    "pipeline/networks/positions.py",
    "pipeline/networks/prepare.py",
    "pipeline/networks/returned.py",
    "pipeline/stages/attack/attacking.py",
    "pipeline/stages/attack/chosen.py",
    "pipeline/stages/attack/observing.py",
    "pipeline/stages/attack/results.py",
    "pipeline/stages/attack/settings.py",
    "pipeline/stages/attack/stage.py",
    "pipeline/stages/attack/tables.py",
    "pipeline/stages/attack/tasks.py",
)
REMEDY = "lower `numerics.micro_batch` of the network, or `shard_images` of the data set"
BACKWARD = 2.0
"""Forwards that a backward costs, about."""
DLR_CLASSES = {False: 3, True: 4}
"""Logits that `apgd_dlr` needs, untargeted and targeted."""
OF_METHOD = {
    "pgd": ("steps", "restarts", "seed"),
    "apgd_ce": ("steps", "restarts", "seed"),
    "apgd_dlr": ("steps", "restarts", "seed"),
    "cw_l2": ("steps", "searches"),
    "square": ("queries", "seed"),
}
"""Settings that matter to a method."""


def steps(draft: Draft) -> Iterator[Wanted]:
    for name, section in draft.config.section(SECTION.key).items():
        for dataset, network in draft.pairs():
            if not section.applies(network, dataset):
                continue
            ranked = any(step.key == Key(dataset, network) for step in draft.of_stage("ablate"))
            parents = [draft.step("ingest", dataset), draft.step("network", network=network)]
            if ranked:
                parents.append(draft.step("ablate", dataset, network))
                if (twin := network + UNTRAINED) in draft.networks:
                    parents.append(draft.step("network", network=twin))
            settings = settings_of(draft, name, section, dataset, network, ranked)
            yield Wanted(Key(dataset, network, name), settings, tuple(parents))


def settings_of(draft: Draft, name: str, section: Attacks, dataset: str, network: str, ranked: bool) -> Settings:
    """Return what the id is made of; refuse splits and classes that are not there."""
    where, summary, spec = f"attack.{name}", draft.summaries[dataset], draft.networks[network]
    split = section.split or draft.config.datasets[dataset].examined_split
    summary.require(dataset, split, f"{where}.split" if section.split else "")
    if not summary.classes:
        raise MicrotomeError(
            f"{where}: the images of data set {dataset!r} have no classes that an attack could change: give it "
            f"`labels`, or name others in `{where}.datasets`"
        )
    limits = [section.images, draft.config.controls.images if network.endswith(UNTRAINED) else None]
    return Settings(
        split=split,
        images=min((each for each in limits if each is not None), default=None),
        pairs=classes_of(draft, where, section, dataset),
        untargeted=section.untargeted,
        start=section.start,
        norms=section.norms.model_dump(),
        methods=section.methods,
        **{key: getattr(section, key) for key in ("steps", "restarts", "searches", "queries", "seed")},
        ranked=ranked,
        classes=summary.classes,
        preprocessing=spec.preprocessing,
        numerics=spec.numerics,
        **spec.reading.settings,
    )


def classes_of(draft: Draft, where: str, section: Attacks, dataset: str) -> list[tuple[int, int]]:
    """Return pairs of classes by index; refuse unknown and equal ones."""
    count = draft.summaries[dataset].classes
    if section.pairs == "all":
        return [(source, target) for source in range(count) for target in range(count) if source != target]
    names = draft.class_names(dataset)
    found: list[tuple[int, int]] = []
    for pair in section.pairs:
        own = []
        for each in pair:
            if isinstance(each, str) and each not in names:
                raise MicrotomeError(f"{where}.pairs: no class {each!r} in data set {dataset!r}{nearest(each, names)}")
            own.append(each if isinstance(each, int) else names.index(each))
        source, target = own
        if source == target:
            raise MicrotomeError(f"{where}.pairs: both classes are {pair[0]!r}: name two")
        if section.start == "label" and source >= count:
            raise MicrotomeError(
                f"{where}.pairs: no image has class {source}: data set {dataset!r} has {count} classes"
            )
        if (source, target) in found:
            raise MicrotomeError(f"{where}.pairs: {list(pair)} is named twice, by name or by index")
        found.append((source, target))
    return found


# The work -------------------------------------------------------------------------------------------------------------


def run(job: Job[Settings]) -> None:
    from pipeline.stages.attack import tasks

    job.begin()
    settings, shards = job.settings, shards_of(job)
    attacks = {attack.name: attack for attack in attacks_of(settings)}
    with job.workers() as workers:
        layer = layer_of(job)
        seen: Seen = next(
            run_tasks(workers, tasks.look, [(job.model, job.images.size, layer)], 1, f"{job.name}: network")
        )
        if said := list(objections(job, seen.classes)):
            raise MicrotomeError("\n  ".join(said))
        job.check_memory(memory_need(job, seen.parameters, seen.values), REMEDY)
        parts = attacked_parts(job, shards, attacks)
        made = attack_all(job, workers, seen, shards, attacks, parts)
        found = {name: tables.read(job, name, parts[name], shards) for name in attacks}
        notes = list(notes_of(job, shards, found))
        units: dict[str, Parts] = {}
        if layer is not None:
            order = order_of(job, layer, seen.classes)
            units = unit_parts(job, seen, shards, attacks, parts, order)
            made |= observe_all(job, workers, seen, shards, parts, units, order)
    files: Files = {}
    for stores in (parts, units):
        for name, own in stores.items():
            files |= finish_store(job, name, own)
    written = tables.of_attacks(job, attacks, found)
    if layer is not None:
        looked = {name: each.files() for name, each in units.items()}
        written |= tables.of_units(job, attacks, found, looked, order, twin_of(job) is not None)
    output = digest([files, {name: text.decode() for name, text in written.items()}])
    for name, text in written.items():
        files |= write_file(job.folder, name, text)
    facts = results.Attacked(
        reached=[reached for name in attacks for reached in reached_of(job, name, shards, found[name])],
        layer=layer,
        twin=twin_of(job) is not None,
        notes=notes,
    )
    job.finish(output, files, facts, made=(len(made), len(shards)))


def layer_of(job: Job[Settings]) -> str | None:
    """Return the last layer whose units the ablation ranks; None without one."""
    if not job.settings.ranked:
        return None
    return Ablated.of(job.parent("ablate")).layers[-1].layer


def twin_of(job: Job[Settings]) -> Model | None:
    """Return the untrained control, where units are ranked and there is one."""
    made = (each for each in job.parents if each.stage.name == "network" and each.network != job.network)
    return next((model_of(each) for each in made), None)


def order_of(job: Job[Settings], layer: str, logits: int) -> np.ndarray:
    """Return the units of the layer by their importance to each class, (class, unit); -1 where there is no ranking."""
    from pipeline.storage.store import StoreRef

    parent = job.parent_job("ablate")
    store = StoreRef.of_manifest(parent.folder, f"ablation.zarr/{ablated_group(layer)}", job.parent("ablate").files)
    order = np.asarray(store.open()["order"][:])
    missing = max(0, logits - len(order))
    return np.concatenate([order, np.full((missing, order.shape[1]), -1, order.dtype)])


def attacked_parts(job: Job[Settings], shards: Mapping[str, Shard], attacks: Mapping[str, Attack]) -> dict[str, Parts]:
    """Return the shards of each attack, with their ids."""
    images, model, identity, settings = job.images, job.model, job.identity, job.settings
    network = [model.sha256, model.architecture, identity["preprocessing"], identity["numerics"], list(images.size)]
    found = {}
    for name, attack in attacks.items():
        effort = {key: getattr(settings, key) for key in OF_METHOD[attack.method]}
        made_of = [
            [VERSION, platform_numerics(VERSION), np.__version__.split(".")[:2]],
            network,
            [attack.method, attack.norm, attack.epsilon, effort, settings.start],
        ]
        ids = {}
        for key, shard in shards.items():
            labels = shard.labels if shard.pair.source is None else ()
            own = [shard.pair.source, shard.pair.target, shard.places, shard.image_ids, labels]
            ids[key] = digest([made_of, images.contents[shard.number], own])
        found[name] = Parts(job.folder / f"{name}.zarr", ids)
    return found


def unit_parts(
    job: Job[Settings],
    seen: Seen,
    shards: Mapping[str, Shard],
    attacks: Mapping[str, Attack],
    parts: Mapping[str, Parts],
    order: np.ndarray,
) -> dict[str, Parts]:
    """Return the shards of the stores of units, with their ids: those of the attacked images, and the ranking."""
    from dataclasses import asdict

    assert seen.layer is not None
    twin, settings = twin_of(job), job.settings
    ranked = order[:, : results.IMPORTANT].tolist()
    made_of = [asdict(seen.layer), settings.seed, [twin.sha256, twin.architecture] if twin is not None else None]
    found = {}
    for name in attacks:
        entries = parts[name].entries()
        ids = {}
        for key, shard in shards.items():
            pair = shard.pair
            own = ranked if pair.source is None or pair.target is None else [ranked[pair.source], ranked[pair.target]]
            ids[key] = digest([made_of, own, parts[name].ids[key], entries[key]["files"]])
        found[name] = Parts(job.folder / f"{name}{results.UNITS}.zarr", ids)
    return found


def attack_all(
    job: Job[Settings],
    workers: Any,
    seen: Seen,
    shards: Mapping[str, Shard],
    attacks: Mapping[str, Attack],
    parts: Mapping[str, Parts],
) -> set[str]:
    """Attack what is missing; return the shards that were attacked now."""
    from pipeline.stages.attack.attacking import Effort
    from pipeline.stages.attack.tasks import Work, attack

    settings = job.settings
    layouts = {name: layout_of(job, each) for name, each in attacks.items()}
    for name, each in attacks.items():
        create_store(job, parts[name].store, layouts[name].arrays(), attributes(job, each))
    sweep(job, attacks)
    effort = Effort(settings.steps, settings.restarts, settings.searches, settings.queries, settings.seed)
    stores = {name: own.store for name, own in parts.items()}
    work = Work(job.model, seen.normalised, attacks, stores, layouts, effort, settings.start)

    def arguments(several: list[str], names: list[str]) -> tuple:
        return work, [given_of(job, shards[part], {}) for part in several], names

    sizes = {key: len(shard.places) for key, shard in shards.items()}
    batch = job.network_spec.numerics.micro_batch
    return job.resumed_in_groups(workers, attack, parts, arguments, sizes, batch, REMEDY)


def observe_all(
    job: Job[Settings],
    workers: Any,
    seen: Seen,
    shards: Mapping[str, Shard],
    parts: Mapping[str, Parts],
    units: Mapping[str, Parts],
    order: np.ndarray,
) -> set[str]:
    """Look at the units of what is missing; return the shards that were looked at now."""
    from pipeline.stages.attack.tasks import Looking, observe
    from pipeline.storage.store import StoreRef

    assert seen.layer is not None
    images, info, twin = job.images, seen.layer, twin_of(job)
    ranked = 2 * min(results.IMPORTANT, order.shape[1])
    layout = UnitLayout(
        images.count, images.shard_images, info.shape[0], (info.shape[1], info.shape[2]), ranked, twin is not None
    )
    for own in units.values():
        create_store(job, own.store, layout.arrays(), {"layer": info.name})
    stores = {name: own.store for name, own in units.items()}
    looking = Looking(job.model, twin, info, order[:, : results.IMPORTANT], stores, layout, job.settings.seed)
    files = {name: own.files() for name, own in parts.items()}

    def arguments(several: list[str], names: list[str]) -> tuple:
        def attacked(key: str) -> dict[str, StoreRef]:
            shard = shards[key]
            group = shard.pair.name
            found = {}
            for name in names:
                store = StoreRef(parts[name].store / group, below(group, files[name]))
                found[name] = store.of(["image", "state", "predicted", "predicted_before"], [shard.number])
            return found

        return looking, [given_of(job, shards[part], attacked(part)) for part in several], names

    sizes = {key: len(shard.places) for key, shard in shards.items()}
    return job.resumed_in_groups(
        workers, observe, units, arguments, sizes, job.network_spec.numerics.micro_batch, REMEDY
    )


def given_of(job: Job[Settings], shard: Shard, attacked: Mapping[str, Any]) -> Given:
    from pipeline.stages.attack.tasks import Given
    from pipeline.storage.store import StoreRef

    images = job.images
    return Given(StoreRef(images.store, images.files_of(shard.number)), shard, attacked)


def layout_of(job: Job[Settings], attack: Attack) -> Layout:
    images = job.images
    starts = job.settings.restarts if "restarts" in OF_METHOD[attack.method] else 1
    return Layout(images.count, images.shard_images, (3, *images.size), starts)


def create_store(job: Job[Settings], store: Any, arrays: Mapping[str, Any], attrs: Mapping[str, Any]) -> None:
    """Create a store with a group for each pair; remove what an earlier configuration left."""
    from pipeline.storage.store import create, remove_other_arrays, remove_partials

    pairs = pairs_of(job.settings)
    common = {"dataset": job.dataset, "network": job.network, "experiment": job.experiment}
    groups = {pair.name: pair.name for pair in pairs}
    whole = {**common, **attrs, "layers": list(groups), "groups": groups}
    remove_other_arrays(store, groups)
    create(store, {}, whole)
    for pair in pairs:
        own = {"source": pair.source, "target": pair.target, "split": job.settings.split}
        remove_other_arrays(store / pair.name, arrays)
        create(store / pair.name, arrays, {**common, **attrs, **own})
        remove_partials(store / pair.name)
    create(store, {}, whole)


def sweep(job: Job[Settings], attacks: Mapping[str, Attack]) -> None:
    """Remove the stores of attacks that are asked for no more."""
    from pipeline.storage.store import remove

    wanted = {*attacks, *(f"{name}{results.UNITS}" for name in attacks)}
    for store in job.folder.glob("*.zarr"):
        if store.stem not in wanted:
            remove(store)
            store.with_suffix(".ledger").unlink(missing_ok=True)


def attributes(job: Job[Settings], attack: Attack) -> dict[str, Any]:
    """Return the attributes of an attack's store."""
    settings = job.settings
    return {
        "method": attack.method,
        "norm": attack.norm,
        "epsilon": attack.epsilon,
        "settings": {key: getattr(settings, key) for key in OF_METHOD[attack.method]},
        "start": settings.start,
        "classes": job.images.classes,
        "image_size": list(job.images.size),
    }


def finish_store(job: Job[Settings], name: str, own: Parts) -> Files:
    """Return all files of a store, without what no shard wrote."""
    from pipeline.storage.store import metadata_files, remove_unlisted

    files: Files = {}
    for pair in pairs_of(job.settings):
        group = pair.name
        listed = below(group, own.files())
        remove_unlisted(own.store / group, listed)
        files |= within(f"{own.store.name}/{group}", listed | metadata_files(own.store / group))
    return files | within(own.store.name, {"zarr.json": metadata_files(own.store)["zarr.json"]})


def reached_of(job: Job[Settings], name: str, shards: Mapping[str, Shard], found: tables.Found) -> Iterator[Reached]:
    """Yield what an attack reached on each pair."""
    for pair in pairs_of(job.settings):
        state = found[pair]["state"]
        yield Reached(
            attack=name,
            group=pair.name,
            source=pair.source,
            target=pair.target,
            images=sum(len(shard.places) for shard in of_pair(shards, pair)),
            attacked=int((state >= results.FAILED).sum()),
            succeeded=int((state == results.SUCCEEDED).sum()),
        )


def notes_of(job: Job[Settings], shards: Mapping[str, Shard], found: Mapping[str, tables.Found]) -> Iterator[str]:
    """Yield pairs without an image that was right; refuse an experiment in which none was."""
    attacked = dict.fromkeys(pairs_of(job.settings), 0)
    for of_pairs in found.values():
        for pair, arrays in of_pairs.items():
            attacked[pair] = int((arrays["state"] >= results.FAILED).sum())
    if not any(attacked.values()):
        count = sum(len(shard.places) for shard in shards.values())
        raise MicrotomeError(
            f"{job.name}: of {count} images, network {job.network!r} recognises none, and only images that were right "
            f"are attacked: name other pairs, raise `images`, or set `start: predicted`"
        )
    names = job.images.classes
    for pair, count in attacked.items():
        if not count:
            named = titled(pair, names)
            yield f"pair {named}: the network recognises none of the source's images, so none is attacked"


def titled(pair: Pair, names: Sequence[str]) -> str:
    """Return a pair for readers."""
    return " → ".join(tables.class_name(each, names) for each in (pair.source, pair.target))


# What others ask ------------------------------------------------------------------------------------------------------


def requests(job: Job[Settings]) -> dict[str, Any]:
    """Have the inspection find whether the network has gradients, where no explanation asks already."""
    explained = job.beside("attribute") or job.beside("attribute", job.network + UNTRAINED)
    return {} if explained is not None else {"explain": {"layers": [], "units": []}}


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what the network does not have."""
    found = Explainable.read(inspected.found(job).explainable)
    if (why := found.why_not(["gradient"], None)) and set(job.settings.methods) != {"square"}:
        yield f"attack.{job.experiment}: network {job.network!r}: {why}; only `square` needs no gradient"
        return
    yield from objections(job, found.classes)


def objections(job: Job[Settings], logits: int) -> Iterator[str]:
    """Yield a sentence for all that a network of so many logits refuses."""
    where, settings = f"attack.{job.experiment}", job.settings
    gives = f"network {job.network!r} gives {logits} logits"
    if not logits:
        return
    if settings.start == "label" and logits != settings.classes:
        yield (
            f"{where}: {gives}, and the images of {job.dataset!r} have {settings.classes} classes: these are not its "
            f"classes; set `start: predicted`, and name classes by the index of their logit"
        )
    for each in sorted({each for pair in settings.pairs for each in pair}):
        if each >= logits:
            yield f"{where}.pairs: class {each} of network {job.network!r}, which gives {logits} logits"
    if logits < 2:
        yield f"{where}: {gives}, so there is no other class"
    if "apgd_dlr" in settings.methods:
        for targeted in (False, True):
            asked = bool(settings.pairs) if targeted else settings.untargeted
            if asked and logits < DLR_CLASSES[targeted]:
                kind = "targeted" if targeted else "untargeted"
                least = DLR_CLASSES[targeted]
                yield f"{where}.methods: the {kind} `apgd_dlr` needs {least} classes, and {gives}: use `apgd_ce`"


def passes_of(settings: Settings, attack: Attack) -> float:
    """Return what an attack of an image takes, in forwards."""
    if attack.method == "square":
        return float(settings.queries)
    if attack.method == "cw_l2":
        return settings.searches * settings.steps * (1 + BACKWARD) + 12
    return settings.restarts * ((settings.steps + 1) * (1 + BACKWARD) + 2)


def counted(job: Job[Settings]) -> int:
    """Return how many attacks of an image there are at most: of all pairs."""
    settings, there = job.settings, job.splits[job.settings.split]
    of_class = there if settings.start == "predicted" else -(-there // max(1, settings.classes))
    bound = settings.images if settings.images is not None else there
    return len(settings.pairs) * min(bound, of_class) + settings.untargeted * min(bound, there)


def cost(job: Job[Settings], done: bool) -> Cost:
    """Estimate bytes, time and memory: as if all images were right, and classes had equally many."""
    settings, size, found = job.settings, ingested(job), inspected.found(job)
    images, attacks = counted(job), attacks_of(settings)
    pixels = 3 * size[0] * size[1]
    passes = sum(passes_of(settings, attack) for attack in attacks) + 1
    stores = []
    for attack in attacks:
        raw = float(images * pixels)
        store = job.folder / f"{attack.name}.zarr"
        stores.append(Store(attack.name, raw, raw, raw if done else size_of(store)))
    if settings.ranked:
        passes += 3 + 3 * len(attacks)
    rate = inspected.speed(job).get("images_per_second")
    return Cost(
        stores=tuple(stores),
        images=images,
        tasks=max(1, -(-images // job.dataset_spec.shard_images)),
        seconds=images * passes / rate if rate else None,
        memory=memory_need(job, found.parameters, 0),
        rate=f"{rate / passes:.3g}" if rate else "",
    )


def memory_need(job: Job[Settings], parameters: int, values: int) -> int:
    """Estimate the bytes of a task: weights, a forward that keeps what its backward needs, and copies of the images."""
    size, spec = ingested(job), job.network_spec
    pixels = 3 * size[0] * size[1]
    batch = 4 * spec.numerics.micro_batch * (24 * pixels + 2 * values)
    shards = 8 * pixels * (job.dataset_spec.shard_images + spec.numerics.micro_batch)
    return 2 * 3 * 4 * parameters + batch + shards


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that would be attacked now, and all of them."""
    shards, attacks = shards_of(job), {attack.name: attack for attack in attacks_of(job.settings)}
    parts = attacked_parts(job, shards, attacks)
    return len({part for own in parts.values() for part in own.missing()}), len(shards)


def made(job: Job) -> list[Any]:
    return [job.folder]


STAGE = Stage(
    name="attack",
    version=VERSION,
    says="Attack {wildcards.network} on {wildcards.dataset}: {wildcards.experiment}",
    place="experiment",
    folder=FOLDER,
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    requests=requests,
    check=check,
    cost=cost,
    pending=pending,
    counts="shards to attack",
    made=made,
    pages=(PageModule("pipeline.stages.attack.page", 78),),
)
