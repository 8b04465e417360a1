"""The stage `audit`: do explanations tell the truth.

Writes, for each audit of the configuration, into audit/<name>/
    cells/<dataset>/<network>/<test>/<method>.zarr            numbers of each image, (image, ...) float64
    cells/<dataset>/<network>/<test>/controls/<name>.zarr     the same of a control
    cells/functions/<method>.zarr                             residual, refused, reason (function, axiom)
    audit.zarr/<dataset>  value, low, high, control, forwards, images, state (network, method, measure) · by_image
                          (image_network, image_method, image_measure, image)
    audit.csv             a row for each data set, network, method, test and measure
    audit-concepts.csv    with the test `ablation`: relevance and losses of each class by concept
Stored maps are read; only those of changed networks or images are computed, by the functions of `attribute`. See
docs/audit.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.config.base import UNTRAINED
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import Model, platform_numerics
from pipeline.plan import inspected
from pipeline.plan.cost import Cost, Store
from pipeline.plan.counted import ingested
from pipeline.plan.job import Job, model_of
from pipeline.plan.stage import Draft, PageModule, Stage, Wanted
from pipeline.plan.step import Key
from pipeline.stages.attribute import segments
from pipeline.stages.attribute.again import EXPLAINS, examined, work_of
from pipeline.stages.attribute.again import labels_of as categories_of
from pipeline.stages.attribute.found import Attributions, read_attributions
from pipeline.stages.attribute.inputs import Shard, by_shard, chosen, shards_of
from pipeline.stages.attribute.options import METHODS, Options, Segmented, forwards_alone
from pipeline.stages.attribute.settings import Settings as Explained
from pipeline.stages.attribute.settings import methods_of
from pipeline.stages.audit import results
from pipeline.stages.audit.axioms import FUNCTIONS_ROW, Axioms
from pipeline.stages.audit.cell import Audited
from pipeline.stages.audit.declared import LEAST, Asked, Measure, TestOptions
from pipeline.stages.audit.options import TESTS
from pipeline.stages.audit.removed import concepts_of
from pipeline.stages.audit.results import Cell, Name, Outcome, Row
from pipeline.stages.audit.rows import laws_on_functions, outcomes
from pipeline.stages.audit.settings import SECTION, Settings, tests_of
from pipeline.stages.concepts.results import Labelled
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, within, write_file
from pipeline.storage.object_storage import size_of
from pipeline.workers.resumable import Parts, lacking

if TYPE_CHECKING:
    from pipeline.storage.store import StoreRef

VERSION = 1
FOLDER = "audit"
CODE = (
    *EXPLAINS,
    "kernels/ablation.py",
    "kernels/attribution/log_odds.py",
    "kernels/audit",
    "pipeline/data/boxes.py",
    "pipeline/data/scenes",
    "pipeline/stages/ablate/found.py",
    "pipeline/stages/audit/axioms.py",
    "pipeline/stages/audit/batch.py",
    "pipeline/stages/audit/cell.py",
    "pipeline/stages/audit/controls.py",
    "pipeline/stages/audit/counterfactual.py",
    "pipeline/stages/audit/declared.py",
    "pipeline/stages/audit/faithful.py",
    "pipeline/stages/audit/located.py",
    "pipeline/stages/audit/options.py",
    "pipeline/stages/audit/reduced.py",
    "pipeline/stages/audit/removed.py",
    "pipeline/stages/audit/results.py",
    "pipeline/stages/audit/rows.py",
    "pipeline/stages/audit/sanity.py",
    "pipeline/stages/audit/settings.py",
    "pipeline/stages/audit/stage.py",
    "pipeline/stages/audit/tasks.py",
    "pipeline/stages/audit/trials",
)
REMEDY = "lower `shard_images` of the data set or `numerics.micro_batch` of the network"
READ = 16  # shards of a cell that are read together
REASONS = "reasons"  # that stores of functions hold, too: those without are written again
OF_DATASET = ("concepts",)
"""Stages with one step a data set, among those that tests read."""


def steps(draft: Draft) -> Iterator[Wanted]:
    kept: dict[Any, Any] = {}
    for name, section in draft.config.section(SECTION.key).items():
        where, tests = f"audit.{name}", section.tests.options()
        explained = [
            step
            for step in draft.of_stage("attribute")
            if step.experiment == section.attributions and section.applies(step.network, step.dataset)
        ]
        if not explained:
            raise MicrotomeError(
                f"{where}: attribute.{section.attributions} explains none of its networks on none of its data sets: "
                f"name some of that experiment"
            )
        parents = []
        put: set[str] = set()
        reads: dict[str, dict[str, Any]] = {}
        for step in explained:
            dataset, network = str(step.dataset), str(step.network)
            of = Explained.read(step.settings)
            count = draft.summaries[dataset].splits[of.split]
            spec = draft.config.datasets[dataset]
            own = {test: options for test, options in tests.items() if options.applies(network)}
            for test, options in own.items():
                limit = min(count, of.images or count)
                beside = [str(each.network) for each in explained if each.dataset == dataset]
                asked = Asked(f"{where}.tests.{test}", dataset, spec, network, of, limit, beside, draft, kept)
                refuse(asked, options, test)
                if (read := TESTS[test].reads) is not None:
                    reads.setdefault(test, {})[dataset] = read(options, asked)
            parents += [draft.step("ingest", dataset), draft.step("network", network=network), step]
            twin = draft.originals.get(network, network) + UNTRAINED
            if twin in draft.networks and any(TESTS[test].forgets for test in own):
                parents.append(draft.step("network", network=twin))
            read_by = [stage for test, options in own.items() for stage in TESTS[test].stages(options)]
            read_by += ["concepts"] if own and categories_of(methods_of(of)) else []
            for stage in dict.fromkeys(read_by):
                parents.append(draft.step(stage, dataset, None if stage in OF_DATASET else network))
            put |= own.keys()
        for test in tests:
            if test not in put:
                raise MicrotomeError(
                    f"{where}.tests.{test}: none of the audit's networks is put to it: name others in `networks`"
                )
        settings = Settings(
            attributions=section.attributions,
            pairs=[(str(step.dataset), str(step.network)) for step in explained],
            tests={test: options.model_dump() for test, options in tests.items()},
            without=sorted(section.without),
            **({"reads": reads} if reads else {}),
        )
        once = {step.manifest: step for step in parents}
        yield Wanted(Key(experiment=name), settings, tuple(once.values()))


def refuse(asked: Asked, options: TestOptions, test: str) -> None:
    """Refuse a test that lacks images, stages, or what it says itself."""
    declared = TESTS[test]
    if asked.images < LEAST:
        raise MicrotomeError(
            f"{asked.where}: {asked.images} images of {asked.dataset!r} are explained, expected {LEAST} at least: "
            f"raise `images` of the experiment"
        )
    if options.images is not None and asked.images < options.images:
        raise MicrotomeError(
            f"{asked.where}.images: {options.images} images, and {asked.images} of {asked.dataset!r} are explained: "
            f"lower it, or raise `images` of the experiment"
        )
    for stage in declared.stages(options):
        own = None if stage in OF_DATASET else asked.network
        if not any((s.dataset, s.network) == (asked.dataset, own) for s in asked.draft.of_stage(stage)):
            raise MicrotomeError(
                f"{asked.where}: it reads what the stage `{stage}` makes of {own or asked.dataset!r}, and the "
                f"configuration has no such step"
            )
    for why in declared.check(options, asked):
        raise MicrotomeError(f"{asked.where}{why if why.startswith(('.', ':')) else ': ' + why}")


def check(job: Job[Settings]) -> Iterator[str]:
    """Yield what a test misses in the networks that it runs, once they are inspected."""
    for test, options in tests_of(job.settings).items():
        compares = TESTS[test].suits
        if compares is None:
            continue
        for explained in explanations(job):
            beside = {each.network: each for each in explanations(job) if each.dataset == explained.dataset}
            if options.applies(explained.network):
                for why in compares(options, explained, beside):
                    yield f"audit.{job.experiment}.tests.{test}{why}"


# The work -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """One network on one data set, as an audit sees it.

    Attributes
    ----------
    job : of `attribute`. methods : the options of each method by name. maps : their stores.
    shards : the explained images of each shard. chosen : by test and shard, which of them are audited.
    cells : by key. undefined : why a test is not defined for a method, by test and method.
    measures : the arrays of cells, by test. explained : the class that is explained of each slot, -1 where none is.
    units : the stores of the relevance of units, by method and layer.
    """

    job: Job[Explained]
    methods: Mapping[str, Options]
    maps: Mapping[str, StoreRef]
    shards: Mapping[str, Shard]
    chosen: Mapping[str, Mapping[str, tuple[int, ...]]]
    cells: Mapping[str, Cell]
    undefined: Mapping[tuple[str, str], str]
    measures: Mapping[str, Mapping[str, Measure]]
    explained: np.ndarray
    units: Mapping[str, Mapping[str, StoreRef]]

    @property
    def names(self) -> tuple[str, str]:
        return self.job.dataset, self.job.network

    def slots(self, test: str, parts: Iterable[str] | None = None) -> np.ndarray:
        """Return the slots of the images that a test audits, ascending: of all shards, or of these."""
        found = [
            self.shards[part].bounds[0] + self.shards[part].places[row]
            for part in (self.chosen[test] if parts is None else parts)
            for row in self.chosen[test][part]
        ]
        return np.array(found, np.int64)

    def stored(self, array: Any, test: str, parts: Iterable[str]) -> np.ndarray:
        """Return what an array of a cell's store (slot, ...) has of the images that a test audits, of these shards.

        A few shards that follow each other are read together.
        """
        runs: list[list[str]] = []
        for part in parts:
            last = runs[-1] if runs else []
            if last and len(last) < READ and self.shards[last[-1]].bounds[1] == self.shards[part].bounds[0]:
                last.append(part)
            else:
                runs.append([part])
        blocks = [np.empty((0, *array.shape[1:]))]
        for run in runs:
            start, stop = self.shards[run[0]].bounds[0], self.shards[run[-1]].bounds[1]
            blocks.append(np.asarray(array[start:stop])[self.slots(test, run) - start])
        return np.concatenate(blocks)


def run(job: Job[Settings]) -> None:
    job.begin()
    tests = tests_of(job.settings)
    pairs = [pair_of(job, explained, tests) for explained in explanations(job)]
    parts = {pair.names: parts_of(job, pair, tests) for pair in pairs}
    given = {pair.names: given_of(job, pair, tests) for pair in pairs}
    files: Files = {}
    rows: list[Row] = []
    concepts: list[results.Shares] = []
    single: dict[str, dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]] = {}
    made = 0
    with job.workers() as workers:
        for pair in pairs:
            made += len(measure(job, workers, pair, pairs, tests, parts[pair.names], given[pair.names]))
        if isinstance(laws := tests.get("axioms"), Axioms):
            own, table_of_functions = on_functions(job, workers, pairs, laws)
            files |= own
            rows += table_of_functions
    for pair in pairs:
        told: dict[str, list[Outcome]] = {}
        for key, cell, own in read(job, pair, parts[pair.names], given[pair.names]):
            files |= own
            told[key] = outcomes(cell, tests[cell.test])
            single.setdefault(pair.job.dataset, {}).update(numbers_of(pair, cell))
            if cell.test == "ablation":
                concepts += concepts_of(cell)
        rows += rows_of(pair, tests, told)
    files |= write_store(job, pairs, rows, single)
    tables = {"audit.csv": results.table(rows)}
    if "ablation" in tests:
        tables[results.CONCEPTS] = results.concept_table(concepts)
    output = digest([files, *[table.decode() for table in tables.values()]])
    for name, table in tables.items():
        files |= write_file(job.folder, name, table)
    facts = results.Audited(
        attributions=job.settings.attributions,
        pairs=[pair.names for pair in pairs],
        images={dataset: audited_images(pairs, dataset) for dataset in dict.fromkeys(p.job.dataset for p in pairs)},
        tests=list(tests),
        methods={name: options.kind for pair in pairs for name, options in pair.methods.items()},
        controls=sorted({cell.name.told for pair in pairs for cell in pair.cells.values() if cell.name.control}),
    )
    every = {part for own in parts.values() for each in own.values() for part in each.ids}
    job.finish(output, files, facts, made=(made, len(every) * len(pairs)))


def explanations(job: Job[Settings]) -> list[Job[Explained]]:
    """Return the jobs of `attribute` that an audit reads, in their order."""
    return [parent for parent in job.parents if parent.stage.name == "attribute"]


def pair_of(job: Job[Settings], explained: Job[Explained], tests: Mapping[str, TestOptions]) -> Pair:
    """Return a network on a data set, with its maps and the images of each test; refuse too few images."""
    found = read_attributions(
        job.results, explained.dataset, explained.network, job.settings.attributions, explained.id
    )
    methods, shards = methods_of(explained.settings), shards_of(explained)
    tests = {test: options for test, options in tests.items() if options.applies(explained.network)}
    cells, undefined = {}, {}
    for test, options in tests.items():
        names = []
        for name, own in methods.items():
            if why := TESTS[test].defined(options, METHODS[own.kind]):
                undefined[test, name] = why
            else:
                names.append(Name(name))
        names += [Name(each, True) for each in TESTS[test].controls if each not in job.settings.without]
        for each in names:
            store = each.store(job.folder, explained.dataset, explained.network, test)
            cells[f"{test}/{each.told}"] = Cell(test, each, store)
    return Pair(
        explained,
        methods,
        {each.facts.name: each.store for each in found.methods if each.name == each.facts.name},
        shards,
        {test: chosen_of(job, found, shards, options, test) for test, options in tests.items()},
        cells,
        undefined,
        {test: TESTS[test].arrays(options, explained) for test, options in tests.items()},
        found.target[:, 0],
        {each.facts.name: each.relevance for each in found.methods if each.relevance},
    )


def chosen_of(
    job: Job[Settings], found: Attributions, shards: Mapping[str, Shard], options: TestOptions, test: str
) -> dict[str, tuple[int, ...]]:
    """Return which of the explained images of each shard a test audits: the first by a hash of their ids."""
    slots = found.slots[: options.images]
    if len(slots) < (options.images or LEAST):
        raise MicrotomeError(
            f"{job.name}: {test}: {len(slots)} images of {found.dataset!r} are explained, expected "
            f"{options.images or LEAST}: lower `images` of the test, or raise it for the experiment"
        )
    taken = set(slots)
    rows = {
        part: tuple(at for at, place in enumerate(shard.places) if shard.bounds[0] + place in taken)
        for part, shard in shards.items()
    }
    return {part: own for part, own in rows.items() if own}


def given_of(job: Job[Settings], pair: Pair, tests: Mapping[str, TestOptions]) -> dict[str, Any]:
    """Return what tests have made for all images of a network on a data set, by test."""
    prepared = {test: TESTS[test].prepare for test in pair.measures}
    return {
        test: make(tests[test], pair.job, read_of(job, pair.job.dataset, test))
        for test, make in prepared.items()
        if make is not None
    }


def read_of(job: Job[Settings], dataset: str, test: str) -> Any:
    """Return what a test read, while the plan was made, of files that no stage ingests; None without any."""
    return job.settings.reads.get(test, {}).get(dataset)


def parts_of(job: Job[Settings], pair: Pair, tests: Mapping[str, TestOptions]) -> dict[str, Parts]:
    """Return the shards of each cell, with their ids."""
    return {key: Parts(cell.store, ids_of(job, pair, cell, tests[cell.test])) for key, cell in pair.cells.items()}


def ids_of(job: Job[Settings], pair: Pair, cell: Cell, options: TestOptions) -> dict[str, str]:
    """Return the id of each shard of a cell: what its numbers are made from."""
    explained, images, identity = pair.job, pair.job.images, pair.job.identity
    model, test, dataset = explained.model, cell.test, explained.dataset
    declared, method = TESTS[test], None if cell.name.control else identity["methods"][cell.name.name]
    made_of: list[Any] = [
        [VERSION, platform_numerics(VERSION), test, options.model_dump(exclude={"images"})],
        [cell.name.told, method, identity["targets"], identity["score"], identity["baseline"]],
        [model.sha256, model.architecture, identity["preprocessing"], identity["numerics"], list(images.size)],
        [images.classes, read_of(job, dataset, test), np.__version__.split(".")[:2]],
    ]
    if isinstance(identity["baseline"], dict):
        made_of.append(images.contents)  # of which the baseline may be the mean
    libraries = [declared.library(options)] if declared.library is not None else []
    if method is not None and isinstance(own := pair.methods[cell.name.name], Segmented):
        libraries.append(segments.library(own.segments))
    made_of += [each for each in libraries if each is not None]
    if declared.compares:
        others = [each for each in explanations(job) if each.dataset == dataset]
        made_of.append([[o.model.sha256, o.model.architecture, o.identity["preprocessing"]] for o in others])
    if declared.forgets and (twin := twin_of(job, explained)) is not None:
        made_of.append([twin.sha256, twin.architecture])
    if cell.name.control and (copied := declared.copies.get(cell.name.name)) is not None:
        there = explained.beside(copied)
        assert there is not None
        made_of.append(there.read().digest)
    if declared.draws:
        made_of.append(explained.parent_job("ingest").identity)
    parted = {} if cell.name.control else {cell.name.name: pair.methods[cell.name.name]}
    labelled = labels_of(job, explained, declared.stages(options), parted) or Labelled(
        shards=[], categories=[], refused=[], size=images.size
    )

    def of(part: str) -> list[Any]:
        shard, rows = pair.shards[part], pair.chosen[test][part]
        stored = pair.maps.get(cell.name.name) if not cell.name.control else next(iter(pair.maps.values()))
        assert stored is not None
        read = ["attribution", "target", "score", "residual"] if not cell.name.control else ["target"]
        places = [[shard.places[row], shard.labels[row], shard.image_ids[row]] for row in rows]
        contents = [category.contents[labelled.shards.index(int(part))] for category in labelled.categories]
        units = [store.of(["relevance"], [int(part)]).files for store in pair.units.get(cell.name.name, {}).values()]
        shape = [[name, list(measure.shape)] for name, measure in pair.measures[test].items()]
        return [images.contents[int(part)], places, stored.of(read, [int(part)]).files, contents, units, shape]

    return {part: digest([made_of, of(part)]) for part in pair.chosen[test]}


def twin_of(job: Job[Settings], explained: Job[Explained]) -> Model | None:
    """Return the untrained control of a network, where a test runs it and there is one."""
    name = explained.original + UNTRAINED
    made = (each for each in job.parents if each.stage.name == "network" and each.network == name)
    return next((model_of(each) for each in made), None)


def labels_of(
    job: Job[Settings], explained: Job[Explained], stages: Iterable[str], methods: Mapping[str, Options]
) -> Labelled | None:
    """Return what is known of the label maps of a data set, where tests with these stages, or methods, read them."""
    if "concepts" not in stages and not categories_of(methods):
        return None
    return Labelled.of(concepts_job(job, explained).read())


def concepts_job(job: Job[Settings], explained: Job[Explained]) -> Job[Any]:
    """Return the job that made the label maps of a data set."""
    return next(each for each in job.parents if each.stage.name == "concepts" and each.dataset == explained.dataset)


def measure(
    job: Job[Settings],
    workers: Any,
    pair: Pair,
    pairs: list[Pair],
    tests: Mapping[str, TestOptions],
    parts: Mapping[str, Parts],
    given: Mapping[str, Any],
) -> set[str]:
    """Measure what the cells of a network on a data set lack; return the shards that were measured."""
    from pipeline.stages.attribute.tasks import Given
    from pipeline.stages.audit.tasks import Auditing, Read, audit_shards
    from pipeline.storage.store import StoreRef, create, remove_other_arrays, remove_partials

    explained, images = pair.job, pair.job.images
    for key, cell in pair.cells.items():
        arrays = results.arrays(pair.measures[cell.test], images.count, images.shard_images)
        remove_other_arrays(cell.store, arrays)
        create(cell.store, arrays, attributes(pair, cell, tests[cell.test]))
        remove_partials(cell.store)
        assert key in parts
    if not lacking(parts):
        return set()
    parameters, found = examined(explained, workers, pair.methods)
    read_by = {stage for test in pair.measures for stage in TESTS[test].stages(tests[test])}
    labelled = labels_of(job, explained, read_by, pair.methods)
    same = [each for each in pairs if each.job.dataset == explained.dataset]
    auditing = Auditing(
        work_of(explained, workers, pair.methods, found),
        tests,
        pair.cells,
        explained.dataset_spec.model_dump(mode="json"),
        explained.settings.split,
        images.classes,
        {each.job.network: each.job.model for each in same},
        twin_of(job, explained),
        {each.name: each for each in labelled.categories} if labelled is not None else {},
        given,
        pair.measures,
    )
    concepts = None
    if labelled is not None:
        own = concepts_job(job, explained)
        concepts = StoreRef.of_manifest(own.folder, "concepts.zarr", own.read().files)
    job.check_memory(memory_need(parameters, found.values, explained, images.size), REMEDY)

    def read_of(part: str) -> Read:
        own = concepts.of(["label_map"], [int(part)]) if concepts is not None else None
        return Read(
            Given(StoreRef(images.store, images.files_of(int(part))), own, pair.shards[part]),
            {name: narrowed(store, pair, name, int(part)) for name, store in pair.maps.items()},
            {
                name: {layer: store.of(["relevance"], [int(part)]) for layer, store in layers.items()}
                for name, layers in pair.units.items()
            },
            {test: rows[part] for test, rows in pair.chosen.items() if part in rows},
        )

    def arguments(several: list[str], keys: list[str]) -> tuple:
        return auditing, [read_of(part) for part in several], keys

    counts = {part: max(len(rows.get(part, ())) for rows in pair.chosen.values()) for part in pair.shards}
    return job.resumed_in_groups(
        workers, audit_shards, parts, arguments, counts, explained.network_spec.numerics.micro_batch, REMEDY
    )


def on_functions(job: Job[Settings], workers: Any, pairs: list[Pair], options: Axioms) -> tuple[Files, list[Row]]:
    """Measure the laws of every method on small functions; return files and rows."""
    from pipeline.stages.audit.trials.functions import ALL, audit_functions
    from pipeline.storage.store import StoreRef

    methods = {name: own for pair in pairs for name, own in pair.methods.items()}
    stores = {name: job.folder / results.CELLS / FUNCTIONS_ROW / f"{name}.zarr" for name in methods}
    parts = {
        name: Parts(stores[name], {ALL: digest([VERSION, REASONS, platform_numerics(VERSION), own.model_dump()])})
        for name, own in methods.items()
    }

    def arguments(part: str, names: list[str]) -> tuple:
        return stores, methods, names

    job.resumed(workers, audit_functions, parts, arguments, REMEDY, "functions")
    files, rows = Files(), []
    for name, own in methods.items():
        listed = parts[name].files()
        files |= within(stores[name].relative_to(job.folder).as_posix(), listed)
        reader = StoreRef(stores[name], listed).open()
        found = {key: np.asarray(reader[key][:]) for key in ("residual", "refused", "reason", "function")}
        for one in laws_on_functions(found, own, options):
            rows.append(Row("", FUNCTIONS_ROW, name, own.kind, "axioms", one, np.nan, np.nan))
    return files, rows


def narrowed(store: StoreRef, pair: Pair, name: str, shard: int) -> StoreRef:
    """Return a method's store with the files of one shard that tests read."""
    facts = METHODS[pair.methods[name].kind].facts
    return store.of(["attribution", "target", "score", "residual", *facts], [shard])


