"""The stages of Microtome as a library: files, arrays, Dask, models, training. Usable without Snakemake."""
