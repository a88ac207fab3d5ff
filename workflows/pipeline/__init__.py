"""The order of the stages, and a run of them from beginning to end."""
