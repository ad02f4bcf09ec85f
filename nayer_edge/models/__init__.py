"""Building classifiers by name and loading their weights."""
