"""What networks, steps and runs cost: operations, sizes, latencies and time."""
