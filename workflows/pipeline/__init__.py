"""The order of the stages, and running them from beginning to end."""
