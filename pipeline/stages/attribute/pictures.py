"""Pictures of maps beside their images, drawn on workers, and how alike the maps of one image are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.report.experiment import Experiment
from pipeline.report.pictures import JPEG, montage, picture
from pipeline.stages.attribute.found import Attributions, Explanation, MethodMaps, read_maps
from pipeline.storage.read_back import open_store
from pipeline.storage.store import StoreRef

TILE = 128
"""Longer side of a picture in pixels."""
IMAGES_AT_ONCE = 50
"""Images of one task: bounds its memory."""
COMPARED = 100
"""Images on which maps are compared."""
QUANTILE = 0.995
"""Quantile of the magnitudes of a map that gets the full colour."""
FOR, AGAINST, MUCH = (213, 94, 0), (0, 114, 178), (0, 95, 70)
"""Full colours: of values for the class, and against it; of magnitudes. Without value, a map is white."""
NOTHING = (160, 160, 160)


def _palette(low: Sequence[int], high: Sequence[int]) -> np.ndarray:
    """Return colours (value, 3) uint8 of -127 to 127: white in the middle, `low` and `high` at the ends."""
    strength = np.arange(-127, 128)[:, None] / 127
    full = np.where(strength < 0, low, high)
    return np.rint(255 + np.abs(strength) * (full - 255.0)).astype(np.uint8)


PALETTES = {True: _palette(AGAINST, FOR), False: _palette(MUCH, MUCH)}
"""Colours of maps with and without signs."""


@dataclass(frozen=True)
class Source:
    """The maps of one method that a task reads."""

    store: StoreRef
    signed: bool
    array: str


@dataclass(frozen=True)
class Task:
    """Some images of one shard.

    Attributes
    ----------
    out : the report's folder. prefix : of the files in it.
    images : the store of the images. size : (y, x) of them.
    numbers : places on the page by slot.
    compared, figured : the slots whose maps are compared, and those whose maps a figure shows.
    methods : in the page's order. untrained : the same, None where the control lacks one.
    unexplained : slots that the control does not explain.
    """

    out: Path
    prefix: str
    images: Path
    size: tuple[int, int]
    numbers: dict[int, int]
    compared: frozenset[int]
    figured: frozenset[int]
    methods: tuple[Source, ...]
    untrained: tuple[Source | None, ...]
    unexplained: frozenset[int]


@dataclass(frozen=True)
class Drawn:
    """What was made of the images of an experiment.

    Attributes
    ----------
    files : pictures, relative to the report's folder.
    scales : by slot, the value that gets the full colour, (method,).
    alike : by slot, the rank correlation of its maps, (method, method).
    trained : by slot, that of its maps with those of the untrained network, (method,).
    shown : by slot, its picture (y, x, colour) uint8 and its maps (method, y, x) from -1 to 1, for the figure.
    """

    files: list[str] = field(default_factory=list)
    scales: dict[int, np.ndarray] = field(default_factory=dict)
    alike: dict[int, np.ndarray] = field(default_factory=dict)
    trained: dict[int, np.ndarray] = field(default_factory=dict)
    shown: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def take(self, other: Drawn) -> None:
        self.files.extend(other.files)
        for name in ("scales", "alike", "trained", "shown"):
            getattr(self, name).update(getattr(other, name))


def tasks_of(experiment: Experiment, one: Explanation, prefix: str, figured: Sequence[int]) -> Iterator[Task]:
    """Yield the tasks of one experiment; `prefix` is that of its files, relative to the report's folder."""
    found, slots = one.trained, one.trained.shown
    shard = found.methods[0].store.open()["attribution"].chunks[0]
    control = {} if one.untrained is None else {method.name: method for method in one.untrained.methods}
    explained = set() if one.untrained is None else set(one.untrained.slots)
    by_shard: dict[int, list[int]] = {}
    for slot in sorted(slots):
        by_shard.setdefault(slot // shard, []).append(slot)
    numbers = {slot: number for number, slot in enumerate(slots)}
    compared, shown = frozenset(found.slots[:COMPARED]), frozenset(figured)
    for number, own in sorted(by_shard.items()):
        for at in range(0, len(own), IMAGES_AT_ONCE):
            some = own[at : at + IMAGES_AT_ONCE]
            yield Task(
                experiment.out,
                prefix,
                experiment.results / found.dataset / "images.zarr",
                found.size,
                {slot: numbers[slot] for slot in some},
                compared & frozenset(some),
                shown & frozenset(some),
                tuple(_source(method, number) for method in found.methods),
                tuple(
                    _source(control[method.name], number) if method.name in control else None
                    for method in found.methods
                ),
                frozenset(some) - explained,
            )


def _source(method: MethodMaps, shard: int) -> Source:
    return Source(method.store.of([method.array], [shard]), method.signed, method.array)


def draw(task: Task) -> tuple[str, Drawn]:
    """Draw the pictures of some images, and compare their maps, on a worker; return the prefix and what was made."""
    slots, drawn = list(task.numbers), Drawn()
    stored = open_store(task.images)["image"]
    pixels = np.asarray(stored[slots[0] : slots[-1] + 1])[np.array(slots) - slots[0]]
    maps = [read_maps(source.store, slots, source.array) for source in task.methods]
    untrained = [None if source is None else read_maps(source.store, slots, source.array) for source in task.untrained]
    signed = [source.signed for source in task.methods]
    size = tile_size(task.size)
    for at, slot in enumerate(slots):
        name = f"{task.prefix}{task.numbers[slot]:04d}"
        image = picture(pixels[at]).resize(size, Image.Resampling.BICUBIC)
        for rank in range(maps[0].shape[1]):
            tiles = [tile(each[at, rank], sign, size) for each, sign in zip(maps, signed, strict=True)]
            file = f"{name}{f'-{rank}' if rank else ''}.jpg"
            montage(tiles if rank else [image, *tiles]).save(task.out / file, **JPEG)
            drawn.files.append(file)
        first = [each[at, 0] for each in maps]
        drawn.scales[slot] = np.array([scale_of(each) for each in first])
        control = [None if each is None or slot in task.unexplained else each[at, 0] for each in untrained]
        if any(each is not None for each in control):
            tiles = [
                Image.new("RGB", size, NOTHING) if each is None else tile(each, sign, size)
                for each, sign in zip(control, signed, strict=True)
            ]
            montage(tiles).save(task.out / f"{name}-untrained.jpg", **JPEG)
            drawn.files.append(f"{name}-untrained.jpg")
        if slot in task.compared:
            drawn.alike[slot], drawn.trained[slot] = compare(first, control, signed, task.size)
        if slot in task.figured:
            drawn.shown[slot] = np.asarray(image), np.stack([relative(each, size) for each in first])
    return task.prefix, drawn


def tile_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return (width, height) of a picture of an image of (height, width)."""
    height, width = size
    return max(1, round(TILE * width / max(size))), max(1, round(TILE * height / max(size)))


def scale_of(values: np.ndarray) -> float:
    """Return the magnitude of a map that gets the full colour, NaN if there is no map."""
    return float(np.quantile(np.abs(values), QUANTILE))


def relative(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a map (y, x) in units of its full colour, from -1 to 1, at (width, height); NaN if there is no map."""
    scale = scale_of(values)
    if np.isnan(scale):
        return np.full(size[::-1], np.nan, np.float32)
    relative = (values / scale if scale else np.zeros_like(values)).clip(-1, 1).astype(np.float32)
    # Cells are areas, as where maps are compared; Pillow also averages where the picture is smaller.
    return np.asarray(Image.fromarray(relative).resize(size, Image.Resampling.BILINEAR)).clip(-1, 1)


def tile(values: np.ndarray, signed: bool, size: tuple[int, int]) -> Image.Image:
    """Draw a map (y, x) at (width, height); grey where there is none."""
    found = relative(values, size)
    if np.isnan(found).any():
        return Image.new("RGB", size, NOTHING)
    return Image.fromarray(PALETTES[signed][np.rint(127 + 127 * (found if signed else np.abs(found))).astype(np.uint8)])


def compare(
    maps: Sequence[np.ndarray], control: Sequence[np.ndarray | None], signed: Sequence[bool], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return rank correlations of the maps of one image: with each other (method, method), and with the control's.

    Maps (y, x) are enlarged to `size` first. Where one of two has no signs, magnitudes are compared. NaN where a map is
    missing or constant.
    """
    from kernels.attribution.agreement import resized, standard_ranks

    def ranks(values: Sequence[np.ndarray | None]) -> np.ndarray:
        missing = np.full(size, np.nan, np.float32)
        whole = [missing if each is None else resized(each[None], size)[0] for each in values]
        return np.stack(whole).reshape(len(values), -1)

    own, other, signs = ranks(maps), ranks(control), np.array(signed)
    by_sign, by_magnitude = standard_ranks(own), standard_ranks(np.abs(own))
    alike = np.where(signs[:, None] & signs, by_sign @ by_sign.T, by_magnitude @ by_magnitude.T)
    if all(each is None for each in control):
        return alike, np.full(len(maps), np.nan)
    pairs = [standard_ranks(values) for values in (other, np.abs(other))]
    return alike, np.where(signs, (by_sign * pairs[0]).sum(1), (by_magnitude * pairs[1]).sum(1))


def draw_all(experiment: Experiment, tasks: Sequence[Task]) -> dict[str, Drawn]:
    """Draw all tasks, on the workers if there are any; return what was made by prefix."""
    for task in tasks:
        (task.out / task.prefix).parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Drawn] = {}
    for prefix, drawn in experiment.map(draw, [(task,) for task in tasks], "report: pictures of attributions"):
        found.setdefault(prefix, Drawn()).take(drawn)
    return found


def first_images(found: Attributions, labels: np.ndarray, count: int) -> list[int]:
    """Return the images that the figure shows: the first of each label, then the others."""
    seen: set[int] = set()
    first: list[int] = []
    others: list[int] = []
    for slot in found.shown:
        (others if int(labels[slot]) in seen else first).append(slot)
        seen.add(int(labels[slot]))
    return (first + others)[:count]
