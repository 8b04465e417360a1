"""What each class loses when units are removed."""
