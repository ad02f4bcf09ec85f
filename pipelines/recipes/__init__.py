"""The shipped recipes (TOML), each with the figures that it was measured with."""
