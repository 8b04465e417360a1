"""Network dissection: exact thresholds, intersections with label maps, labels of units."""
