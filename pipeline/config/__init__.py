"""The sections of the configuration, each a strict model."""
