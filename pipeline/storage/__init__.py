"""Files on disk: ids, manifests, stores, ledgers, tables."""

SCRATCH = ".microtome"  # folder below the results folder for disposable files: locks, caches, plans, notes
