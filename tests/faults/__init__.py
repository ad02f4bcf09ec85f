"""Faults done to the product on purpose, many times, and counted: `python -m tests.faults` (`make faults`)."""
