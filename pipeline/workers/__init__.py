"""Dask workers: the pool, the client and the tasks."""
