"""A job: one step of a plan, with all that its stage needs to run it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline.config.base import UNTRAINED
from pipeline.config.cluster import Cluster
from pipeline.config.core import Core
from pipeline.config.datasets import AnyDataset
from pipeline.config.networks import Network
from pipeline.data.images import Images
from pipeline.errors import MicrotomeError
from pipeline.networks.forward import Model, NonFiniteError
from pipeline.plan.step import Key, Plan, Step
from pipeline.storage.atomic import write_atomically
from pipeline.storage.identity import digest
from pipeline.storage.manifest import Files, Manifest, latest, remove_others
from pipeline.storage.provenance import provenance
from pipeline.storage.record import Record
from pipeline.workers import client, memory, resumable
from pipeline.workers.resumable import Done, Parts

if TYPE_CHECKING:
    import numpy as np

S = TypeVar("S", bound=Record)
UNFINISHED = "unfinished"  # subfolder of the scratch folder: what unfinished steps refer to


class Note(Record):
    """What an unfinished step fills: its name, and folders relative to the results folder."""

    step: str
    folders: list[str]


class Job(Generic[S]):
    """One step of a plan, as its stage sees it.

    A stage reads its settings, its parents' manifests, its images and its network from here. It calls `begin`, then
    `refers_to` for the folders that it fills, and `finish`, which writes the manifest. `stages` are those of the
    registry by name (`pipeline.plan.stage.Stage`). `S` is its stage's model of settings.
    """

    def __init__(self, plan: Plan, step: Step, stages: Mapping[str, Any]) -> None:
        self._plan, self._step, self.stages = plan, step, stages
        self._began = time.time()

    # What it is -------------------------------------------------------------------------------------------------------

    @property
    def step(self) -> Step:
        return self._step

    @property
    def stage(self) -> Any:
        """Its `pipeline.plan.stage.Stage`."""
        return self.stages[self._step.stage]

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self._step.name

    @property
    def id(self) -> str:
        return self._step.id

    @property
    def key(self) -> Key:
        """Its subject: those names among data set, network and experiment that it has."""
        return self._step.key

    @property
    def dataset(self) -> str:
        """The name of its data set."""
        return _there(self._step.dataset, self, "data set")

    @property
    def network(self) -> str:
        """The name of its network: one of the configuration, a control, or a copy."""
        return _there(self._step.network, self, "network")

    @property
    def experiment(self) -> str:
        """The name of its experiment or comparison."""
        return _there(self._step.experiment, self, "experiment")

    @cached_property
    def settings(self) -> S:
        """All that its id depends on besides the version and the parents, typed by its stage."""
        return self.stage.settings.read(self._step.settings)

    @property
    def identity(self) -> Mapping[str, Any]:
        """The content of its id, as JSON: the settings, `version`, and `parents`, the ids of what it reads."""
        return self._step.settings

    @property
    def config(self) -> Core:
        return self._plan.config

    @property
    def cluster(self) -> Cluster:
        return self.config.cluster

    @property
    def section(self) -> Any:
        """The stage's own section of the configuration."""
        assert self.stage.section is not None
        return self.config.section(self.stage.section.key)

    @property
    def dataset_spec(self) -> AnyDataset:
        return self.config.datasets[self.dataset]

    @property
    def network_spec(self) -> Network:
        return self._plan.networks[self.network]

    def spec_of(self, network: str) -> Network | None:
        """Return the description of any network of the plan; None if there is none of this name."""
        return self._plan.networks.get(network)

    @property
    def original(self) -> str:
        """The configured network that its network is a control or a copy of; otherwise its network itself."""
        return self._plan.original(self.network)

    @property
    def splits(self) -> Mapping[str, int]:
        """The number of listed images of its data set, by split."""
        return self._plan.splits[self.dataset]

    @property
    def classes(self) -> int:
        """How many classes the images of its data set are labelled with; 0: no image has a label."""
        return self._plan.classes[self.dataset]

    @property
    def is_control(self) -> bool:
        """Whether its network is an untrained control."""
        return (self._step.network or "").endswith(UNTRAINED)

    # Where it is ------------------------------------------------------------------------------------------------------

    @property
    def results(self) -> Path:
        return self._plan.results

    @property
    def scratch(self) -> Path:
        """Folder for disposable files."""
        return self._plan.scratch

    @property
    def manifest(self) -> Path:
        """The file that proves it finished."""
        return self.results / self._step.manifest

    @property
    def folder(self) -> Path:
        """The folder of its results, which holds `done/`."""
        return self.manifest.parent.parent

    @property
    def dataset_folder(self) -> Path:
        return self.results / self.dataset

    @property
    def command(self) -> str:
        """The command that runs it."""
        return self._plan.command(self._step.stage)

    # What it reads ----------------------------------------------------------------------------------------------------

    def parent(self, stage: str) -> Manifest:
        """Return the manifest of its parent of this stage."""
        return self._plan.manifest(self._plan.parent(self._step, stage))

    def parent_job(self, stage: str) -> Job[Any]:
        """Return its parent of this stage as a job; `KeyError` if it has none."""
        return Job(self._plan, self._plan.parent(self._step, stage), self.stages)

    @property
    def parents(self) -> list[Job[Any]]:
        """Its parents as jobs, in the order of its id."""
        return [Job(self._plan, self._plan.steps[path], self.stages) for path in self._step.parents]

    def jobs(self, stage: str | None = None) -> Iterator[Job[Any]]:
        """Yield all jobs of the plan, or those of one stage."""
        return jobs(self._plan, self.stages, stage)

    def beside(self, stage: str, network: str | None = None) -> Job[Any] | None:
        """Return another stage's job for the same data set and network, or for `network`; None if there is none."""
        network = network or self.network
        same = (job for job in self.jobs(stage) if (job._step.dataset, job._step.network) == (self.dataset, network))
        return next(same, None)

    @cached_property
    def images(self) -> Images:
        """The images of its parent `ingest`."""
        ingested = self.parent_job("ingest")
        return Images.from_manifest(ingested.folder / "images.zarr", self.parent("ingest"))

    @cached_property
    def model(self) -> Model:
        """The network of its parent `network`, as tasks name it."""
        return model_of(self.parent_job("network"))

    def read(self) -> Manifest:
        """Return its own manifest."""
        return Manifest.read(self.manifest)

    def before(self) -> Manifest | None:
        """Return the manifest of its last run, with whatever settings."""
        return latest(self.manifest.parent, self._step.stage)

    def resumed(
        self,
        workers: Any,
        task: Callable[..., Done],
        stores: Mapping[str, Parts],
        arguments: Callable[[str, list[str]], tuple],
        remedy: str,
        what: str = "",
    ) -> set[str]:
        """Do every part that some store lacks; see `pipeline.workers.resumable.resumed`."""
        label = f"{self.name}: {what}" if what else self.name
        return resumable.resumed(workers, task, stores, arguments, label, remedy)

    def resumed_in_groups(
        self,
        workers: Any,
        task: Callable[..., Sequence[Done]],
        stores: Mapping[str, Parts],
        arguments: Callable[[list[str], list[str]], tuple],
        sizes: Mapping[str, int],
        batch: int,
        remedy: str,
    ) -> set[str]:
        """Do every part that some store lacks, parts of few images together; see `resumable.resumed_in_groups`."""
        return resumable.resumed_in_groups(workers, task, stores, arguments, sizes, batch, self.name, remedy)

    # Doing it ---------------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Remove the manifests of what this job is about to rewrite."""
        remove_others(self.manifest.parent, self._step.stage)
        self._began = time.time()

    def workers(self) -> AbstractContextManager[Any]:
        """Return the client of the run's workers."""
        return client.client(self.cluster, self.scratch)

    def check_memory(self, need: float, remedy: str, what: str = "") -> None:
        """Refuse tasks that each need more bytes than a worker may use."""
        memory.check_memory(self.cluster, need, what or self.name, remedy)

    def refers_to(self, folders: Iterable[Path]) -> None:
        """Note the folders that this job fills, so that `make gc` keeps them until the job finishes."""
        names = sorted({folder.relative_to(self.results).as_posix() for folder in folders})
        write_atomically(self._note, json.dumps(Note(step=self.name, folders=names).written()))

    def noted(self) -> list[str]:
        """Return the folders, relative to the results folder, that it noted before it was interrupted.

        A damaged note counts as none here: the job writes it again.
        """
        with contextlib.suppress(OSError, MicrotomeError):
            return noted_in(self._note)
        return []

    @property
    def _note(self) -> Path:
        key = self._step.key
        of = [key.dataset, key.network, *([key.experiment] if key.experiment else [])]
        return self.scratch / UNFINISHED / f"{self._step.stage}.{digest(of)}.json"

    def told(self, error: NonFiniteError, image_id: Sequence[str] | np.ndarray) -> MicrotomeError:
        """Return the error as a readable message; `image_id` holds the id of every slot."""
        layer, index, *unit = error.args
        whose = f"{'class' if layer.startswith('logits') else 'unit'} {unit[0]}: its" if unit else "the"
        return MicrotomeError(
            f"network {self.network!r}, layer {layer!r}: {whose} output for image {image_id[index]!r} of data set "
            f"{self.dataset!r} is not finite (NaN or infinity)"
        )

    @contextlib.contextmanager
    def finite(self, images: Images) -> Iterator[None]:
        """Name the image if a task finds an output that is not finite."""
        try:
            yield
        except NonFiniteError as error:
            raise self.told(error, images.image_ids()) from None

    def finish(
        self,
        output: str,
        files: Files,
        result: Record | None = None,
        includes: Mapping[str, str] | None = None,
        made: tuple[int, int] | None = None,
    ) -> Manifest:
        """Write the manifest that proves this job finished.

        Parameters
        ----------
        output : digest of the output.
        files : size and crc32c of its files, relative to the folder that holds `done/`.
        result, includes : as in `Manifest`.
        made : (shards computed by this job, all shards); the others were already there.
        """
        plan, step = self._plan, self._step
        manifest = Manifest(
            stage=step.stage,
            id=step.id,
            digest=output,
            parents={path: plan.manifest(plan.steps[path]).digest for path in step.parents},
            files=files,
            includes=includes or {},
            result=result.written() if result is not None else {},
            settings=step.settings,
            provenance=provenance()
            | {"began": self._began, "seconds": round(time.time() - self._began, 3)}
            | ({"made": made[0], "shards": made[1]} if made else {}),
        )
        manifest.write(self.manifest)
        self._note.unlink(missing_ok=True)
        return manifest


