"""Fault injection, with counts of tries and losses: `python -m tests.faults` (`make faults`)."""
