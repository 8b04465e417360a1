"""An experiment of the stage `attack` on scenes, with a small network whose units are ranked."""

from pathlib import Path
from typing import Any

from experiments import scenes, tiny

FOOLED: dict[str, Any] = {
    "networks": ["cnn"],
    "pairs": [[3, 7], [7, 3]],
    "untargeted": True,
    "start": "predicted",
    "images": 12,
    "norms": {"linf": [8, 24], "l2": [1.5]},
    "methods": ["pgd", "apgd_ce", "apgd_dlr", "cw_l2", "square"],
    "steps": 6,
    "searches": 3,
    "queries": 12,
}


def experiment(folder: Path, **changes: Any) -> dict[str, Any]:
    """The configuration; `changes` replace keys of its attacks."""
    raw = scenes(folder)
    raw["datasets"]["scenes"] |= {"images": {"train": 12, "validation": 24}, "shard_images": 8}
    raw["networks"] = {"cnn": tiny(folder, arguments={"classes": 12, "units": 10}, seed=3, layers=["a", "b"])}
    raw["networks"]["cnn"]["ablate"] = {"draws": 2}
    raw["attack"] = {"fooled": FOOLED | changes}
    return raw
