"""What touches the outside: Ray, MLflow, files, the screen. Each file is the only one that knows its library."""
