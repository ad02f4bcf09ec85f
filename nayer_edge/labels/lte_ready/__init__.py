"""Label-text embeddings shipped with the package, named by digest."""
