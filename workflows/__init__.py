"""The engine room: stages, Ray, MLflow and the command line around mmdistill_core."""
