"""The operations of a forward pass: trace them, and cut a network at a layer."""