def memory_need(parameters: int, values: int, explained: Job[Explained], size: tuple[int, int]) -> int:
    """Estimate the bytes of a task: two networks in float64, a pass with all it keeps, and maps of a shard."""
    methods, pixels = methods_of(explained.settings), 3 * size[0] * size[1]
    kept = max(options.kept for options in methods.values())
    graph = int(8 * explained.network_spec.numerics.micro_batch * (16 * pixels + kept * values))
    return 4 * 8 * parameters + graph + explained.dataset_spec.shard_images * pixels * (1 + 4 * len(methods))


def attributes(pair: Pair, cell: Cell, options: TestOptions) -> dict[str, Any]:
    """Return the attributes of a cell's store."""
    measures = pair.measures[cell.test]
    return {
        "test": cell.test,
        "settings": options.model_dump(mode="json"),
        "method": cell.name.told,
        "dataset": pair.job.dataset,
        "network": pair.job.network,
        "arrays": results.together(measures),
        "measures": {name: measure.title for name, measure in measures.items()},
        "labels": {dim: list(labels) for each in measures.values() for dim, labels in each.labels.items()},
    }


# What comes out -------------------------------------------------------------------------------------------------------


def read(
    job: Job[Settings], pair: Pair, parts: Mapping[str, Parts], given: Mapping[str, Any]
) -> Iterator[tuple[str, Audited, Files]]:
    """Yield the numbers of every cell, one after the other, with its key and the files of its store.

    The images of shards that are refused are left out.
    """
    from pipeline.storage.store import StoreRef, metadata_files, remove_unlisted

    images = pair.job.images
    labels, ids = np.asarray(images.reader()["label"][:]), images.image_ids()
    for key, cell in pair.cells.items():
        measures = pair.measures[cell.test]
        own, entries = parts[key].files(), parts[key].entries()
        remove_unlisted(cell.store, own)
        own |= metadata_files(cell.store)
        refused = {part: entry["refused"] for part, entry in entries.items() if "refused" in entry}
        reader, every = StoreRef(cell.store, own).open(), pair.slots(cell.test)
        kept = [part for part in pair.chosen[cell.test] if part not in refused]
        slots = pair.slots(cell.test, kept)
        yield (
            key,
            Audited(
                pair.job.dataset,
                pair.job.network,
                cell.test,
                cell.name,
                None if cell.name.control else pair.methods[cell.name.name],
                measures,
                results.parted(
                    measures, {name: pair.stored(reader[name], cell.test, kept) for name in results.together(measures)}
                ),
                labels[slots],
                pair.explained[slots],
                [str(each) for each in ids[slots]],
                images.classes,
                given.get(cell.test),
                next(iter(refused.values()), ""),
                len(every),
                {law: why for entry in reversed(entries.values()) for law, why in entry.get("reasons", {}).items()},
                slots,
            ),
            within(cell.store.relative_to(job.folder).as_posix(), own),
        )


