"""How easily networks fit noise."""
