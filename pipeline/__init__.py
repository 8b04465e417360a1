"""The stages of Microtome as a library: files, arrays, Dask, models, training. Usable without Snakemake."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.run.results import open_results as open_results

__all__ = ["open_results"]


def __getattr__(name: str) -> Any:
    """Import what is re-exported when it is asked for: `import pipeline` stays cheap."""
    if name == "open_results":
        from pipeline.run.results import open_results

        return open_results
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
