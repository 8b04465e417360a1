"""The plan of a run: which stages are wanted, the id of each, and the manifest that proves each finished.

Made by the main process from the configuration alone (no torch, no store is opened), saved as one JSON file, and read
by every job: ids are computed once.
"""

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import core as config
from pipeline.config.core import UNTRAINED, Calibrate, Config, Network, Probes
from pipeline.data import kinds as datasets
from pipeline.data import minibatches
from pipeline.data.kinds import Summary
from pipeline.errors import MicrotomeError, about
from pipeline.networks import published
from pipeline.stages.ablate import stage as ablate
from pipeline.stages.calibrate import stage as calibrate
from pipeline.stages.concepts import stage as concepts
from pipeline.stages.dissect import stage as dissect
from pipeline.stages.extract import stage as extract
from pipeline.stages.grams import stage as grams
from pipeline.stages.ingest import stage as ingest
from pipeline.stages.network import stage as network
from pipeline.stages.probes import stage as probes
from pipeline.stages.randomize import stage as randomize
from pipeline.stages.report import stage as report
from pipeline.stages.sight import stage as sight
from pipeline.stages.similarity import stage as similarity
from pipeline.storage import object_storage as objects
from pipeline.storage.identity import FileDigests, digest
from pipeline.storage.manifest import Manifest
from pipeline.storage.redact import without_home

STAGES: dict[str, Any] = {
    "ingest": ingest,
    "concepts": concepts,
    "network": network,
    "extract": extract,
    "dissect": dissect,
    "ablate": ablate,
    "calibrate": calibrate,
    "probes": probes,
    "grams": grams,
    "similarity": similarity,
    "sight": sight,
    "randomize": randomize,
    "report": report,
}
COMPARISONS = {"similarity": "similarity", "randomize": "randomization"}  # folder of the results, by stage


@dataclass(frozen=True)
class Step:
    """One job of the workflow: a stage, for a data set, a network and a comparison where it has these.

    A comparison is one of networks (`similarity`) or of runs (`randomize`).

    `settings` is everything the id is made of, by name; `parents` are the manifests (relative to the results folder)
    whose outputs it reads.
    """

    stage: str
    id: str
    manifest: str
    dataset: str | None = None
    network: str | None = None
    parents: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    comparison: str | None = None

    @property
    def name(self) -> str:
        return " ".join(part for part in (self.stage, self.dataset, self.network, self.comparison) if part)


