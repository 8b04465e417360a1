"""CamVid dissected by SqueezeNet, against a script that shares no code with the project.

The script follows the definition of Bau et al. (CVPR 2017, PNAS 2020) to the letter: every map upsampled to the size of
the label maps in float64, rounded to float16, sorted; masks as booleans; intersections and unions by counting pixels.
"""

import csv
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import xarray
from PIL import Image
from torch.nn import functional
from workflow_run import ROOT, snakemake

SIZE = 224
BATCH = 16
VOID = 11


def test_thresholds_and_iou_of_all_units(beside_data):
    every_second(beside_data / "data/camvid/images", beside_data / "images")
    changes = ('datasets={"camvid": {"root": "images"}}', 'controls={"images": 16}')
    snakemake(beside_data, ROOT / "config/camvid.yaml", "dissect", "--config", *changes)
    data = beside_data / "results/camvid"
    layer = json.loads((data / "squeezenet/layers.json").read_text())["features.12"]
    images = xarray.open_zarr(data / "images.zarr")
    names = [Path(name).stem for name in images.image_id.values.tolist()]
    assert sorted(names) == sorted(path.stem for path in (beside_data / "images").iterdir())

    pixels, labels = read(beside_data / "data/camvid", names)
    assert np.array_equal(images.image.values, pixels.transpose(0, 3, 1, 2))
    maps = forward(beside_data / "data/models/imagenet_squeezenet1_0.pt", pixels)
    stored = xarray.open_zarr(data / layer["activations"])
    scale = np.float32(stored.attrs["scale"])  # a power of two: it changes the rounding of the smallest values alone
    normal = maps.float().numpy() >= scale * np.finfo(np.float16).smallest_normal
    assert np.array_equal(stored.activation.values[normal] * scale, maps.float().numpy()[normal])

    threshold, intersection, area = dissect(maps, labels, quantile=0.01)
    concepts = [line.partition(" ")[2] for line in (beside_data / "data/camvid/classes.txt").read_text().splitlines()]
    concepts = concepts[:VOID]
    concept_area = np.bincount(labels.ravel(), minlength=VOID + 1)[:VOID]
    found = xarray.open_zarr(data / layer["iou"])
    assert found.concept.values.tolist() == concepts
    assert np.array_equal(xarray.open_zarr(data / layer["thresholds"]).threshold.values, threshold.astype(np.float32))
    assert np.array_equal(found.unit_area.values, area)
    assert np.array_equal(found.concept_area.values, concept_area)
    assert np.array_equal(found.intersection.values, intersection)
    iou = intersection / (area[:, None] + concept_area - intersection)
    np.testing.assert_allclose(found.iou.values, iou, rtol=1e-6)

    with (data / "squeezenet/units.csv").open(newline="") as file:
        units = list(csv.DictReader(file))
    best = iou.max(1)
    assert [row["concept"] for row in units] == [
        concepts[c] if v > 0.04 else "" for c, v in zip(iou.argmax(1), best, strict=True)
    ]
    np.testing.assert_allclose([float(row["iou"]) for row in units], best, rtol=1e-5)
    assert (len(units), int((best > 0.04).sum()), concepts[int(iou[best.argmax()].argmax())]) == (512, 159, "car")


def every_second(source: Path, folder: Path) -> None:
    """Links to half of the images: the script below takes a minute for all."""
    folder.mkdir()
    for path in sorted(source.iterdir())[::2]:
        (folder / path.name).symlink_to(path.resolve())


