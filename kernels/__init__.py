"""Pure numerics: arrays in, arrays out. No files, no Dask, no Snakemake, no configuration."""
