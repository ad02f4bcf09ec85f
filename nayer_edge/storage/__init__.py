"""Files: atomic writes, hashes, tensors, and the run folder."""
