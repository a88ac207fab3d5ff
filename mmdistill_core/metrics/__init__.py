"""Distances between two sets of samples. Features are given; who extracts them is the caller's choice."""
