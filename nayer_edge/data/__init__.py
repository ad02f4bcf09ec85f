"""Labelled images from files: which formats are read, and how a set too large for memory is streamed."""
