"""Data sets: shards and their manifest, readers of images from anywhere, sources by name, reference statistics."""
