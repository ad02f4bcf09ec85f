"""The step validate: which exported files this machine can run, and their answers on the same images."""
