"""Many students of one teacher, on Ray Tune."""
