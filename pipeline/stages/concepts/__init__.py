"""Label maps from all sources."""