def audited_images(pairs: list[Pair], dataset: str) -> int:
    """Return how many images of a data set are audited by any test on any network."""
    own = [pair for pair in pairs if pair.job.dataset == dataset]
    return len({slot for pair in own for test in pair.chosen for slot in pair.slots(test).tolist()})


def rows_of(pair: Pair, tests: Mapping[str, TestOptions], told: Mapping[str, list[Outcome]]) -> list[Row]:
    """Return the rows of a network on a data set, with the value of each test's control beside the others."""
    size, rows = pair.job.images.size, []
    for key, cell in pair.cells.items():
        declared, options = TESTS[cell.test], None if cell.name.control else pair.methods[cell.name.name]
        beside = told.get(f"{cell.test}/{Name(declared.control, True).told}", [])
        control = {each.measure: each.value for each in beside}
        alone = forwards_alone(options, size) if options is not None else 0.0
        forwards = declared.cost(tests[cell.test], alone, size)
        kind = options.kind if options is not None else ""
        for one in told[key]:
            named = *pair.names, cell.name.told, kind, cell.test
            rows.append(Row(*named, one, control.get(one.measure, np.nan), forwards))
    for (test, name), why in pair.undefined.items():
        named = *pair.names, name, pair.methods[name].kind, test
        rows.append(Row(*named, Outcome("", np.nan, state="not defined", note=why), np.nan, 0.0))
    return rows


