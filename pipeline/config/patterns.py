"""Patterns of layer names."""

import fnmatch


def fits(name: str, pattern: str) -> bool:
    """Return whether a layer's name equals or matches a pattern; `*`, `?` and `[...]` match within one part."""
    names, parts = name.split("."), pattern.split(".")
    return name == pattern or (
        len(names) == len(parts) and all(fnmatch.fnmatchcase(*pair) for pair in zip(names, parts, strict=True))
    )
