"""An experiment of the stage `visualize` on scenes, with a small network."""

from pathlib import Path
from typing import Any

from experiments import scenes, tiny

WISHES: dict[str, Any] = {
    "networks": ["cnn"],
    "units": {"a": "all", "b": [0, 4, 2]},
    "classes": ["farm", 4],
    "projections": {"images": 3, "units": 3},
    "maximise": {"steps": 4, "expert": ["l2", "tv", "gaussian", "maco"], "restarts": 2, "keep": ["float"]},
}


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """The configuration; `changes` replace keys of its wishes."""
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 12, "validation": 24}, "shard_images": 8}
    raw["networks"] = {"cnn": tiny(folder, arguments={"classes": 12, "units": 6}, seed=3, layers=["a", "b"])}
    raw["visualize"] = {"wishes": WISHES | changes}
    return raw
