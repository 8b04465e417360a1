"""Interventions in generators: what an image loses with some units, inside a region, around it and elsewhere."""