@dataclass(frozen=True)
class Plan:
    """The configuration and its steps, parents before children."""

    config: Config
    steps: dict[str, Step]  # by manifest path
    arguments: tuple[str, ...] = ()
    """What snakemake was given besides a target: the configuration files and what overrides them. In no id."""

    @property
    def results(self) -> Path:
        return Path(self.config.results)

    @property
    def networks(self) -> dict[str, Network]:
        """Every network, followed by its untrained control; one that is random already is its own."""
        found = {}
        untrained = {"weights": "random", "train": None, "prefix": None, "ablate": None}
        for name, spec in self.config.networks.items():
            found[name] = spec
            if spec.weights != "random":
                # A model of transformers needs its folder for the architecture, too.
                local = spec.local if spec.transformers is not None else None
                found[name + UNTRAINED] = spec.model_copy(update=untrained | {"local": local})
        return found | self.copies

    @property
    def copies(self) -> dict[str, Network]:
        """Networks trained on parts of the images, for a `data_fraction`: nothing but their layers is compared."""
        found = {}
        for asked in self.config.similarity.data_fraction.values() if self.config.similarity else ():
            spec = self.config.networks[asked.network]
            assert spec.train is not None
            for name, fraction in asked.copies.items():
                train = spec.train.model_copy(update={"fraction": fraction * spec.train.fraction})
                found[name] = spec.model_copy(update={"train": train, "ablate": None, "group": None, "datasets": []})
        return found

    @property
    def scratch(self) -> Path:
        """Folder for what may be lost at any time: caches, pool addresses, plans."""
        return self.results / ".microtome"

    def step(
        self, stage: str, dataset: str | None = None, network: str | None = None, comparison: str | None = None
    ) -> Step:
        """The one step of a stage with these names; a comparison has its data set by itself."""
        for step in self.steps.values():
            named = (None if comparison else step.dataset, step.network, step.comparison)
            if (step.stage, *named) == (stage, dataset, network, comparison):
                return step
        said = " ".join(filter(None, (dataset, network, comparison)))
        raise MicrotomeError(f"the configuration has no step {stage} {said}".rstrip())

    def of_stage(self, stage: str) -> Iterator[Step]:
        return (step for step in self.steps.values() if step.stage == stage)

    def wanted(
        self,
        stage: str,
        id: str,
        dataset: str | None = None,
        network: str | None = None,
        comparison: str | None = None,
    ) -> Step:
        """The step, if its id is this one: a job for any other id is refused."""
        step = self.step(stage, dataset, network, comparison)
        if step.id != id:
            raise MicrotomeError(f"{step.name}: the configuration makes {step.id}, not {id}; ask for it by its word")
        return step

    def manifest(self, step: Step) -> Manifest:
        return Manifest.read(self.results / step.manifest)

    def parent(self, step: Step, stage: str) -> tuple[Step, Manifest]:
        """The parent of a step that is of this stage, with its manifest."""
        for path in step.parents:
            if self.steps[path].stage == stage:
                return self.steps[path], self.manifest(self.steps[path])
        raise KeyError(f"{step.name} has no parent of stage {stage}")

    def command(self, target: str) -> str:
        """What a person types to make a target of this configuration."""
        # A shell knows `~` where it is not quoted.
        given = (without_home(argument) for argument in self.arguments)
        quoted = ("~/" + shlex.quote(each[2:]) if each.startswith("~/") else shlex.quote(each) for each in given)
        return " ".join(["snakemake", shlex.quote(target), *quoted])

    def save(self) -> Path:
        from pipeline.storage.manifest import write_atomically

        steps = [asdict(step) for step in self.steps.values()]
        body = json.dumps({"config": self.config.model_dump(), "steps": steps, "arguments": self.arguments})
        path = self.scratch / "plans" / f"{self.config.name}.{digest(body)}.json"
        if not path.exists():
            write_atomically(path, body)
            path.chmod(0o600)  # it holds paths as they were configured, of keys too
        return path

    @staticmethod
    def read(path: Path) -> "Plan":
        value = json.loads(path.read_text())
        steps = [Step(**{**step, "parents": tuple(step["parents"])}) for step in value["steps"]]
        return Plan(config.parse(value["config"]), {step.manifest: step for step in steps}, tuple(value["arguments"]))


