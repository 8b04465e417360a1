"""Which units detect which concepts."""
