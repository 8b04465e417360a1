"""Files on disk: ids, manifests, stores, ledgers, tables."""
