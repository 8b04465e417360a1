"""Linear probes of the layers."""
