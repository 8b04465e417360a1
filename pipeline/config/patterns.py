"""(To be said.)"""

import fnmatch


def fits(name: str, pattern: str) -> bool:
    """Whether a layer's name is this one, or fits a pattern: `*`, `?` and `[...]` stand for characters of one part."""
    names, parts = name.split("."), pattern.split(".")
    return name == pattern or (
        len(names) == len(parts) and all(fnmatch.fnmatchcase(*pair) for pair in zip(names, parts, strict=True))
    )
