"""Gram matrices of minibatches, for comparisons."""
