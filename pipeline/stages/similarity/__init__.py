"""How alike the layers of networks are."""
