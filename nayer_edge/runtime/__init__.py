"""The machine and the process: device, precision, ranks, signals, progress, versions."""