def jobs(plan: Plan, stages: Mapping[str, Any], stage: str | None = None) -> Iterator[Job[Any]]:
    """Yield all jobs of a plan, parents before children, or those of one stage."""
    return (Job(plan, step, stages) for step in plan.steps.values() if stage is None or step.stage == stage)


def model_of(made: Job[Any]) -> Model:
    """Return the network that a job of the stage `network` made, as tasks name it."""
    return Model(
        made.network,
        made.network_spec.model_dump_json(),
        made.folder / "model.safetensors",
        made.read().result["weights_sha256"],
        digest(made.identity["architecture"]),
    )


def noted_in(note: Path) -> list[str]:
    """Return the folders that a note names, relative to the results folder; none if there is no such file.

    A damaged note raises `MicrotomeError`, since what its step fills is unknown.
    """
    try:
        return Note.model_validate_json(note.read_bytes()).folders
    except FileNotFoundError:
        return []
    except ValueError:
        raise MicrotomeError(
            f"{note} is damaged: it named the folders that an unfinished step fills. Run that step to its end, which "
            f"removes the note, or remove the file if what the step made so far may go"
        ) from None


def _there(name: str | None, job: Job[Any], what: str) -> str:
    if name is None:
        raise KeyError(f"{job.name} has no {what}")
    return name
