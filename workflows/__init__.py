"""The workflow around mmdistill_core: stages, Ray, MLflow, storage and the command line."""
