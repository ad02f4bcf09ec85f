"""Class names and their text embeddings."""
