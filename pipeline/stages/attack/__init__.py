"""The stage `attack`: small changes of images that change what networks say, and the units that they move."""
