"""Train networks repeatably."""