def make(wanted: Config, rescan: bool = False, arguments: Sequence[str] = ()) -> Plan:
    """Compute every step of a configuration. Reads listings, checkpoints and module files (through memories)."""
    scratch = Plan(wanted, {}).scratch
    digests = FileDigests(scratch / "files.json")
    objects.settle(Path(wanted.results), wanted.stores)
    wanted = published.resolve(wanted, scratch, digests)
    plan = Plan(wanted, {}, tuple(arguments))

    def add(
        stage: str,
        settings: dict,
        parents: list[Step],
        dataset: str = "",
        network: str = "",
        comparison: str = "",
        read: list[str] | None = None,
    ) -> Step:
        """`read`: ids of what is read of the parents, where it is a part of them."""
        read = [parent.id for parent in parents] if read is None else read
        settings = settings | {"version": STAGES[stage].VERSION, "parents": read}
        settings = json.loads(json.dumps(settings))  # as a manifest will hold it
        id = digest(settings)
        folder = "/".join(filter(None, ("networks" if network and not dataset else dataset, network)))
        folder = f"{COMPARISONS[stage]}/{comparison}" if comparison else folder or f"report/{wanted.name}"
        step = Step(
            stage=stage,
            id=id,
            manifest=f"{folder}/done/{stage}.{id}.json",
            dataset=dataset or None,
            network=network or None,
            parents=tuple(parent.manifest for parent in parents),
            settings=settings,
            comparison=comparison or None,
        )
        plan.steps[step.manifest] = step
        return step

    ingests: dict[str, Step] = {}
    labelled: dict[str, Step] = {}
    found = {}
    for name, dataset in wanted.datasets.items():
        with about(f"data set {name!r}"):
            found[name] = datasets.summary(dataset, plan.scratch, ingest.VERSION, rescan)
        ingests[name] = add("ingest", found[name].settings, [], name)
    used = {d for n in wanted.networks.values() for d in datasets_of(wanted, n)}
    for name in sorted(used):
        found[name].require(name, wanted.datasets[name].dissect.split)
        with about(f"data set {name!r}"):
            labels = concepts.settings(wanted.datasets[name], wanted.segmenters, digests)
        labelled[name] = add("concepts", labels, [ingests[name]], name)

    dissected: list[Step] = []
    ablated: list[Step] = []
    calibrated: list[Step] = []
    looked_into: list[Step] = []
    probed: list[Step] = []
    check_classes("calibrate", wanted.calibrate, found)
    check_classes("probes", wanted.probes, found)
    randomized = {}
    for name, experiment in wanted.randomize.items():
        settings = randomize.settings(name, experiment, found[experiment.dataset], digests)
        parents = [ingests[experiment.dataset]]
        randomized[name] = add("randomize", settings, parents, experiment.dataset, comparison=name)
    loaded = {}
    for name, spec in plan.networks.items():
        if not datasets_of(wanted, spec) and name not in plan.copies:  # `only` left it none
            continue
        if spec.train:
            found[spec.train.dataset].require(spec.train.dataset, spec.train.split)
            network.check_fraction(name, spec.train, found[spec.train.dataset])
        parents = [ingests[spec.train.dataset]] if spec.train else []
        with about(f"network {name!r}"):
            settings = network.settings(spec, digests)
        read = None
        if spec.run is not None:
            parents = [randomized[spec.run[0]]]
            read = [digest(randomize.run_settings(parents[0], spec.run[1]))]
        loaded[name] = add("network", settings, parents, network=name, read=read)
    for name, spec in plan.networks.items():
        untrained = name.endswith(UNTRAINED)
        for data in datasets_of(wanted, spec):
            dataset = wanted.datasets[data]
            limit = wanted.controls.images if untrained else None
            extracted = add(
                "extract", extract.settings(spec, dataset, limit), [ingests[data], loaded[name]], data, name
            )
            settings = dissect.settings(dataset, permuted=not untrained, control_images=wanted.controls.images)
            parents = [ingests[data], labelled[data], extracted]
            if spec.streams:  # what is not stored is computed again
                parents.append(loaded[name])
            dissected.append(add("dissect", settings, parents, data, name))
            if ablate.wanted(spec, data):
                settings = ablate.settings(name, spec, data, dataset, found[data])
                parents = [ingests[data], loaded[name], extracted, dissected[-1]]
                ablated.append(add("ablate", settings, parents, data, name))
            if wanted.calibrate is not None and calibrate.wanted(wanted.calibrate, name, data, found[data]):
                settings = calibrate.settings(wanted.calibrate, data, dataset.dissect.split, found[data])
                parents = [ingests[data], loaded[name], extracted]
                calibrated.append(add("calibrate", settings, parents, data, name))
            if wanted.sight is not None and sight.wanted(wanted.sight, name, data):
                settings = sight.settings(name, spec, dataset, wanted.sight)
                found[data].require(data, settings["split"])
                count = found[data].splits[settings["split"]]
                minibatches.require(count, sight.ONCE, f"sight, split {settings['split']!r} of {data!r}")
                looked_into.append(add("sight", settings, [ingests[data], loaded[name]], data, name))
            if wanted.probes is not None and probes.wanted(wanted.probes, name, data, found[data]):
                settings = probes.settings(wanted.probes, data, dataset.dissect.split, found[data])
                probed.append(add("probes", settings, [ingests[data], loaded[name], extracted], data, name))
    compared = []
    for name in wanted.similarity.comparisons if wanted.similarity else ():
        assert wanted.similarity is not None
        data, asked = wanted.dataset_of(name), wanted.similarity
        parents = []
        for each in asked.comparisons[name].networks:
            settings = grams.settings(each, plan.networks[each], wanted.datasets[data], asked)
            found[data].require(data, settings["split"])
            count = min(found[data].splits[settings["split"]], settings["images"])
            minibatches.require(count, settings, f"similarity.{name}, split {settings['split']!r} of {data!r}")
            parents.append(add("grams", settings, [ingests[data], loaded[each]], data, each))
        compared.append(add("similarity", similarity.settings(name, asked), parents, data, comparison=name))
    add(
        "report",
        report.settings(wanted),
        [*loaded.values(), *dissected, *ablated, *calibrated, *probed, *compared, *looked_into, *randomized.values()],
    )

    digests.save()
    return plan


