"""Trains many students of one teacher with different settings, on Ray Tune."""
