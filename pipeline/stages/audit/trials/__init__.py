"""The tests of explanations. A new one is a file here, a line in `registry.py`, and its options."""