def numbers_of(pair: Pair, cell: Audited) -> dict[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]:
    """Return the numbers that each image has once, by network, method and measure, with the images' slots before.

    An image of a shard that is refused has NaN.
    """
    slots, found = pair.slots(cell.test), {}
    for name, measure in cell.measures.items():
        if not measure.dims:
            values = np.full(len(slots), np.nan)
            values[np.isin(slots, cell.slots)] = cell.arrays[name]
            found[cell.network, cell.name.told, f"{cell.test}.{name}"] = slots, values
    return found


def write_store(
    job: Job[Settings],
    pairs: list[Pair],
    rows: list[Row],
    single: Mapping[str, Mapping[tuple[str, str, str], tuple[np.ndarray, np.ndarray]]],
) -> Files:
    """Write audit.zarr, a group for each data set; return its files."""
    from pipeline.storage.store import create, metadata_files, remove, write_whole

    store, files = job.folder / "audit.zarr", Files()
    attrs = {"attributions": job.settings.attributions, "tests": job.settings.tests}
    remove(store)
    create(store, {}, attrs)
    for dataset in dict.fromkeys(pair.job.dataset for pair in pairs):
        own = [row for row in rows if row.dataset == dataset and row.outcome.measure]
        pair = next(each for each in pairs if each.job.dataset == dataset)
        arrays = results.cube(own)
        if single[dataset]:
            arrays |= results.by_image(single[dataset], pair.job.images.image_ids())
        files |= within(f"{store.name}/{dataset}", write_whole(store / dataset, arrays, attrs | {"dataset": dataset}))
    create(store, {}, attrs)
    return files | within(store.name, {"zarr.json": metadata_files(store)["zarr.json"]})


