"""The HTML page of a run, and the pictures in it."""
