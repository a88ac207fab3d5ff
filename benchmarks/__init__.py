"""What `mmdistill bench` and `mmdistill ablate` run, from a checkout."""
