"""Similarity of representations: Gram matrices, CKA, neighbours, Procrustes."""
