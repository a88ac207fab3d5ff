"""Schedules, transitions, predictions, times and weights: pure functions, keyword-only."""
