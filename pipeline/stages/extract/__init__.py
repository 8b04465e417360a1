"""Activations of every layer, in one forward pass."""
