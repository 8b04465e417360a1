"""The stage `intervene`: what a generator's images lose without some of its units."""
