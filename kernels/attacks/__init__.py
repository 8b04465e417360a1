"""Adversarial attacks: pure functions on batches of images, each row for itself."""
