"""Quantization-aware training of an exported graph."""
