"""Maintain a results folder: find damage, recompute only that, explain why a step would run, remove leftovers."""
