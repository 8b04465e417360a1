"""Repeatable training of networks."""
