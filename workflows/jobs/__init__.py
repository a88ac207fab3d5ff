"""Jobs of a cluster: submitted, watched, stopped."""