# What others ask ------------------------------------------------------------------------------------------------------


def cost(job: Job[Settings], done: bool) -> Cost:
    """Estimate time, memory and bytes: the forwards of each method in each test, on each network."""
    tests, seconds, images, tasks, memory, stores = tests_of(job.settings), 0.0, 0, 0, 0, []
    known = True
    for explained in explanations(job):
        size, shard = ingested(explained), explained.dataset_spec.shard_images
        limit = min(explained.splits[explained.settings.split], explained.settings.images or 2**62)
        rate = inspected.speed(explained).get("images_per_second")
        methods = methods_of(explained.settings)
        inspection = inspected.found(explained)
        values = (inspection.explainable or {}).get("values", inspection.largest)
        memory = max(memory, memory_need(inspection.parameters, values, explained, size))
        images, tasks = images + limit, tasks + -(-limit // shard)
        for test, options in tests.items():
            if not options.applies(explained.network):
                continue
            count, declared = min(limit, options.images or limit), TESTS[test]
            own = [forwards_alone(each, size) for each in methods.values()]
            forwards = sum(declared.cost(options, each, size) for each in (*own, *[0.0] * len(declared.controls)))
            known = known and bool(rate)
            seconds += count * forwards / rate if rate else 0.0
            raw = 8.0 * limit * sum(int(np.prod(each.shape)) for each in declared.measures(options).values())
            raw *= len(methods) + len(declared.controls)
            there = size_of(job.folder / results.CELLS / explained.dataset / explained.network / test)
            stores.append(Store(f"{explained.network}, {test}", raw, 0.9 * raw, 0.9 * raw if done else there))
    return Cost(tuple(stores), images, tasks, seconds if known else None, memory)


def pending(job: Job[Settings]) -> tuple[int, int]:
    """Count the shards that would be audited, and all of them: those of every network on its data set."""
    tests, missing, every = tests_of(job.settings), 0, 0
    for explained in explanations(job):
        if not all(parent.manifest.exists() for parent in job.parents):
            count = len(by_shard(explained.images, chosen(explained.images, explained.settings)))
            missing, every = missing + count, every + count
            continue
        parts = parts_of(job, pair_of(job, explained, tests), tests)
        missing += len(lacking(parts))
        every += len({part for each in parts.values() for part in each.ids})
    return missing, every


def made(job: Job) -> list[Path]:
    return [job.folder]


def unreferenced(results: Path, used: set[Path]) -> Iterator[Path]:
    """Find the cells that no finished audit has any more."""
    for folder in sorted(results.glob(f"{FOLDER}/*/")):
        finished = [Manifest.read(path) for path in (folder / "done").glob("audit.*.json")]
        named = {name.partition(".zarr/")[0] for manifest in finished for name in manifest.files}
        for store in sorted((folder / "cells").rglob("*.zarr")) if finished else ():
            if store.relative_to(folder).as_posix().removesuffix(".zarr") not in named:
                yield store


STAGE = Stage(
    name="audit",
    version=VERSION,
    says="Audit {wildcards.experiment}",
    place="comparison",
    folder=FOLDER,
    steps=steps,
    run=run,
    settings=Settings,
    code=CODE,
    section=SECTION,
    check=check,
    cost=cost,
    pending=pending,
    counts="shards to audit",
    made=made,
    unreferenced=unreferenced,
    pages=(PageModule("pipeline.stages.audit.page", 77),),
)
