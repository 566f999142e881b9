"""Optimizers beside torch's own. Each keeps its state in a checkpoint, exactly."""
