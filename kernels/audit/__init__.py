"""Measures of whether explanations are true: pure functions on arrays."""
