"""Pictures of what units and classes want to see: ascent, priors of images, filters, pooling."""
