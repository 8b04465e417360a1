"""Do explanations tell the truth."""
