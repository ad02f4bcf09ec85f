"""Class names and their text embeddings."""

from nayer_edge.labels.class_names import read_labels

__all__ = ["read_labels"]
