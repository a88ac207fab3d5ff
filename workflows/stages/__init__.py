"""The six stages, one file each."""
