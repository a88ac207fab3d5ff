"""Runs a training on Ray Train: jobs, workers, checkpoints, events, recovery."""
