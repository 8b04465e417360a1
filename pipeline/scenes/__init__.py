"""The embedded data set: procedural scenes whose objects, parts, materials and colours are known at every pixel."""

from pipeline.scenes.render import SPLITS, Scenes, generate
from pipeline.scenes.vocabulary import CATEGORIES, CLASSES, CONCEPTS

__all__ = ["CATEGORIES", "CLASSES", "CONCEPTS", "SPLITS", "Scenes", "generate"]
