"""The configuration's sections, each a strict model."""
