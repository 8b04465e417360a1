"""Images of a data set, decoded."""
