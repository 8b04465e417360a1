"""Weights: read, drawn or trained."""
