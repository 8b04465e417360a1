"""Receptive fields, attention distance and skip connections."""
