"""The stage `attribute`: which pixels made the network say so."""
