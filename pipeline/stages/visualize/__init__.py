"""The stage `visualize`: what units and classes want to see."""
