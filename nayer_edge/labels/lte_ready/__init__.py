"""Label-text embeddings that ship with the package: a read-only part of the cache, keyed by digest."""
