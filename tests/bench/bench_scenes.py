"""How hard the scenes are, how fast they are drawn, and what a small network learns from them.

python -m tests.bench.bench_scenes speed            images a second of one core
python -m tests.bench.bench_scenes baselines        accuracy of linear classifiers on colours and thumbnails
python -m tests.bench.bench_scenes concepts         share of the pixels of each concept
python -m tests.bench.bench_scenes train cnn|vit    accuracy and CPU seconds of a recipe, by default RECIPES below
python -m tests.bench.bench_scenes sheet FILE.png   one column a class
"""

import argparse
import importlib.util
import time
from pathlib import Path

import numpy as np
import yaml

from kernels.images.colour_names import COLOURS, colour_names
from pipeline.config.recipe import Recipe
from pipeline.data.scenes import CLASSES, CONCEPTS, generate

NETWORKS = Path(__file__).parents[2] / "config" / "networks" / "scenes.py"
TRAIN, VALIDATION, SIZE = 10_000, 1600, 64
DEMO = Path(__file__).parents[2] / "config" / "config.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "baselines", "concepts", "train", "sheet"])
    parser.add_argument("name", nargs="?", default="cnn")
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    if arguments.what == "train":
        train(arguments.name, arguments.steps)
    elif arguments.what == "sheet":
        sheet(Path(arguments.name))
    else:
        {"speed": speed, "baselines": baselines, "concepts": concepts}[arguments.what]()


def speed(count: int = 600) -> None:
    for size in (64, 96):
        generate(0, 0, 24, size)  # tables
        for what, options in (("all", {}), ("images", {"label_map": False}), ("label maps", {"image": False})):
            began = time.process_time()
            generate(1, 0, count, size, **options)
            print(f"{size} px, {what}: {count / (time.process_time() - began):.0f} images per CPU second")


def baselines() -> None:
    """Multinomial logistic regression on standardised features; every image, no augmentation."""
    train_set = generate(0, 0, TRAIN, SIZE, label_map=False)
    test_set = generate(0, 0, VALIDATION, SIZE, "validation", label_map=False)
    features = {
        "thumbnail 4x4": lambda image: thumbnail(image, 4),
        "thumbnail 8x8": lambda image: thumbnail(image, 8),
        "RGB histogram 8x8x8": histogram,
        "colour names": names_histogram,
    }
    for name, feature in features.items():
        accuracy = logistic(feature(train_set.image), train_set.label, feature(test_set.image), test_set.label)
        print(f"{name}: {100 * accuracy:.1f} %")


def thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    count, channels, height, width = image.shape
    return image.reshape(count, channels, side, height // side, side, width // side).mean((3, 5)).reshape(count, -1)


def histogram(image: np.ndarray) -> np.ndarray:
    """Square roots of the shares of 512 colours: the linear kernel on them is Bhattacharyya's."""
    high = (image >> 5).astype(np.int64)
    colour = (high[:, 0] << 6) | (high[:, 1] << 3) | high[:, 2]
    return _shares(colour, 512) ** 0.5


def names_histogram(image: np.ndarray) -> np.ndarray:
    return _shares(colour_names(np.moveaxis(image, 1, -1)).astype(np.int64), len(COLOURS))


def _shares(values: np.ndarray, bins: int) -> np.ndarray:
    """Share of each value in each image: (image, y, x) -> (image, bin)."""
    count = len(values)
    slots = values.reshape(count, -1) + bins * np.arange(count)[:, None]
    return np.bincount(slots.ravel(), minlength=count * bins).reshape(count, bins) / slots.shape[1]


def logistic(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> float:
    """Accuracy on the test images."""
    import torch

    mean, std = x.mean(0), x.std(0) + 1e-6
    inputs, targets = torch.from_numpy((x - mean) / std).float(), torch.from_numpy(y)
    layer = torch.nn.Linear(inputs.shape[1], len(CLASSES))
    optimiser = torch.optim.LBFGS(layer.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimiser.zero_grad()
        loss = torch.nn.functional.cross_entropy(layer(inputs), targets) + 1e-3 * (layer.weight**2).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        guess = layer(torch.from_numpy((x_test - mean) / std).float()).argmax(1).numpy()
    return float((guess == y_test).mean())


def concepts(count: int = 2400) -> None:
    maps = generate(0, 0, count, SIZE, image=False).label_map
    for category, names in enumerate(CONCEPTS.values()):
        share = np.bincount(maps[:, category].ravel(), minlength=len(names) + 1)[1:] / maps[:, category].size
        for name, value in zip(names, share, strict=True):
            print(f"{list(CONCEPTS)[category]:9} {name:18} {100 * value:6.2f} %")


def train(name: str, steps: int | None) -> None:
    import torch

    from pipeline.networks.training.loop import fit

    spec = importlib.util.spec_from_file_location("scenes_networks", NETWORKS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(0)
    network = getattr(module, name)()
    demo = yaml.safe_load(DEMO.read_text())["networks"][name]
    recipe = Recipe(**demo["train"]["recipe"] | ({"steps": steps} if steps else {}))
    train_set = generate(0, 0, TRAIN, SIZE, label_map=False)
    test_set = generate(0, 0, VALIDATION, SIZE, "validation", label_map=False)
    cpu, wall = time.process_time(), time.monotonic()
    result = fit(
        network, train_set[:2], test_set[:2], demo["preprocessing"]["mean"], demo["preprocessing"]["std"], recipe,
        progress=lambda step, steps, loss, accuracy: print(
            f"\r{step}/{steps} loss {loss:.3f} accuracy {accuracy:.3f}", end="", flush=True
        ),
    )  # fmt: skip
    print(
        f"\n{name}: {100 * result['accuracy']:.1f} % of {result['validation_images']}, {result['precision']}, "
        f"{time.process_time() - cpu:.0f} CPU s, {time.monotonic() - wall:.0f} s"
    )


def sheet(path: Path, rows: int = 6) -> None:
    from PIL import Image

    image = generate(0, 0, rows * len(CLASSES), SIZE, label_map=False).image
    grid = np.pad(image, ((0, 0), (0, 0), (1, 1), (1, 1))).reshape(rows, len(CLASSES), 3, SIZE + 2, SIZE + 2)
    picture = grid.transpose(0, 3, 1, 4, 2).reshape(rows * (SIZE + 2), len(CLASSES) * (SIZE + 2), 3)
    Image.fromarray(picture).save(path)


if __name__ == "__main__":
    main()
