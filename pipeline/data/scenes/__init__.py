"""The embedded data set: procedural scenes whose objects, parts, materials and colours are known at every pixel."""

from pipeline.data.scenes.composition import DEFINING, KINDS
from pipeline.data.scenes.render import SPLITS, Scenes, generate
from pipeline.data.scenes.scene import Scene, Thing, draw_scene
from pipeline.data.scenes.vocabulary import CATEGORIES, CLASSES, CONCEPTS

VERSION = 1  # of the pictures and label maps: part of the data set's id

__all__ = [
    "CATEGORIES",
    "CLASSES",
    "CONCEPTS",
    "DEFINING",
    "KINDS",
    "SPLITS",
    "VERSION",
    "Scene",
    "Scenes",
    "Thing",
    "draw_scene",
    "generate",
]
