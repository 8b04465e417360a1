"""Whether networks know when they are wrong."""
