"""The vocabulary of scenes: classes, concepts, and their numbers."""

from kernels.images.colour_names import COLOURS

CLASSES = (
    "ski slope", "snowy village", "forest", "farm", "park", "beach",
    "desert", "harbour", "lake", "city street", "road", "airport",
)  # fmt: skip

CATEGORIES = ("object", "part", "material", "colour")

OBJECTS = (
    "sky", "sun", "cloud", "mountain", "snow", "grass", "sand", "water", "field", "road", "pavement", "tree", "bush",
    "cactus", "rock", "house", "building", "person", "skis", "boat", "pier", "car", "plane", "parasol", "fence", "cow",
    "swan", "bench", "lamp", "sign",
)  # fmt: skip

PARTS = (
    "tree crown", "tree trunk", "house wall", "house roof", "house door", "house window", "building wall",
    "building window", "person head", "person torso", "person legs", "boat hull", "boat sail", "boat mast", "car body",
    "car wheel", "car window", "mountain side", "mountain cap", "parasol canopy", "parasol pole", "cow body",
    "cow head", "cow legs", "swan body", "swan head", "plane body", "plane wing", "plane tail", "plane window",
    "lamp post", "lamp light", "sign board", "sign post", "road marking",
)  # fmt: skip

MATERIALS = (
    "air", "vapour", "snow", "grass", "leaves", "sand", "water", "soil", "asphalt", "concrete", "rock", "foliage",
    "wood", "brick", "plaster", "metal", "glass", "rubber", "skin", "fabric", "hide", "feathers",
)  # fmt: skip

# Number 0 is "nothing" in every category, so the concept called CONCEPTS[category][i] has the number i + 1.
CONCEPTS: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "part": PARTS,
    "material": MATERIALS,
    "colour": COLOURS,
}

OBJECT_NUMBER = {name: number for number, name in enumerate(OBJECTS, 1)}
PART_NUMBER = {"": 0} | {name: number for number, name in enumerate(PARTS, 1)}
MATERIAL_NUMBER = {"": 0} | {name: number for number, name in enumerate(MATERIALS, 1)}
