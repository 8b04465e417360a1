"""Data sets: their kinds, listings, pixels and label maps."""
