"""Decoded images of a data set."""
