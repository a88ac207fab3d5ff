"""Data sets: shards and manifests, readers of image sources, built-in sources, and reference statistics."""