def read(camvid: Path, names: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (image, y, x, 3) and labels uint8 (image, y, x), squashed to SIZE x SIZE."""
    pixels, labels = [], []
    for name in names:
        picture = Image.open(camvid / "images" / f"{name}.jpg").convert("RGB")
        pixels.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BILINEAR)))
        label_map = np.asarray(Image.open(camvid / "labels" / f"{name}.png"))
        height, width = label_map.shape
        y = np.floor((np.arange(SIZE) + 0.5) * height / SIZE).astype(int)
        x = np.floor((np.arange(SIZE) + 0.5) * width / SIZE).astype(int)
        labels.append(label_map[y][:, x])
    return np.stack(pixels), np.stack(labels)


def forward(checkpoint: Path, pixels: np.ndarray) -> torch.Tensor:
    """Maps (image, unit, y, x) of features.12, rounded to float16."""
    from torchvision.models import squeezenet1_0

    network = squeezenet1_0(weights=None)
    network.load_state_dict(torch.load(checkpoint, weights_only=True))
    network = network.eval().to(memory_format=torch.channels_last)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps = []
    with torch.no_grad():
        for at in range(0, len(pixels), BATCH):
            batch = torch.from_numpy(pixels[at : at + BATCH])
            count = len(batch)
            batch = torch.cat([batch, batch.new_zeros((BATCH - count, SIZE, SIZE, 3))])
            normalised = ((batch.float() / 255 - mean) / std).permute(0, 3, 1, 2)
            maps.append(network.features[:13](normalised)[:count])
    return torch.cat(maps).half()


def dissect(maps: torch.Tensor, labels: np.ndarray, quantile: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Threshold (unit) float16, intersection (unit, concept) and area (unit) of the masks above it."""
    flat = labels.ravel()
    above = int(quantile * flat.size)
    threshold = np.empty(maps.shape[1], np.float16)
    intersection = np.empty((maps.shape[1], VOID), np.int64)
    area = np.empty(maps.shape[1], np.int64)
    for unit in range(maps.shape[1]):
        own = maps[:, unit : unit + 1].double()
        upsampled = functional.interpolate(own, (SIZE, SIZE), mode="bilinear", align_corners=False).numpy().ravel()
        # NumPy rounds once; torch goes from float64 to float16 by way of float32.
        values = upsampled.astype(np.float16)
        assert values.min() >= 0
        # Of numbers that are not negative, the bits of float16 have the order of the values, and sort faster.
        bits = values.view(np.int16)
        at = np.sort(bits, kind="stable")[-1 - above]
        mask = bits > at
        threshold[unit] = at.view(np.float16)
        close = np.flatnonzero((bits == at) | (bits == at + 1))
        correct_ties(mask, close, upsampled, own[:, 0].numpy(), threshold[unit])
        area[unit] = mask.sum()
        intersection[unit] = np.bincount(flat[mask], minlength=VOID + 1)[:VOID]
    return threshold, intersection, area


def correct_ties(
    mask: np.ndarray, close: np.ndarray, upsampled: np.ndarray, maps: np.ndarray, threshold: np.float16
) -> None:
    """Decide in fractions what lies half-way between the threshold and the next float16.

    `close` are the positions whose value is rounded to one of the two. float64 cannot hold sevenths, so of a map of
    13 x 13 at 224 x 224 even an exact half may come out a little lower.
    """
    following = np.nextafter(threshold, np.float16(np.inf))
    middle = (float(threshold) + float(following)) / 2
    for at in close[np.abs(upsampled[close] - middle) <= 1e-12 * middle]:
        image, y, x = np.unravel_index(at, (len(maps), SIZE, SIZE))
        exact = Fraction(0)
        for row, of_row in corners(int(y), maps.shape[1]):
            for column, of_column in corners(int(x), maps.shape[2]):
                exact += of_row * of_column * Fraction(float(maps[image, row, column]))
        to_even = following.view(np.int16) % 2 == 0
        mask[at] = exact >= Fraction(middle) if to_even else exact > Fraction(middle)


def corners(position: int, length: int) -> list[tuple[int, Fraction]]:
    """The two items of an axis that an output blends, with their exact shares; edges are repeated."""
    centre = max(Fraction(2 * position + 1, 2) * Fraction(length, SIZE) - Fraction(1, 2), Fraction(0))
    below = int(centre)
    share = centre - below
    return [(below, 1 - share), (min(below + 1, length - 1), share)]
