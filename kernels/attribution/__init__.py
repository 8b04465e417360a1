"""Numerics of attribution: paths of integration, class activation maps, attention rollout, agreement of maps."""
