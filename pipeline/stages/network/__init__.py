"""Network weights: loaded, random or trained."""