def check_classes(section: str, asked: Calibrate | Probes | None, found: Mapping[str, Summary]) -> None:
    """Refuse data sets whose images have no classes, where a section that needs them asks for them."""
    if asked is None:
        return
    without = [name for name, summary in found.items() if not summary.classes]
    named = [name for name in asked.datasets or () if name in without]
    if named or (asked.datasets is None and len(without) == len(found)):
        raise MicrotomeError(
            f"{section}: the images of data set {(named or without)[0]!r} have no classes that a network could tell or "
            f"be wrong about: give it `labels`, or name others in `{section}.datasets`"
        )


def datasets_of(wanted: Config, spec: Network) -> list[str]:
    return spec.datasets if spec.datasets is not None else list(wanted.datasets)


def settle(plan: Plan, dry: bool = False) -> list[str]:
    """Set aside every wanted manifest that was made from other parents than those that stand there now.

    No store is touched: the shard ledgers decide what is done again. Returns one line a manifest; with `dry` nothing is
    moved.
    """
    found = outdated(plan)
    for path in found if not dry else ():
        aside = plan.scratch / "aside" / path
        aside.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(plan.results / path, aside)
    return [f"{plan.steps[path].name}: {reason}" for path, reason in found.items()]


def outdated(plan: Plan) -> dict[str, str]:
    """The wanted manifests that are there and no longer stand for what a run would make now, and why.

    A parent that is missing, damaged, outdated, or has another output digest than the one recorded (a network trained
    again, say) takes its children with it.
    """
    gone: set[str] = set()
    digests: dict[str, str] = {}
    found: dict[str, str] = {}
    for step in plan.steps.values():
        path = plan.results / step.manifest
        try:
            manifest = Manifest.read(path)
            reason = _outdated(plan.results, step, manifest, digests, gone)
        except FileNotFoundError:
            gone.add(step.manifest)
            continue
        except MicrotomeError as error:
            reason = str(error)
        if reason is None:
            digests[step.manifest] = manifest.digest
            continue
        gone.add(step.manifest)
        found[step.manifest] = reason
    return found


def _outdated(results: Path, step: Step, manifest: Manifest, digests: Mapping[str, str], gone: set[str]) -> str | None:
    """Why a manifest no longer stands for what a run would make now; None where it does."""
    for parent in step.parents:
        if parent in gone:
            return f"{parent} is not there"
        if manifest.parents.get(parent) != digests[parent]:
            return f"{parent} has another output than the one that was read"
    for path, output in manifest.includes.items():
        try:
            if Manifest.read(results / path).digest != output:
                return f"{path} has another output than the one that was written"
        except FileNotFoundError:
            return f"{path} is not there"
    return None
